"""Recipes: what the user asks for, frozen and validated. Imports no torch."""
