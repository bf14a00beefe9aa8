"""The laboratory: suites of data sets, grids of experiments, their zoo, reports and the demonstration."""
