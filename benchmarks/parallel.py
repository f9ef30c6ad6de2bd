"""Context parallelism on this machine: `python -m benchmarks parallel`.

bytes: what a rank sends in a training step, counted at the collectives, against the minimum of the reshard around
temporal attention. reshard: its round trip against raw all-to-alls of the same bytes, as ratios within one run. pieces:
the same attention with trainer.reshard_pieces of 1, 2 and 4. steps: a training step of HealDA v2 with observations on
1, 2, 4 and 8 ranks, which share the cores of this machine. start: seconds until eight ranks have joined. Times are wall
times of the slowest rank, medians; cases take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch

from benchmarks import parallel_work as work
from benchmarks.costs import gradient_bytes, reshard_bytes
from benchmarks.measure import ROOT, command, environment, markdown, merged, publish, ratio
from models.composition import compose
from training.launch import launch
from training.ranks import Mesh
from training.run import build_data, build_task

TRAINER = SimpleNamespace(device="cpu", timeout=600.0)
MODEL = ["model=healda_v2", "task.frames=8", "model.drop_path=0.0", "data.level=4"]
KINDS = {  # what a rank does differently: keyword arguments of TrainingStep
    "float32": {},
    "bf16": {"sixteen_bit": True},
    "float32, 4 pieces": {"options": {"pieces": 4}},
    "float32, dtensor": {"options": {"kind": "dtensor"}},
}
SHAPES = {"small": (1, 8, 768, 128), "large": (1, 8, 3072, 256)}  # B, T, X, D
PIECES = (1, 2, 4)


def situation(size: str):
    """(configuration, task, one batch) of HealDA v2 on the simulated network."""
    config = compose([*MODEL, f"model/size={size}"])
    config.optimizer.lr = 1e-4
    data, task = build_data(config), build_task(config)
    dataset = task.dataset(data, "train", task.fit(data))
    return config, task, dataset.__getitems__([0])


def on_ranks(function: Callable, *arguments, cp: int):
    return launch(function, *arguments, mesh=Mesh(cp=cp), trainer=TRAINER)


def bytes_rows(given, ranks: tuple[int, ...]) -> list[dict]:
    rows = []
    for cp in ranks:
        for kind, found in on_ranks(work.counted, *given, KINDS, cp=cp).items():
            tokens = found["samples"] * given[2].layout.frames // cp * found["places"]
            minimum = reshard_bytes(
                ranks=cp,
                blocks=found["blocks"],
                tokens=tokens,
                hidden_size=found["hidden_size"],
                itemsize=2 if kind == "bf16" else 4,
                backward=True,
            )
            gradients = gradient_bytes(found["parameters"], ranks=cp)
            rows.append({"part": "bytes", "case": kind, "cp": cp, "minimum": minimum, "gradients": gradients} | found)
    return rows


def reshard_rows(ranks: tuple[int, ...], rounds: int) -> list[dict]:
    rows = []
    for cp in ranks:
        for case, shape in SHAPES.items():
            for mode, seconds in on_ranks(work.timed_reshards, shape, rounds, cp=cp).items():
                ratios = {name: round(ratio(values, seconds["raw"]), 3) for name, values in seconds.items()}
                row = {"part": "reshard", "case": f"{case}, {mode}", "cp": cp, "shape": shape, "ratios": ratios}
                rows.append(row | {"seconds": {name: round(median(values), 5) for name, values in seconds.items()}})
    return rows


def pieces_rows(ranks: tuple[int, ...], rounds: int) -> list[dict]:
    rows = []
    for cp in ranks:
        for case, shape in SHAPES.items():
            seconds = on_ranks(work.timed_pieces, shape, PIECES, rounds, cp=cp)
            ratios = {str(number): round(ratio(values, seconds[1]), 3) for number, values in seconds.items()}
            row = {"part": "pieces", "case": case, "cp": cp, "shape": shape, "ratios": ratios}
            rows.append(row | {"seconds": {str(number): round(median(v), 5) for number, v in seconds.items()}})
    return rows


def steps_rows(given, size: str, ranks: tuple[int, ...], *, rounds: int, steps: int) -> list[dict]:
    """Raises RuntimeError where ranks change the loss."""
    found: dict[int, list[dict]] = {cp: [] for cp in ranks}
    for _ in range(rounds):
        for cp in ranks:
            found[cp].append(on_ranks(work.timed_steps, *given, steps, cp=cp))
    alone = found[ranks[0]]
    rows = []
    for cp, measured in found.items():
        if abs(measured[0]["loss"] / alone[0]["loss"] - 1) > 1e-5:
            raise RuntimeError(f"cp={cp} has the loss {measured[0]['loss']}, cp={ranks[0]} {alone[0]['loss']}")
        row = {"part": "steps", "case": size, "cp": cp, "loss": measured[0]["loss"]}
        for kind in ("wall", "cpu"):
            taken = [median(one[kind]) for one in measured]
            row[kind] = round(median(taken), 3)
            row[f"{kind}_ratio"] = round(ratio(taken, [median(one[kind]) for one in alone]), 2)
        rows.append(row)
    return rows


def start_row(cp: int, rounds: int) -> dict:
    """Of fresh processes: from `launch` to the last rank, and from the start of Python."""
    code = f"from benchmarks.parallel import start; start({cp})"
    joined, whole = [], []
    for _ in range(rounds):
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True
        )
        called, ready = map(float, done.stdout.split()[-2:])
        joined.append(ready - called)
        whole.append(ready - started)
    return {"part": "start", "case": "joined", "cp": cp, "seconds": round(median(joined), 2)} | {
        "from_python": round(median(whole), 2),
        "slowest": round(max(joined), 2),
    }


def start(cp: int) -> None:
    """Prints when the ranks were asked for and when all had joined."""
    called = time.time()
    print(called, on_ranks(work.joined_at, cp=cp))


def table(rows: list[dict]) -> str:
    made = {part: [row for row in rows if row["part"] == part] for part in TITLES}
    return "\n\n".join(f"{TITLES[part]}\n\n{TABLES[part](found)}" for part, found in made.items() if found)


def _bytes_table(rows: list[dict]) -> str:
    header = [
        "cp",
        "step in",
        "reshard sends, bytes",
        "minimum",
        "ratio",
        "gradients and sums send, bytes",
        "gradients alone",
    ]
    lines = [
        [
            str(row["cp"]),
            row["case"],
            f"{row['sent']:,}",
            f"{row['minimum']:,}",
            f"{row['sent'] / row['minimum']:.2f}",
            f"{row['reduced']:,}",
            f"{row['gradients']:,}",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def _reshard_table(rows: list[dict]) -> str:
    header = ["cp", "message", "raw all-to-all, ms", "all_to_all / raw", "dtensor / raw"]
    lines = [
        [str(row["cp"]), row["case"], f"{1e3 * row['seconds']['raw']:.2f}"]
        + [f"{row['ratios'][name]:.2f}" for name in ("all_to_all", "dtensor")]
        for row in rows
    ]
    return markdown(header, lines)


def _pieces_table(rows: list[dict]) -> str:
    header = ["cp", "message", "1 piece, ms", *(f"{number} pieces / 1 piece" for number in PIECES[1:])]
    lines = [
        [str(row["cp"]), row["case"], f"{1e3 * row['seconds']['1']:.1f}"]
        + [f"{row['ratios'][str(number)]:.2f}" for number in PIECES[1:]]
        for row in rows
    ]
    return markdown(header, lines)


def _steps_table(rows: list[dict]) -> str:
    header = ["size", "cp", "wall, s", "against cp=1", "CPU s of all ranks", "against cp=1", "load of the machine"]
    lines = [
        [
            row["case"],
            str(row["cp"]),
            f"{row['wall']:.2f}",
            f"{row['wall_ratio']:.2f}",
            f"{row['cpu']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            str(row["load_average"][0]),
        ]
        for row in rows
    ]
    return markdown(header, lines)


def _start_table(rows: list[dict]) -> str:
    lines = [
        [
            str(row["cp"]),
            *(f"{row[key]:.1f}" for key in ("seconds", "slowest", "from_python")),
            str(row["load_average"][0]),
        ]
        for row in rows
    ]
    header = [
        "ranks",
        "all joined, s",
        "slowest of the starts, s",
        "from the start of Python, s",
        "load of the machine",
    ]
    return markdown(header, lines)


TITLES = {
    "bytes": "Bytes that a rank sends in a training step (HealDA v2 tiny, one sample of 8 frames):",
    "reshard": "Round trip of the reshard, float32, against raw collectives of the same bytes:",
    "pieces": "Temporal attention with `trainer.reshard_pieces`, forward and backward:",
    "steps": "A training step of HealDA v2 with its observations, one sample of 8 frames:",
    "start": "Start of the ranks, fresh processes:",
}
TABLES = {
    "bytes": _bytes_table,
    "reshard": _reshard_table,
    "pieces": _pieces_table,
    "steps": _steps_table,
    "start": _start_table,
}


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks parallel", description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15, help="of reshards and pieces; a fifth of it elsewhere")
    parser.add_argument("--size", choices=("tiny", "small"), default="small", help="of the model that is stepped")
    parser.add_argument("--no-store", action="store_true", help="print the tables of this run only")
    chosen = parser.parse_args(options)
    ranks, rounds, few = tuple(chosen.ranks), chosen.rounds, max(1, chosen.rounds // 5)
    measures = {
        "bytes": lambda: bytes_rows(situation("tiny"), ranks),
        "reshard": lambda: reshard_rows(ranks, rounds),
        "pieces": lambda: pieces_rows(ranks, rounds),
        "steps": lambda: steps_rows(situation(chosen.size), chosen.size, (1, *ranks), rounds=few, steps=3),
        "start": lambda: [start_row(max(ranks), few)],
    }
    result = environment(("torch",))
    result |= {"command": command("parallel", options), "threads": torch.get_num_threads()}
    rows = [row for part in chosen.parts for row in measures[part]()]
    result["rows"] = [row | {key: result[key] for key in ("date", "command", "load_average")} for row in rows]
    if not chosen.no_store:
        result = merged("parallel", result, key=("part", "case", "cp"))
    publish("parallel", result, table(result["rows"]), store=not chosen.no_store)
