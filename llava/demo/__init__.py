"""The embedded data set, the tiny models and the pipeline of `make demo`."""
