"""What a model is without its weights, and which adapter every module gets. Imports no torch."""
