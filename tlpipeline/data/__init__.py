"""Images: read, listed, split, decoded, augmented and cached."""
