"""Imported by the one process that a sweep's processes are forked from: all that each of them would import.

What is imported stays for good, so the garbage collector need not look at it again in every run.
"""

from __future__ import annotations

import contextlib
import gc

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401 - accelerate imports it, where installed, for every trainer

import qhybrid.sweep.worker  # noqa: F401

gc.collect()
gc.freeze()
