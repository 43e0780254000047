"""Adapters combined, compressed, merged and written for other programs, with proof that they are right."""
