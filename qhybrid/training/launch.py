"""Starts the processes of a distributed run, through torch.distributed.run's own API, and waits for them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import psutil

LAUNCHED = "QHYBRID_LAUNCHED"  # set in the processes that `launch` starts
_SECONDS_TO_SAVE = 120  # after a signal: for the step under way and a checkpoint


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `qhybrid ARGUMENTS` in several processes on this machine; process 0 prints, the others are silent.

    A signal goes to all of them, and they have two minutes to save.

    Returns:
        The exit code: 0, or that of the process that failed first; 128 + the number for one that a signal killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It reports failures as a table of its own, with tracebacks; the process has said what happened.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (psutil.cpu_count(logical=False) or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="qhybrid",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=_SECONDS_TO_SAVE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "qhybrid.cli.main", *arguments)
    except ChildFailedError as error:
        first = min(error.failures.items(), key=lambda item: item[1].timestamp)[1]
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
