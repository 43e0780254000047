"""Whole models, the adapter in their weights: streamed to files, and in memory."""
