"""What a second stream costs the cross-resolution encoder: `python -m benchmarks ocean`.

A prognostic stream on 1/4 degree with a boundary on 1 degree, in patches of 6 x 10 degrees (960 + 60 tokens a patch),
beside the prognostic stream alone: forward and backward of the encoder, process CPU time with the two in turns, and the
growth of peak memory in a process of its own; with --device cuda its own time and memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.measure import (
    cpu_parser,
    finished,
    in_child,
    markdown,
    paired_cpu_seconds,
    peak_rss_bytes,
    ratio,
    started,
)
from data.batch import Batch
from data.field import Field
from data.grids import LatLonGrid
from data.layout import InputLayout, Layout, TargetLayout, Variable
from models.checks import part_options
from models.composition import compose
from models.encoders.cross_resolution import CrossResolutionEncoder

PATCH = (6, 10)  # degrees
STREAMS = {"prognostic": (0.25, 6), "boundary": (1.0, 4)}  # degrees between cells, variables
BOTH, ALONE = "prognostic and boundary", "prognostic alone"
DAY = 86_400


def layout(names: tuple[str, ...], *, rows: int, columns: int) -> Layout:
    """rows x columns patches northwards from 30 S and eastwards from Greenwich."""
    inputs = {}
    for name in names:
        step, variables = STREAMS[name]
        axes = (
            np.arange(size * side / step) * step + step / 2 for size, side in zip((rows, columns), PATCH, strict=True)
        )
        south, east = axes
        described = tuple(Variable(f"{name}_{number}") for number in range(variables))
        inputs[name] = InputLayout(described, LatLonGrid(south - 30, east), 1, DAY)
    first = inputs["prognostic"]
    return Layout(inputs, {"forecast": TargetLayout(first.variables, first.grid, (DAY,))})


def encoder_and_batch(
    names: tuple[str, ...], *, rows: int, columns: int, size: str, device: str
) -> tuple[CrossResolutionEncoder, Batch]:
    torch.manual_seed(0)
    described = layout(names, rows=rows, columns=columns)
    overrides = ["model=ocean_perceiver", f"model/size={size}", f"model.encoder.patch_extent=[{PATCH[0]},{PATCH[1]}]"]
    node = OmegaConf.to_container(compose(overrides).model, resolve=True)["encoder"]
    encoder = CrossResolutionEncoder(described, **{**part_options(node), "frames": "joint"}).to(device)

    def field(item, seconds: int) -> Field:
        values = torch.randn(1, 1, len(item.variables), *item.grid.shape)
        return Field(values, item.variables, item.grid, torch.tensor([[seconds]]))

    inputs = {name: field(item, 0) for name, item in described.inputs.items()}
    return encoder, Batch(inputs, {"forecast": field(described.targets["forecast"], DAY)}, described).to(device)


def step(encoder: CrossResolutionEncoder, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        encoder(batch).tokens.square().mean().backward()
        encoder.zero_grad(set_to_none=True)

    return run


def on_cpu(cases: dict[str, tuple[str, ...]], *, rounds: int, **scene) -> list[dict]:
    def grown(names: tuple[str, ...]) -> int:
        run = step(*encoder_and_batch(names, **scene))
        before = peak_rss_bytes()
        run()
        return peak_rss_bytes() - before

    memory = {name: in_child(lambda names=names: grown(names)) for name, names in cases.items()}
    made = {name: encoder_and_batch(names, **scene) for name, names in cases.items()}
    seconds = paired_cpu_seconds({name: step(*pair) for name, pair in made.items()}, rounds=rounds)
    return [
        row(name, made[name][0], median(seconds[name]), memory[name], ratio(seconds[name], seconds[ALONE]), memory)
        for name in cases
    ]


def on_cuda(cases: dict[str, tuple[str, ...]], *, rounds: int, **scene) -> list[dict]:
    made = {name: encoder_and_batch(names, **scene) for name, names in cases.items()}
    seconds, memory = {name: [] for name in cases}, {}
    for turn in range(rounds + 2):  # the first two warm up
        for name, pair in made.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated(), time.perf_counter()
            step(*pair)()
            torch.cuda.synchronize()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
            memory[name] = torch.cuda.max_memory_allocated() - before
    return [
        row(name, made[name][0], median(seconds[name]), memory[name], ratio(seconds[name], seconds[ALONE]), memory)
        for name in cases
    ]


def row(
    name: str, encoder: CrossResolutionEncoder, seconds: float, grown: int, times: float, memory: dict[str, int]
) -> dict:
    tokens = sum(stream.table.index.shape[1] for stream in encoder.streams.values())
    return {
        "streams": name,
        "patches": encoder.patches.num_patches,
        "tokens": tokens,
        "ms": round(1e3 * seconds, 1),
        "mib": round(grown / 2**20, 1),
        "time_ratio": round(times, 3),
        "memory_ratio": round(grown / memory[ALONE], 3),
    }


def table(rows: list[dict]) -> str:
    header = ["streams", "patches", "tokens a patch", "ms", "MiB", "time", "memory"]
    lines = [
        [
            item["streams"],
            *(str(item[key]) for key in ("patches", "tokens")),
            f"{item['ms']:.0f}",
            f"{item['mib']:.0f}",
            f"{item['time_ratio']:.2f}x",
            f"{item['memory_ratio']:.2f}x",
        ]
        for item in rows
    ]
    return markdown(header, lines)


def main(options: list[str]) -> None:
    parser = cpu_parser("ocean", __doc__)
    parser.add_argument("--rows", type=int, default=10, help="of patches, 30 on the whole globe")
    parser.add_argument("--columns", type=int, default=18, help="of patches, 36 on the whole globe")
    parser.add_argument("--size", default="tiny", choices=("tiny", "small", "base"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    chosen = parser.parse_args(options)
    result = started("ocean", options, threads=chosen.threads, packages=())
    if chosen.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    measured = on_cpu if chosen.device == "cpu" else on_cuda
    scene = dict(rows=chosen.rows, columns=chosen.columns, size=chosen.size, device=chosen.device)
    rows = measured({ALONE: ("prognostic",), BOTH: ("prognostic", "boundary")}, rounds=chosen.rounds, **scene)
    finished("ocean", result, rows, table, store=not chosen.no_store)
