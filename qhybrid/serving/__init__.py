"""Generation and serving: one base model in memory, many adapters by name."""
