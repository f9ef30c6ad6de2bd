"""Kernels of `kernels/` beside PhysicsNeMo's and the floor of the device: `python -m benchmarks kernels`.

On a CUDA device at the production shapes of HealDA v2 in bfloat16, on a CPU at reduced ones in float32, where our own
loops are timed too. It needs torch, triton (on a GPU), einops and numpy; PhysicsNeMo is optional: PHYSICSNEMO_PATH
names the folder that holds its unpacked wheel. Before anything is timed, every implementation computes fresh random
inputs at the full shape on memory full of NaN, and a sample of its outputs and gradients is compared with float64.
Floors follow from the copy bandwidth and the matrix rate that the device shows in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import kernel_peer as peer
from benchmarks import measure
from benchmarks.kernel_blocks import block_case, disk_case
from benchmarks.kernel_cases import (
    BOTH,
    GIGA,
    LOOP,
    OURS,
    Case,
    Setting,
    film_case,
    pixel_case,
    sort_case,
    temporal_case,
)
from benchmarks.kernel_norms import head_norm_case, norm_case
from benchmarks.kernel_step import STEP, fitting, layer_costs, step_case
from benchmarks.roofline import Rates, free_bytes, measured_rates, paired_seconds

NAME = "kernels"
TOLERANCES = {torch.bfloat16: 5e-2, torch.float32: 2e-4}  # of the largest number of a tensor
NORMS = ("modulated_norm", "gated", "gated_norm")
NOT_MEASURED = "not measured: no GPU"
LONGEST = 10.0  # seconds that the rounds of a case may take; a slower step is not repeated


def production() -> list[Case]:
    """HealDA v2 on one H200: 8 frames of 12,288 cells, C = 1536; 31 million observations a sample."""
    cells, many = 98_304, 31_000_000
    wide = cells * 64 * 32 * 2
    grid = {"frames": 8, "places": 12_288}
    whole = {**grid, "hidden": 1536, "heads": 16, "queries": 64, "rows": many}
    cases = [
        Case(
            f"pixel attention, {counts}",
            {"cells": cells, "rows": rows, "heads": 64, "groups": 2, "counts": counts},
            pixel_case,
            needs=10 * wide + 700 * rows,
            takes=60,
        )
        for rows in (3_000_000, many)
        for counts in ("uniform", "heavy-tailed")
    ]
    cases += [
        Case("FiLM tokenizer from raw numbers", {"rows": many, "features": count}, film_case, needs=1300 * many)
        for count in (30, 50)
    ]
    cases.append(Case("sort_and_pack", {"cells": cells, "rows": many}, sort_case, needs=120 * many))
    cases += [Case(kernel, {**grid, "hidden": 1536, "kernel": kernel}, norm_case, needs=16 * GIGA) for kernel in NORMS]
    cases.append(Case("head_norm", {**grid, "heads": 16, "width": 96}, head_norm_case, needs=16 * GIGA))
    cases.append(Case("temporal attention", {**grid, "heads": 16, "width": 96}, temporal_case, needs=24 * GIGA))
    blocks = [
        Case(f"VideoDiT block, {mode}", {**whole, "compiled": mode}, block_case, needs=80 * GIGA, takes=seconds)
        for mode, seconds in (("eager", 40), ("compiled", 120))
    ]
    cases += [blocks[0]]
    cases += [
        Case(
            "disk attention, 10.46 degrees",
            {"frames": frames, "level": level, "heads": 16, "width": 96},
            disk_case,
            needs=24 * GIGA,
            takes=40,
        )
        for frames, level in ((8, 5), (1, 6))
    ]
    cases += [
        Case(
            STEP,
            {**whole, "layers": layers, "variables": 74},
            step_case,
            needs=60 * GIGA,
            layer_needs=2.2 * GIGA,
            takes=20 + 2 * layers,
        )
        for layers in (32, 8)
    ]
    cases.append(blocks[1])
    return cases


def reduced() -> list[Case]:
    """Shapes that a CPU computes in seconds."""
    whole = {"frames": 4, "places": 48, "hidden": 128, "heads": 4, "queries": 32, "rows": 1000}
    pixels = {"heads": 64, "groups": 2}
    return [
        *(  # the peer's backward pass grows with the square of the cells: minutes at a thousand
            Case(
                f"pixel attention, {counts}",
                {"cells": cells, "rows": 4 * cells, **pixels, "counts": counts},
                pixel_case,
            )
            for cells, counts in ((1000, "uniform"), (300, "heavy-tailed"))
        ),
        *(
            Case("FiLM tokenizer from raw numbers", {"rows": 100_000, "features": count}, film_case)
            for count in (30, 50)
        ),
        Case("sort_and_pack", {"cells": 3072, "rows": 1_000_000}, sort_case),
        *(Case(kernel, {"frames": 4, "places": 3072, "hidden": 512, "kernel": kernel}, norm_case) for kernel in NORMS),
        Case("head_norm", {"frames": 4, "places": 3072, "heads": 8, "width": 64}, head_norm_case),
        Case("temporal attention", {"frames": 8, "places": 1536, "heads": 4, "width": 32}, temporal_case),
        Case("disk attention, 10.46 degrees", {"frames": 1, "level": 4, "heads": 4, "width": 32}, disk_case),
        Case("VideoDiT block, eager", {**whole, "compiled": "eager"}, block_case),
        *(Case(STEP, {**whole, "layers": layers, "variables": 6}, step_case) for layers in (4, 1)),
    ]


def labelled(shape: dict[str, int | str]) -> str:
    numbers = (f"{value:,} {name}" for name, value in shape.items() if isinstance(value, int))
    return ", ".join(numbers)


def rows_of(case: Case, setting: Setting, rates: Rates, rounds: int, absent: str) -> list[dict]:
    """One row a mode; a single row that says why where the case does not fit, fails or is wrong. A peer that fails is
    left out: it must not cost our numbers, and no case those of the others."""
    free = free_bytes(setting.device)
    case = fitting(case, free)
    row = {"what": case.what, "shape": labelled(case.shape), "mode": BOTH}
    if case.needs > free:
        return [row | {"skipped": f"needs {case.needs / GIGA:.0f} GiB, {free / GIGA:.0f} GiB are free"}]
    try:
        return _measured_rows(case, setting, rates, rounds, absent, row)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if not setting.theirs:
        return [row | {"skipped": f"failed: {reason}"}]
    gc.collect()
    return rows_of(case, replace(setting, theirs=False), rates, rounds, f"failed beside {peer.NAME}: {reason}")


def _measured_rows(case: Case, setting: Setting, rates: Rates, rounds: int, absent: str, row: dict) -> list[dict]:
    made = case.prepare(setting, **case.shape)
    allowed = TOLERANCES[setting.dtype]
    wrong = [name for name, error in made.errors.items() if not error <= allowed]
    row |= {"errors": made.errors, "absent": made.absent or absent, **made.notes}
    if OURS in wrong:
        return [row | {"skipped": f"wrong: error {made.errors[OURS]:.1e} against float64, {allowed:g} allowed"}]
    if wrong:
        row["absent"] = f"{', '.join(wrong)} wrong"
    found = []
    for mode, steps in made.steps.items():
        steps = {name: step for name, step in steps.items() if name not in wrong}
        seconds = paired_seconds(steps, setting.device, rounds=rounds, longest=LONGEST)
        parts = made.floors[mode]
        moved, operations = (sum(part[i] for part in parts) for i in range(2))
        ours, floor = seconds[OURS], rates.floor(parts)
        found.append(
            row
            | {"mode": mode, "seconds": seconds, "bytes": moved, "operations": operations, "floor_s": floor}
            | {"share_copy": moved / ours / rates.copy, "share_matrix": operations / ours / rates.matrix}
            | {"share_floor": floor / ours, "peak_bytes": peaks(steps, setting.device)}
        )
    return found


def peaks(steps: dict, device: torch.device) -> dict[str, int]:
    """Memory that each step adds on a GPU."""
    found = {}
    for name, step in steps.items() if device.type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        found[name] = torch.cuda.max_memory_allocated(device) - before
    return found


@contextlib.contextmanager
def uncompiled(device: torch.device) -> Iterator[None]:
    """PhysicsNeMo compiles its temporal attention whatever one asks; on a CPU that takes half a minute a shape."""
    with torch.compiler.set_stance("force_eager") if device.type == "cpu" else contextlib.nullcontext():
        yield


def table(rows: list[dict]) -> str:
    header = ["kernel", "shape", "mode", "floor GB", "floor TFLOP", "ours, ms", "of copy rate", "of matrix rate"]
    header += ["of floor", "our loop, ms", "peer, ms", "peer / ours", "error, ours / peer", "peak GB, ours / peer"]
    return measure.markdown(header, [_cells(row) for row in rows])


def _cells(row: dict) -> list[str]:
    start = [row["what"], row["shape"], row["mode"]]
    if "seconds" not in row:
        return [*start, *["-"] * 2, row["skipped"], *["-"] * 8]
    seconds, errors = row["seconds"], row["errors"]
    name = next((name for name in seconds if name not in (OURS, LOOP)), peer.NAME)
    ours, theirs, loop = (seconds.get(one) for one in (OURS, name, LOOP))
    numbers = [f"{row['bytes'] / 1e9:.3g}", f"{row['operations'] / 1e12:.3g}", f"{1000 * ours:.3g}"]
    shares = [f"{row[one]:.0%}" for one in ("share_copy", "share_matrix", "share_floor")]
    times = ["-" if value is None else f"{1000 * value:.3g}" for value in (loop, theirs)]
    compared = (row["absent"] or "-") if theirs is None else f"{theirs / ours:.1f}x ({name})"
    shown = " / ".join(f"{errors[one]:.0e}" for one in (OURS, name) if one in errors)
    peak = " / ".join(f"{row['peak_bytes'][one] / 1e9:.1f}" for one in (OURS, name) if one in row["peak_bytes"])
    return [*start, *numbers, *shares, *times, compared, shown or "-", peak or "-"]


def section(kind: str, result: dict | None) -> str:
    """Table of one kind of device, with the commands, the device and the date below it."""
    title = {"cuda": "GPU, production shapes, bfloat16", "cpu": "CPU, reduced shapes, float32"}[kind]
    if result is None:
        cases = production() if kind == "cuda" else reduced()
        missing = [{"what": c.what, "shape": labelled(c.shape), "mode": BOTH, "skipped": NOT_MEASURED} for c in cases]
        return f"{title}:\n\n{table(missing)}"
    rates = f"{result['copy_rate'] / 1e9:.0f} GB/s copied, {result['matrix_rate'] / 1e12:.3g} TFLOP/s in products"
    line = measure.credit(f"{result['device']}, {rates}, {result['threads']} CPU threads", result["rows"])
    parts = [f"{title}:", table(result["rows"]), layer_costs(result["rows"]), line]
    return "\n\n".join(part for part in parts if part)


def publish(result: dict[str, dict]) -> None:
    """Into results/kernels.json and the page. What the same device, versions and threads measured before stays where
    this run has no row of that name and such cases still exist, as does what the other kind of device measured."""
    known = {case.what for case in (*production(), *reduced())}
    stored = measure.stored(NAME)
    for kind, found in result.items():
        before = stored.get(kind, {"rows": []})
        if any(before.get(same) != found[same] for same in ("device", "versions", "threads")):
            before = {"rows": []}
        mine = {row["what"] for row in found["rows"]}  # of any shape: as many layers as fit are not always as many
        kept = [row for row in before["rows"] if row["what"] in known - mine]
        stored[kind] = found | {"rows": sorted(kept + found["rows"], key=_place)}
    measure.publish_devices(NAME, stored, section)


def _place(row: dict) -> int:
    """Of its case in the lists above."""
    known = [(case.what, labelled(case.shape)) for case in (*production(), *reduced())]
    case = row["what"], row["shape"]
    return known.index(case) if case in known else len(known)


def measured(chosen: argparse.Namespace, options: list[str]) -> dict[str, dict]:
    device = torch.device(chosen.device)
    kind, began = device.type, time.monotonic()
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    absent = peer.absent()
    if absent:
        print(f"without the peer: {absent}")
    elif kind == "cuda" and not chosen.peer_tunes_fully:
        peer.tune_shortly()
    rates = measured_rates(device, dtype)
    random = torch.Generator(device).manual_seed(time.time_ns() % 2**31 if chosen.seed is None else chosen.seed)
    setting = Setting(device, dtype, random, theirs=not absent, loops=kind == "cpu")
    versions = ("torch", "triton", "numpy", "einops", "nvidia-physicsnemo")
    result = measure.environment(versions) | {
        "command": measure.command(NAME, options),
        "threads": torch.get_num_threads(),
        "copy_rate": rates.copy,
        "matrix_rate": rates.matrix,
        "peer": absent or str(peer.NAME),
        "rows": [],
    }
    if kind == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
    cases = production() if kind == "cuda" else reduced()
    for case in cases:
        if chosen.only and not any(part in case.what for part in chosen.only):
            continue
        if kind == "cuda" and time.monotonic() - began + case.takes > 60 * chosen.minutes:
            row = {"what": case.what, "shape": labelled(case.shape), "mode": BOTH}
            rows = [row | {"skipped": f"not measured: no time left of {chosen.minutes:g} minutes"}]
        else:
            with uncompiled(device):
                rows = rows_of(case, setting, rates, chosen.rounds, absent)
        gc.collect()
        for row in rows:
            print(json.dumps(row), flush=True)
        result["rows"] += [row | {part: result[part] for part in ("date", "command")} for row in rows]
        if chosen.output:
            chosen.output.write_text(json.dumps({kind: result}, indent=1) + "\n")
    return {kind: result}


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="on a GPU: cases that may take longer than that are left out"
    )
    parser.add_argument("--seed", type=int, help="of the random inputs; fresh ones by default")
    parser.add_argument("--peer-tunes-fully", action="store_true", help="all 36 configurations of its pixel kernels")
    parser.add_argument("--output", type=Path, help="write the results there and leave the page as it is")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="measure nothing; store such a file and its table")
    chosen = parser.parse_args(options)
    if chosen.publish:
        publish(json.loads(chosen.publish.read_text()))
        return
    torch.set_num_threads(chosen.threads)
    result = measured(chosen, options)
    print(table(next(iter(result.values()))["rows"]))
    if not chosen.output:
        publish(result)
    if any(row.get("skipped", "").startswith(("wrong", "failed")) for part in result.values() for row in part["rows"]):
        sys.exit(1)
