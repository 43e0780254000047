"""Data: from the recipe's data section to tokenised rows, with an account of every row."""

from __future__ import annotations

from qhybrid.data.audit import Audit, SourceAudit
from qhybrid.data.prepare import PreparedData, prepare_data

__all__ = ["Audit", "PreparedData", "SourceAudit", "prepare_data"]
