"""The stage check: what is wrong with the data."""
