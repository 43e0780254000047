"""qhybrid: layer-banded adapters on 4-bit LLaMA-class models."""

__version__ = "0.1.0"
