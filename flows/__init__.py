"""The Prefect flow: the order of the tasks, and the event that reports changed data."""
