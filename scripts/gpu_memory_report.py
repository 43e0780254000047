"""The lines that gpu_memory.py gathers, and the report made of them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from gpu_memory_cases import case_names, edge_names

ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 2**20, 2**30
WITHIN_ALLOCATED, WITHIN_RESERVED = 0.03, 0.06
INK, GRID, ACCENT, SECOND = "#1f2933", "#d9dee3", "#1f6feb", "#d1480f"

Line = dict[str, Any]


class Results:
    """The lines of the JSONL file. A later line of the same kind, recipe and cap replaces an earlier one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.lines: dict[tuple[str, str, int | None], Line] = {}
        for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                line = json.loads(text)
            except ValueError:  # cut off when the machine was taken back
                continue
            self.lines[self._key(line)] = line

    @staticmethod
    def _key(line: Line) -> tuple[str, str, int | None]:
        return line["kind"], line["recipe"], line.get("cap_mib")

    def add(self, line: Line) -> None:
        """Keep a line, and write it out at once."""
        self.lines[self._key(line)] = line
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps(line))  # a line that was cut off before ends here

    def get(self, kind: str, recipe: str, cap: int | None = None) -> Line | None:
        """The line, unless there is none or its run failed."""
        line = self.lines.get((kind, recipe, cap))
        return line if line is not None and line["status"] != "failed" else None

    def of(self, kind: str) -> list[Line]:
        """All lines of one kind, in the order in which they came."""
        return [line for line in self.lines.values() if line["kind"] == kind]


