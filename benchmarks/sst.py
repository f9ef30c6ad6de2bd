"""The monthly model against its formula in torch's own layers, on CPU: `python -m benchmarks sst`.

ClimaNet's default configuration (2,124,826 weights, patches of 4 x 4, one variable) at one sample of M months of 31
days on 128 x 128 cells: seconds of process CPU time of a forward pass and of forward and backward in training, in
turns, and the growth of a fresh process's peak memory over its first step. Both have the same weights, and their
outputs and gradients are compared before anything is timed. ClimaNet's package is on no index; its formula stands in
for it (`benchmarks/sst_formula.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

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
from benchmarks.sst_formula import Formula
from data.batch import Batch
from data.field import Field
from models import build
from models.convert import SOURCES, export
from models.convert.climanet import DAY, INPUT, TARGET

OURS, FORMULA = "ours", "formula"
MODES = ("forward", "forward+backward")
DAYS, SIDE = 31, 128
TOLERANCE = 1e-4  # of max(1, max |output|), and of the largest gradient


class Ours(nn.Module):
    """Our model, called as the formula is."""

    def __init__(self, months: int):
        super().__init__()
        source = SOURCES["climanet"]
        torch.manual_seed(0)
        layout = source.layout({}, {}, (months, DAYS, SIDE, SIDE))
        self.model = build([*source.overrides({}, {}), "model.decoder.zero_head=false"], layout)

    def forward(self, x: Tensor, missing: Tensor, land: Tensor, padded: Tensor) -> Tensor:
        layout = self.model.layout
        daily, monthly = layout.inputs[INPUT], layout.targets[TARGET]
        days = torch.arange(daily.frames)[None] * DAY
        field = Field(
            x[:, 0].flatten(1, 2)[:, :, None],
            daily.variables,
            daily.grid,
            days,
            valid=~missing[:, 0].flatten(1, 2)[:, :, None],
            frame_valid=~padded.flatten(1),
        )
        ends = days[:, DAYS - 1 :: DAYS].contiguous()
        blank = torch.zeros(len(x), ends.shape[1], 1, *land.shape[1:])
        target = Field(blank, monthly.variables, monthly.grid, ends, domain=~land[:, None, None].expand_as(blank))
        return self.model(Batch({INPUT: field}, {TARGET: target}, layout))[TARGET][:, :, 0]


def implementation(name: str, months: int) -> nn.Module:
    """In training mode, both with the same weights."""
    ours = Ours(months)
    if name == OURS:
        return ours.train()
    formula = Formula()
    formula.load_state_dict(export("climanet", ours.model, {}), strict=False)  # its encodings are constants
    return formula.train()


def sample(months: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random values, two fifths of them missing, a fifth of the cells land; months of 28 to 31 days."""
    random = torch.Generator().manual_seed(0)
    shape = (1, 1, months, DAYS, SIDE, SIDE)
    padded = torch.zeros(1, months, DAYS, dtype=torch.bool)
    padded[:, 1::12, 28:] = True
    padded[:, 3::2, 30:] = True
    missing = torch.rand(shape, generator=random) < 0.4
    missing |= padded[:, None, :, :, None, None]
    return torch.randn(shape, generator=random), missing, torch.rand(1, SIDE, SIDE, generator=random) < 0.2, padded


def step_of(module: nn.Module, months: int, mode: str) -> Callable[[], None]:
    inputs = sample(months)

    def step() -> None:
        with torch.set_grad_enabled(mode != "forward"):
            output = module(*inputs)
        if mode != "forward":
            module.zero_grad(set_to_none=True)
            output.square().mean().backward()

    return step


def peak_growth(name: str, months: int, threads: int) -> int:
    """Bytes by which the peak memory of this process grows in its first training step, its inputs included."""
    torch.set_num_threads(threads)
    before = peak_rss_bytes()
    step_of(implementation(name, months), months, "forward+backward")()
    return peak_rss_bytes() - before


def largest_error(months: int = 2) -> float:
    """Of outputs and of gradients, against the formula."""
    ours, formula = (implementation(name, months) for name in (OURS, FORMULA))
    inputs = sample(months)
    outputs = ours(*inputs), formula(*inputs)
    for output in outputs:
        output.square().mean().backward()
    error = ((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max().clamp(min=1)).item()
    found = export_gradients(ours.model)
    wanted = {name: part.grad for name, part in formula.named_parameters()}
    largest = max(gradient.abs().max() for gradient in wanted.values())
    return max(error, *(((found[name] - wanted[name]).abs().max() / largest).item() for name in wanted))


def export_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by the names of ClimaNet's weights."""
    source, parameters = SOURCES["climanet"], dict(model.named_parameters())
    named = {theirs: parameters[ours].grad for ours, theirs in source.names({}).items() if ours in parameters}
    return source.original(named, {})


def measured(months: int, rounds: int, threads: int) -> list[dict]:
    """Raises RuntimeError where the two compute different things."""
    torch.set_num_threads(threads)
    error = largest_error()
    if not error <= TOLERANCE:
        raise RuntimeError(f"ours and the formula differ by {error:.1e}, more than {TOLERANCE:g}")
    modules, rows = {name: implementation(name, months) for name in (OURS, FORMULA)}, []
    for mode in MODES:
        seconds = paired_cpu_seconds(
            {name: step_of(module, months, mode) for name, module in modules.items()}, rounds=rounds
        )
        rows.append(
            {
                "months": months,
                "mode": mode,
                "cpu_s": {name: round(median(values), 3) for name, values in seconds.items()},
                "ratio": round(ratio(seconds[FORMULA], seconds[OURS]), 3),
                "error": error,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        peak = row.get("peak_mb", {})
        seconds = [f"{row['cpu_s'][name]:.2f}" for name in (OURS, FORMULA)]
        memory = [f"{peak[name]:,}" if peak else "-" for name in (OURS, FORMULA)]
        share = f"{peak[OURS] / peak[FORMULA]:.0%}" if peak else "-"
        lines.append([str(row["months"]), row["mode"], *seconds, f"{row['ratio']:.2f}x", *memory, share])
    speed = ["ours, CPU s", "formula, CPU s", "formula / ours"]
    return markdown(["months", "mode", *speed, "ours, MB", "formula, MB", "ours / formula"], lines)


def main(options: list[str]) -> None:
    parser = cpu_parser("sst", __doc__)
    parser.add_argument("--months", nargs="+", type=int, default=[1, 12])
    chosen = parser.parse_args(options)
    if not all(1 <= months <= 12 for months in chosen.months):
        raise ValueError(f"--months {chosen.months} must be 1 to 12, for which the default has scales")
    result, rows = started("sst", options, threads=chosen.threads, packages=()), []
    for months in chosen.months:
        peaks = {name: in_child(partial(peak_growth, name, months, chosen.threads)) for name in (OURS, FORMULA)}
        found = in_child(partial(measured, months, chosen.rounds, chosen.threads))
        found[-1]["peak_mb"] = {name: round(size / 1e6) for name, size in peaks.items()}
        rows += found
        for row in found:
            print(json.dumps(row), flush=True)
    finished(
        "sst",
        result,
        rows,
        table,
        key=("months", "mode"),
        order=lambda row: (row["months"], MODES.index(row["mode"])),
        store=not chosen.no_store,
    )
