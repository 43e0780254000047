"""Run folders without a training, and what a page says, for the tests of `qhybrid report`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from helpers import make_recipe, tiny_layout

from qhybrid.architecture.layout import Layout
from qhybrid.data.audit import Audit, SourceAudit
from qhybrid.data.formats import SourceFormat
from qhybrid.recipe.load import dump_recipe
from qhybrid.report.samples import Sample, Samples
from qhybrid.training.run import versions

STEPS = 20
MIDDLE_LAYERS = (2, 3)  # of the tiny layout: AdaLoRA's


def events_of_a_run(layout: Layout) -> list[dict[str, Any]]:
    """The log of a run of 20 steps: allocations of an AdaLoRA band, evaluations, spectra and importance."""
    adaptive = [row.module for row in layout.of_kind("adalora")]
    found: list[dict[str, Any]] = [
        {"event": "adalora_schedule", "band": "mid", "total_steps": STEPS, "warmup_steps": 2, "final_steps": 6,
         "interval": 4, "init_budget": 6 * len(adaptive), "target_budget": 3 * len(adaptive)},
        {"event": "begin", "step": 0, "total_steps": STEPS},
    ]  # fmt: skip
    for step in range(1, STEPS + 1):
        rates = {"lora.A": 1e-3 / step, "lora.B×4": 4e-3 / step, "dora.magnitude": 1e-3 / step}
        found.append(
            {"event": "step", "step": step, "loss": 3.0 / step, "grad_norm": 1.0 + step / 10, "tokens": 100 + step,
             "learning_rates": rates, "seconds": 0.5, "memory": {"process_bytes": 2**30 + step}}
        )  # fmt: skip
        if step % 10 == 0:
            found.append({"event": "evaluation", "step": step, "eval_loss": 2.5 / step, "eval_runtime": 1.0})
            found.append({"event": "spectra", "step": step, "modules": spectra_of(layout, step)})
            weights = {row.module: float(i + 1) for i, row in enumerate(layout)}
            found.append({"event": "importance", "step": step, "modules": weights})
        if step in (4, 8):
            live = {module: 5 if step == 4 else 1 + i % 6 for i, module in enumerate(adaptive)}
            found.append(
                {
                    "event": "allocation",
                    "step": step,
                    "band": "mid",
                    "budget": sum(live.values()),
                    "live_ranks": live,
                }
            )
    return found


def spectra_of(layout: Layout, step: int) -> dict[str, Any]:
    """Spectra that halve from value to value, of a size that grows with the step."""
    found = {}
    for i, row in enumerate(layout):
        values = [step * (i + 1) * 0.5**k for k in range(row.rank)]
        found[row.module] = {
            "rank": row.rank,
            "live_rank": row.rank,
            "norm": sum(value**2 for value in values) ** 0.5,
            "largest": values[0],
            "energy_rank_90": 2,
            "energy_rank_99": min(row.rank, 4),
            "stable_rank": 1.3,
            "effective_rank": 2.5,
            "singular_values": values,
        }
    return found


def write_run(folder: Path, **changes: Any) -> Path:
    """A finished run of three bands on the tiny model, as `qhybrid sft` leaves it, but without an adapter.

    Args:
        changes: run.json's fields; or `events`, `audit`, `plan`, `layout`, `recipe`: other content of these files,
            None for no such file.
    """
    folder.mkdir(parents=True)
    layout = changes.pop("layout", tiny_layout())
    content: dict[str, Any] = {
        "recipe": dump_recipe(make_recipe(output_dir=str(folder))),
        "audit": audit_of(["train.jsonl"]),
        "plan": plan_of(layout) if isinstance(layout, Layout) else None,
        "events": events_of_a_run(layout) if isinstance(layout, Layout) else [],
    }
    content |= {name: changes.pop(name) for name in list(changes) if name in content}
    if layout is not None:
        (folder / "layout.json").write_text(layout.to_json() if isinstance(layout, Layout) else layout)
    if content["recipe"] is not None:
        (folder / "recipe.yaml").write_text(content["recipe"])
    for name in ("audit", "plan"):
        if content[name] is not None:
            (folder / f"{name}.json").write_text(json.dumps(content[name]))
    if content["events"] is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in content["events"]))
    figures = {"eval_loss": 0.125, "seconds": 90.0, "peak_process_bytes": 3 * 2**30}
    status = {"format_version": 1, "status": "finished", "versions": versions(), "process": {}, "figures": figures}
    (folder / "run.json").write_text(json.dumps({**status, **changes}))
    return folder


def audit_of(paths: list[str]) -> dict[str, Any]:
    """An audit of sources of ten rows, two of them dropped."""
    sources = []
    for path in paths:
        source = SourceAudit(
            path, "line", SourceFormat("alpaca", {}, found=True), untouched=8, used_rows=8, share=1.0
        )
        source.drop(3, "invalid JSON")
        source.drop(7, "no assistant turn")
        source.tokens, source.trained_tokens, source.longest_tokens = 800, 200, 120
        sources.append(source)
    return Audit(train=sources, eval=[], train_rows=8, eval_rows=0, warnings=["a word of warning"]).to_dict()


def plan_of(layout: Layout) -> dict[str, Any]:
    """A plan of 2.5 GiB for this data and of 4 GiB for the longest rows."""
    gib = 2**30
    expected: dict[str, Any] = {
        "device": "cpu", "needed_bytes": 5 * gib // 2, "allocated_bytes": gib, "reserved_bytes": gib,
        "host_bytes": 5 * gib // 2, "download_bytes": 2_000_000, "budget_bytes": None, "peak_moment": "backward",
        "num_trained_parameters": layout.num_parameters, "rank_caps": [],
        "components": {"activations": gib, "loss": gib, "adapters: low": gib // 4, "adapters: high": gib // 4},
        "moments": {"forward": gib // 2, "backward": gib},
    }  # fmt: skip
    return {**expected, "needed_bytes": 4 * gib, "host_bytes": 4 * gib, "for_this_data": expected}


def grown(layout: Layout, band: str, rank: int) -> Layout:
    """The layout with another rank for a band."""
    rows = (dataclasses.replace(r, rank=rank, target_rank=rank) if r.band == band else r for r in layout)
    return Layout(tuple(rows))


class PageText(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._pieces: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)

    @property
    def text(self) -> str:
        """All text, with single blanks."""
        return re.sub(r"\s+", " ", " ".join(self._pieces))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


def require_self_contained(page: str) -> None:
    """Nothing in a page leads out of it: no address, no file, no second script or style."""
    parsed = PageText(page)
    assert {tag for tag, _ in parsed.elements}.isdisjoint(
        {
            "img",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "audio",
            "video",
            "image",
            "use",
            "foreignobject",
        }
    )
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "style", "action", "xlink:href"), (tag, name)
            assert name != "href" or (value or "").startswith("#"), (tag, value)
    assert len(parsed.of("script")) == len(parsed.of("style")) == 1
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def write_samples(run: Path, *samples: Sample, adapter: bytes = b"tensors") -> None:
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter.safetensors").write_bytes(adapter)
    digest = hashlib.sha256(b"tensors").hexdigest()
    content = Samples(format_version=1, adapter_sha256=digest, max_new_tokens=9, samples=list(samples))
    (run / "samples.json").write_text(json.dumps(content.model_dump()))


def sample(**changes) -> Sample:
    given = {"prompt": "say it", "expected": "yes\n", "base": "no", "adapter": "yes", "base_is_cut_off": True,
             "adapter_is_cut_off": False}  # fmt: skip
    return Sample(**{**given, **changes})
