"""The powerinfer library: checkpoint → activations → predictors → placement → artifact → engine → tokens."""

__version__ = "0.1.0"
