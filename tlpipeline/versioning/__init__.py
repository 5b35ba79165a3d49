"""Git, DVC and the lock of a workspace."""
