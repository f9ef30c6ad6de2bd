"""The rule behind `model.attention=auto`, measured: `python -m benchmarks attention`.

Every backend that a device has computes the same softmax attention, forward and backward, in turns; the table says
which one `auto` picks for a shape and how much longer that takes than the fastest. Before timing, outputs and gradients
are compared with float64. It needs torch and einops only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.roofline import free_bytes, largest_error, paired_rounds
from models.attention.backends import attend, choose_backend

NAME = "attention"
BACKENDS = {"cpu": ("reference", "sdpa", "blockwise"), "cuda": ("reference", "sdpa", "flash", "cudnn", "flex")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {torch.bfloat16: 5e-2, torch.float32: 2e-4}  # of the largest number of a tensor
CHECKED = 64  # queries that are compared with float64
LONGEST = 4.0  # seconds that the rounds of a case may take
NOT_MEASURED = "not measured: no GPU"


@dataclass(frozen=True)
class Shape:
    """constant: keys and values need no gradient, as those of absorbed projections of an input."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    constant: bool = False

    def __str__(self) -> str:
        text = f"{self.batch:,} x {self.heads} heads, {self.queries:,} queries, {self.keys:,} keys, width {self.width}"
        return text + (", constant keys" if self.constant else "")

    @property
    def logits(self) -> int:
        return self.batch * self.heads * self.queries * self.keys


SHAPES = {
    "cpu": [
        *(Shape(1, heads, n, n, width) for heads, width in ((1, 64), (4, 32), (16, 64)) for n in (64, 256, 512, 1024)),
        Shape(16, 8, 128, 128, 32),
        Shape(4, 4, 192, 192, 96),  # frames of HealDA v2, 192 and 768 cells
        Shape(4, 4, 768, 768, 96),
        Shape(1, 4, 1024, 1024, 128),
        Shape(1, 4, 2048, 2048, 32),
        Shape(200, 4, 16, 25, 16),  # places that share a window of latents
        Shape(4000, 4, 16, 9, 32),
        Shape(2000, 4, 1, 9, 32),  # one place and the latents around it
        Shape(4, 8, 4096, 128, 32),  # the read-out of latents
        *(Shape(1, 8, 256, keys, 32) for keys in (1024, 4096, 16_384)),  # latents that read an input
        *(Shape(1, 1, 256, 16_384, 64, constant) for constant in (False, True)),
        *(Shape(1, 1, 256, keys, 261, True) for keys in (4096, 50_176)),  # absorbed
        Shape(1, 1, 256, 50_176, 261),
        Shape(4, 1, 128, 4096, 133, True),
        Shape(1, 1, 128, 16_384, 256),
    ],
    "cuda": [
        *(Shape(1, 16, n, n, 64) for n in (64, 256, 1024, 4096)),
        Shape(8, 16, 12_288, 12_288, 96),  # HealDA v2, frames of a window
        Shape(1, 16, 49_152, 49_152, 96),
        Shape(20_000, 4, 1, 9, 32),
        Shape(4, 8, 4096, 128, 32),
        *(Shape(1, 8, 256, keys, 32) for keys in (4096, 50_176)),
        *(Shape(1, 1, 256, 50_176, 261, constant) for constant in (False, True)),
    ],
}


def tensors(shape: Shape, device: torch.device, dtype: torch.dtype, random: torch.Generator) -> list[Tensor]:
    """Query, key, value and the gradient of the output; the first three need gradients where the shape says so."""
    sizes = [shape.queries, shape.keys, shape.keys, shape.queries]
    draw = [
        torch.randn(shape.batch, shape.heads, size, shape.width, generator=random, device=device).to(dtype)
        for size in sizes
    ]
    for part in draw[: 1 if shape.constant else 3]:
        part.requires_grad_()
    return draw


def step(given: list[Tensor], backend: str) -> Callable[[], list[Tensor]]:
    """Returns output and gradients."""
    *operands, gradient = given
    leaves = [part for part in operands if part.requires_grad]
    scale = given[0].shape[3] ** -0.5

    def run() -> list[Tensor]:
        output = attend(*operands, scale=scale, backend=backend)
        return [output, *torch.autograd.grad(output, leaves, gradient)]

    return run


def error(given: list[Tensor], backend: str) -> float:
    """Against float64, of the first sample and head, and of the queries that alone have a gradient there."""
    *operands, gradient = given
    some = gradient.zero_().clone()
    some[:1, :1, :CHECKED] = torch.randn_like(some[:1, :1, :CHECKED])
    found = step([*operands, some], backend)()
    few = [part[:1, :1].detach().double() for part in operands]
    few[0] = few[0][:, :, :CHECKED]
    few = [part.requires_grad_(whole.requires_grad) for part, whole in zip(few, operands, strict=True)]
    expected = step([*few, some[:1, :1, :CHECKED].double()], "reference")()
    cut = [part[:1, :1, : wanted.shape[2]] for part, wanted in zip(found, expected, strict=True)]
    return largest_error(cut, expected)


