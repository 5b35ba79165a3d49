"""Registered versions of models, and predictions with them."""
