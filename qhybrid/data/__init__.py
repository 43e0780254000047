"""Data: from the recipe's data section to tokenised rows, with an account of every row."""