def row_of(shape: Shape, device: torch.device, dtype: torch.dtype, random: torch.Generator, rounds: int) -> dict:
    """Seconds of each backend, what `auto` picks, and by how much the fastest is faster."""
    given = tensors(shape, device, dtype, random)
    pick = choose_backend(given[0], shape.keys, constant_keys=shape.constant)
    row = {"shape": str(shape), "dtype": str(dtype).removeprefix("torch."), "auto": pick, "left_out": {}}
    steps = {}
    for backend in BACKENDS[device.type]:
        if backend == "reference" and 4 * shape.logits * dtype.itemsize > free_bytes(device) / 2:
            row["left_out"][backend] = "too large"
            continue
        try:
            wrong = error(given, backend)
        except (ValueError, RuntimeError) as reason:
            row["left_out"][backend] = " ".join(str(reason).split())[:150]
            continue
        if not wrong <= TOLERANCES[dtype]:
            row["left_out"][backend] = f"wrong: error {wrong:.1e}"
            continue
        steps[backend] = step(given, backend)
    given[-1].normal_(generator=random)
    seconds = paired_rounds(steps, device, rounds=rounds, longest=LONGEST)
    row["seconds"] = {name: median(values) for name, values in seconds.items()}
    if pick in seconds:
        best = min(row["seconds"], key=row["seconds"].get)
        same = len(seconds[pick]) == len(seconds[best])  # slow ones take part in the first round only
        ratio = measure.ratio(seconds[pick], seconds[best]) if same else row["seconds"][pick] / row["seconds"][best]
        row |= {"best": best, "ratio": ratio}
    return row


def table(rows: list[dict], kind: str) -> str:
    header = ["shape", "dtype", *(f"{name}, ms" for name in BACKENDS[kind]), "auto picks", "auto / fastest"]
    return measure.markdown(header, [_cells(row, BACKENDS[kind]) for row in rows])


def _cells(row: dict, backends: tuple[str, ...]) -> list[str]:
    if "seconds" not in row:
        return [row["shape"], row["dtype"], *["-"] * len(backends), row["auto"], NOT_MEASURED]
    times = [f"{1000 * row['seconds'][name]:.3g}" if name in row["seconds"] else "-" for name in backends]
    return [row["shape"], row["dtype"], *times, row["auto"], f"{row['ratio']:.2f}" if "ratio" in row else "-"]


def section(kind: str, result: dict | None) -> str:
    """Table of one kind of device, with command, device and date."""
    title = {"cuda": "GPU", "cpu": "CPU"}[kind]
    if result is None:
        rows = [_unmeasured(one, name) for one in SHAPES[kind] for name in DTYPES]
        return f"{title}:\n\n{table(rows, kind)}"
    line = measure.credit(f"{result['device']}, {result['threads']} CPU threads", [result])
    return f"{title}:\n\n{table(result['rows'], kind)}\n\n{line}"


def _unmeasured(shape: Shape, dtype: str) -> dict:
    query = torch.empty(shape.batch, shape.heads, shape.queries, shape.width, dtype=DTYPES[dtype], device="meta")
    pick = choose_backend(query, shape.keys, constant_keys=shape.constant)  # the rule of whatever is no CPU
    return {"shape": str(shape), "dtype": dtype, "auto": pick}


def publish(result: dict[str, dict]) -> None:
    """Beside what the other kind of device measured."""
    measure.publish_devices(NAME, measure.stored(NAME) | result, section)


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--no-store", action="store_true", help="print the table only")
    parser.add_argument("--output", type=Path, help="write the results there and leave the page as it is")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="measure nothing; store such a file and its table")
    chosen = parser.parse_args(options)
    if chosen.publish:
        publish(json.loads(chosen.publish.read_text()))
        return
    torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    random = torch.Generator(device).manual_seed(0)
    result = measure.environment(("torch",)) | {
        "command": measure.command(NAME, options),
        "threads": chosen.threads,
        "rows": [],
    }
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
    for name in chosen.dtypes:
        for shape in SHAPES[device.type]:
            row = row_of(shape, device, DTYPES[name], random, chosen.rounds)
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
    print(table(result["rows"], device.type))
    if chosen.output:
        chosen.output.write_text(json.dumps({device.type: result}, indent=1) + "\n")
    elif not chosen.no_store:
        publish({device.type: result})
