"""Adapters made of adapters, several into one or one at lower rank, and what is in them."""
