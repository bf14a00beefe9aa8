"""Merging methods: pure functions of tensors, one file a family."""
