"""Training: one run folder, trl's trainer with banded adapters, and the callbacks around it."""
