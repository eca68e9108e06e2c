"""The demos: data sets, tiny models and pipelines of `make demo` and `make demo-grounding`."""
