"""Least squares: methods that are a choice of metric, see :mod:`merganser.methods.least_squares`."""
