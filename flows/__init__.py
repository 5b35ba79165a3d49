"""Order: which task after which, the branch into the case, and the event that data have changed."""
