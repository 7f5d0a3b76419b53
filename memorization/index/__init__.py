"""A local index of training pictures."""
