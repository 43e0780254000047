"""Callbacks around the trainer, one concern a file."""
