"""Images: read, listed, split, decoded, augmented, cached."""
