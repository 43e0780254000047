"""Ranks and initial values that training data decides, before training starts."""
