"""Seconds until the command line answers: `python -m benchmarks startup`.

Wall time of fresh processes, in turns: an empty Python, Python that imports torch, `train.py --help`, `train.py
dry_run=true` on the embedded data (written to its cache before).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

from benchmarks.measure import ROOT, command, environment, markdown, publish

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    'python -c "import torch"': ["-c", "import torch"],
    "python train.py --help": ["train.py", "--help"],
    "python train.py dry_run=true": ["train.py", "dry_run=true"],
}


def seconds(arguments: list[str], folder: str) -> float:
    """Wall time of one process. Raises RuntimeError with its last line when it fails."""
    extra = [f"hydra.run.dir={folder}"] if "dry_run=true" in arguments else []
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments, *extra], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return time.perf_counter() - started


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks startup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-store", action="store_true", help="print the table only")
    chosen = parser.parse_args(options)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for arguments in COMMANDS.values():
            seconds(arguments, folder)
        for _ in range(chosen.rounds):
            for name, arguments in COMMANDS.items():
                taken[name].append(seconds(arguments, folder))
    medians = {name: round(median(values), 2) for name, values in taken.items()}
    result = environment(("torch", "hydra-core", "omegaconf"))
    result |= {"command": command("startup", options), "seconds": medians}
    rows = [[f"`{name}`", f"{value:.2f}"] for name, value in medians.items()]
    publish("startup", result, markdown(["command", "seconds"], rows), store=not chosen.no_store)
