"""Sweeps: many runs that differ in one thing, held against a control at equal parameters."""
