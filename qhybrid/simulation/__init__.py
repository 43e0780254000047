"""One training step on torch's meta device: the memory it takes, without weights and without a GPU."""
