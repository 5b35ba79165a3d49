"""Pretrained networks: the catalogue, their taps, and the features at these taps."""
