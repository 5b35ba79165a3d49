"""Training: the head, fine-tuning, checkpoints, and many workers."""
