"""Adapters of several kinds on one quantised model: building, training, saving and converting them."""
