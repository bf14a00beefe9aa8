"""Tasks: a data set reader, a model head and a metric; one file each."""
