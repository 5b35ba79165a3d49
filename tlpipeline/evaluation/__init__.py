"""Metrics of a model, and the gate between it and the model in production."""
