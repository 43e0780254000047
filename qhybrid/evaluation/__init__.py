"""Evaluation: loss, perplexity and exact match of a base model or an adapter on a data file."""
