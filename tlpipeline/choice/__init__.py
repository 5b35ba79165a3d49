"""Choosing one of the four cases of transfer learning."""
