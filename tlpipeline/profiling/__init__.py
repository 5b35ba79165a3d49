"""Measuring a data set against a pretrained network."""
