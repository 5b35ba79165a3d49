"""A workspace: its files, its stages, and what a run does."""
