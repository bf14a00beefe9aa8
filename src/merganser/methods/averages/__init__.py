"""Weighted averages: of the parameters as they are, and on spheres."""
