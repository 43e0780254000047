"""What a run will cost on given hardware, and what fits. Imports no torch."""
