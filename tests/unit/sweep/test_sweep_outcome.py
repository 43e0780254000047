"""What an outcome takes from the log of a run that was interrupted."""

from __future__ import annotations

import json

import pytest

from qhybrid.sweep.outcome import outcome_of
from qhybrid.training.run import Run


def outcome(folder, *events):
    lines = [json.dumps({"event": event, "time": time, **facts}) for event, time, facts in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    return outcome_of(Run(folder), "pruned", process_seconds=50.0)


def test_ranks_from_data_take_the_time_of_the_search_that_ended(tmp_path):
    """Not the night between a search that was killed and the one that found them."""
    first, second = {"number": 1, "total": 2}, {"number": 2, "total": 2}
    found = outcome(
        tmp_path,
        ("ranks_pass", 100.0, first),
        ("ranks_pass", 40_000.0, first),
        ("ranks_pass", 40_003.0, second),
        ("ranks", 40_007.0, {}),
        ("begin", 40_008.0, {"step": 0, "total_steps": 4}),
        ("step", 40_010.0, {"step": 1, "seconds": 2.0}),
    )
    assert found.seconds == pytest.approx(9.0) and found.other_seconds == pytest.approx(41.0)


def test_a_search_that_never_ended_takes_no_time_of_the_run(tmp_path):
    found = outcome(tmp_path, ("ranks_pass", 100.0, {"number": 1, "total": 2}))
    assert found.seconds == 0 and found.total_steps == 0
