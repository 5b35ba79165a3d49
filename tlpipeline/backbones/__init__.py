"""Pretrained networks: the catalogue, their taps, and the features that are read at them."""
