"""Resilience: one call into the library each, with run names, retries where a second try can succeed, and artifacts for the Prefect UI."""
