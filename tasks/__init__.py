"""The Prefect tasks: each is one call into the library, with a run name, retries and artifacts."""
