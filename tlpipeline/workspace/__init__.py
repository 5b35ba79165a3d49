"""A workspace: its files, settings and stages, and the steps of a run."""