def edge_bounds(results: Results, recipe: str) -> tuple[int, int] | None:
    """MiB that do not suffice and MiB that do, as the tries so far tell; None where nothing was measured."""
    free = results.get("measured", recipe)
    if free is None or free["status"] != "ok":
        return None
    # Less than the tensors take is not enough, and what the allocator took with no limit is.
    low = free["max_memory_allocated"] // MIB - 1
    high = -(-free["max_memory_reserved"] // MIB)
    for line in results.of("try"):
        if line["recipe"] == recipe and line["status"] == "ok":
            high = min(high, line["cap_mib"])
        elif line["recipe"] == recipe and line["status"] == "oom":
            low = max(low, line["cap_mib"])
    return low, high


def write_report(file: Path, folder: Path | None) -> None:
    """The table and the picture. Lines of a dry run make a report only where a folder for it is named."""
    results = Results(file)
    measured = results.of("measured")
    devices = {line["device"] for line in measured if line["status"] == "ok"}
    if "cuda" not in devices and (folder is None or not devices):
        sys.exit(f"not measured: {file} holds no run on a GPU")
    device = "cuda" if "cuda" in devices else "cpu"
    measured = [line for line in measured if line["device"] == device and line["status"] != "failed"]
    simulated = {line["recipe"]: line for line in results.of("simulated") if line["device"] == device}
    docs = folder or ROOT / "docs"
    text, picture = docs / "data" / "gpu_memory.md", docs / "images" / "gpu_memory.png"
    for path in (text, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    passed = [line for line in measured if line["status"] == "ok"]
    names = case_names(device)
    unmeasured = len(set(names) - {line["recipe"] for line in measured})
    parts = [_heading(results, device), _table(measured, simulated)]
    parts.append(f"{unmeasured} of {len(names)} recipes are not measured, or failed." if unmeasured else "")
    parts += [_summary(measured, simulated), _workspaces(passed, results), _edges(results, device)]
    text.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    draw(passed, simulated, picture)
    print(f"wrote {text} and {picture}")


def _heading(results: Results, device: str) -> str:
    found = []
    for line in results.of("machine"):
        versions = ", ".join(f"{name} {value}" for name, value in line["versions"].items())
        gpu = "no GPU"
        if line.get("gpu"):
            gpu = f"{line['gpu']}, {line['total'] / GIB:.1f} GiB, driver {line['driver']}, CUDA {line['cuda']}"
        found.append(f"{gpu}; Python {line['python']}, {versions}.")
    first = "### Predicted and measured GPU memory: `scripts/gpu_memory.py`"
    if device == "cpu":
        first = (
            "### Dry run on a CPU: this is not GPU memory\n"
            "Allocated is the bytes of tensors by torch's profiler, reserved the process's resident memory."
        )
    return "\n".join([first, *found])


def _simulated(line: Line, simulated: dict[str, Line], key: str = "simulated_allocated") -> int | None:
    """cuBLAS' workspace comes from the same allocator, and the simulation leaves it out."""
    other = simulated.get(line["recipe"], {}).get(key)
    return None if other is None else other + line["predicted_workspace"]


def _table(measured: list[Line], simulated: dict[str, Line]) -> str:
    rows = [
        "GiB (2³⁰ bytes). A ratio is predicted over measured. The context is what the driver had given out before "
        "the first tensor; after the arrow stands all that lay outside torch's allocator after a step.\n",
        "| recipe | predicted | simulated | measured allocated | ratio | predicted reserved | measured reserved "
        "| ratio | context | s a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in measured:
        other = _simulated(line, simulated)
        start = f"| {line['recipe']} | {_gib(line.get('predicted_allocated'))} | {_gib(other)} "
        if line["status"] != "ok":
            what = "out of memory" if line["status"] == "oom" else line["status"]
            rows.append(f"{start}| {what} | | {_gib(line.get('predicted_reserved'))} | | | | |")
            continue
        context = _gib(line["context"]) + (f" → {_gib(line['outside_allocator'])}" if line["context"] else "")
        rows.append(
            f"{start}| {_gib(line['max_memory_allocated'])} | {_ratio(line, 'allocated'):.4f} "
            f"| {_gib(line['predicted_reserved'])} | {_gib(line['max_memory_reserved'])} "
            f"| {_ratio(line, 'reserved'):.4f} | {context} | {line['seconds_per_step']:.2f} |"
        )
    return "\n".join(rows)


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def _ratio(line: Line, what: str) -> float:
    return line[f"predicted_{what}"] / line[f"max_memory_{what}"]


def _summary(measured: list[Line], simulated: dict[str, Line]) -> str:
    passed = [line for line in measured if line["status"] == "ok"]
    ratios: dict[tuple[str, str], list[float]] = {
        ("predicted", what): [_ratio(line, what) for line in passed] for what in ("allocated", "reserved")
    }
    for what in ("allocated", "reserved"):
        known = [(line, _simulated(line, simulated, f"simulated_{what}")) for line in passed]
        ratios["simulated", what] = [size / line[f"max_memory_{what}"] for line, size in known if size is not None]
    rows = []
    for (source, what), values in ratios.items():
        if not values:
            continue
        limit = WITHIN_ALLOCATED if what == "allocated" else WITHIN_RESERVED
        within = sum(abs(value - 1) <= limit for value in values)
        lowest = min(values)
        worst = f"{1 - lowest:.1%} under" if lowest < 1 else "never under"
        rows.append(
            f"- {source} {what}: {within} of {len(values)} ({within / len(values):.0%}) within {limit:.0%}; "
            f"worst under-prediction: {worst}; ratios from {lowest:.4f} to {max(values):.4f}"
        )
    short = [line for line in measured if line["status"] == "oom"]
    judged = [line for line in (*passed, *short) if line.get("fits") is not None]
    if judged:
        right = sum(line["fits"] == (line["status"] == "ok") for line in judged)
        rows.append(f"- out of memory: {len(short)}; the plan's verdict was right for {right} of {len(judged)}")
    return "\n".join(rows)


def _workspaces(passed: list[Line], results: Results) -> str:
    sizes = sorted({line["workspace"] / MIB for line in passed if "workspace" in line})
    if not sizes:
        return ""
    machines = [line for line in results.of("machine") if line.get("gpu")]
    alone = "; ".join(
        f"a first product leaves {m['workspace'] / MIB:.3f} MiB, a first backward pass "
        f"{m['workspace_backward'] / MIB:.3f} MiB"
        for m in machines
    )
    assumed = sorted({line["predicted_workspace"] / MIB for line in passed})
    return (
        f"cuBLAS' workspaces: {', '.join(f'{size:.3f}' for size in sizes)} MiB at the end of a run, "
        f"{', '.join(f'{size:.3f}' for size in assumed)} MiB assumed ({alone})."
    )


def _edges(results: Results, device: str) -> str:
    rows = []
    for recipe in edge_names(device):
        bounds = edge_bounds(results, recipe)
        if bounds is None or not any(line["recipe"] == recipe for line in results.of("try")):
            continue
        free = results.lines["measured", recipe, None]
        outside = free.get("outside_allocator", 0)
        needed = bounds[1] * MIB + outside
        rows.append(
            f"| {recipe} | {bounds[0]} | {bounds[1]} | {free['max_memory_allocated'] / MIB:.0f} "
            f"| {free['predicted_reserved'] / MIB:.0f} | {outside / MIB:.0f} | {needed / MIB:.0f} "
            f"| {free['predicted_needed'] / MIB:.0f} | {free['predicted_needed'] / needed:.4f} |"
        )
    if not rows:
        return ""
    return "\n".join(
        [
            "The edge, in MiB: caps of torch's allocator at which the steps ran out of memory, and passed. Needed "
            "is the cap that passed, and what lay outside the allocator.\n",
            "| recipe | fails at | passes at | measured allocated | predicted reserved | outside | needed "
            "| predicted needed | ratio |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def draw(passed: list[Line], simulated: dict[str, Line], picture: Path) -> None:
    """Predicted over measured allocated memory, with lines at ±3%; and the ratios, where 3% can be seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": INK, "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    series = {"closed form": (ACCENT, "o", [(line, line["predicted_allocated"]) for line in passed])}
    others = [(line, size) for line in passed if (size := _simulated(line, simulated)) is not None]
    if others:
        series["simulated step"] = (SECOND, "x", others)
    for label, (color, marker, points) in series.items():
        x = [line["max_memory_allocated"] / GIB for line, _ in points]
        y = [size / GIB for _, size in points]
        left.scatter(x, y, s=22, color=color, marker=marker, label=label, linewidths=1)
        right.scatter(
            x, [b / a for a, b in zip(x, y, strict=True)], s=22, color=color, marker=marker, linewidths=1
        )
    measured = [line["max_memory_allocated"] / GIB for line in passed]
    ends = [0.8 * min(measured), 1.25 * max(measured)]
    for factor, style in ((1.0, "-"), (1 - WITHIN_ALLOCATED, "--"), (1 + WITHIN_ALLOCATED, "--")):
        left.plot(ends, [factor * end for end in ends], style, color=INK, linewidth=0.7)
        right.axhline(factor, linestyle=style, color=INK, linewidth=0.7)
    left.set(xscale="log", yscale="log", xlabel="measured, GiB", ylabel="predicted, GiB")
    right.set(xscale="log", xlabel="measured, GiB", ylabel="predicted / measured")
    left.legend(frameon=False)
    left.set_title("Peak of allocated memory, lines at ±3%", fontsize=10, loc="left", weight="bold")
    gpus = sorted({line["gpu"] or "dry run on a CPU: not GPU memory" for line in passed})
    right.set_title(", ".join(gpus), fontsize=10, loc="left", weight="bold")
    ticks = [2.0**power for power in range(math.floor(math.log2(ends[0])), math.ceil(math.log2(ends[1])) + 1)]
    labels = [f"{tick:g}" for tick in ticks]
    left.set_yticks(ticks, labels)
    left.set_ylim(ends)
    for axes in (left, right):
        axes.set_xticks(ticks, labels)
        axes.set_xlim(ends)
        axes.minorticks_off()
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(picture, dpi=160)
