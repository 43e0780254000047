"""How long `qhybrid plan` takes, as a whole process, beside a process that only imports torch.

    python scripts/bench_plan.py [--rounds 10]

The two take turns, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

MAIN = "import sys; from qhybrid.cli.main import main; main(sys.argv[1:])"
COMMANDS = {
    "plan, Llama-2-70B on 80 GiB, with advice": [
        sys.executable, "-c", MAIN, "plan", "--model", "llama-2-70b", "--vram", "80GiB",
    ],
    "plan, Llama-2-7B recipe on 5 GiB, with advice": [
        sys.executable, "-c", MAIN, "plan", "llama2_7b_instruct", "--vram", "5GiB",
    ],
    "plan, Llama-2-70B, without a limit": [sys.executable, "-c", MAIN, "plan", "--model", "llama-2-70b"],
    "import torch": [sys.executable, "-c", "import torch"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - began)
    reference = seconds["import torch"]
    print("| process | median seconds | of `import torch` |")
    print("|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(values, reference, strict=True))
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
