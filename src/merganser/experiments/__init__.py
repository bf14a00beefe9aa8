"""Whole experiments: the demo, and reports of their rows."""
