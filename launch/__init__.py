"""Where experiments run: the bootstrap script `run`, and what starts many runs at once."""
