"""HealDA v2 on CPU, forward and forward + backward, against PhysicsNeMo's: `python -m benchmarks healda_cpu`.

Both have the same weights and outputs (compared before they are timed) and read random observations, uniform over the
cells; 0 observations show what the rest of the model costs. float32, one sample of 4 frames. PhysicsNeMo's attention to
observations is a Python loop over cells and heads on CPU, so that a step takes it up to minutes: its slow steps run
once, after a warm-up without observations. Its temporal attention, compiled where TORCH_COMPILE_DISABLE=1 is not set,
is compiled in that warm-up. Where PhysicsNeMo is not installed, our own loop over cells stands in for it; it is faster
than theirs, because it has no loop over heads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.healda_peer import INSTALL, NAME, PhysicsNeMo, installed
from benchmarks.measure import cpu_parser, finished, markdown, started
from data.batch import Batch
from data.field import Field
from data.healpix import num_cells
from data.layout import Layout
from data.observations import Observations
from models import build
from models.attention.pixel import PixelCrossAttention
from models.convert import SOURCES, convert
from models.convert.physicsnemo import INPUT, TARGET

OURS, LOOP = "ours", "loop"
MODES = ("forward", "forward+backward")
TOLERANCE = 2e-5  # of max(1, max |output|)
SECONDS = 20.0  # of CPU: a step that takes a peer longer is not repeated


@dataclass(frozen=True)
class Case:
    """A model and numbers of observations to give it; theirs: those with which the peer's backward pass can be waited
    for (it grows with cells x occupied cells)."""

    name: str
    level: int
    observations: tuple[int, ...]
    theirs: tuple[int, ...]

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments of `VideoHealDA`; the rest are its defaults."""
        return {
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "level_in": self.level + 1,
            "level_model": self.level,
            "time_length": 4,
            "pixel_attn_n_q_heads": 32,
            "drop_path": 0.0,
        }


CASES = {
    case.name: case
    for case in (
        Case("A", level=2, observations=(0, 1000, 4000), theirs=(0, 1000)),
        Case("B", level=3, observations=(0, 1000, 10_000), theirs=(0,)),
    )
}


class Ours(nn.Module):
    """Our composed model with the peer's output. loop: its attention to observations goes cell by cell."""

    def __init__(self, model: nn.Module, *, loop: bool = False):
        super().__init__()
        self.model, self.path = model, "reference" if loop else "auto"

    def forward(self, batch: Batch) -> Tensor:
        for module in self.model.modules():
            if isinstance(module, PixelCrossAttention):
                module.path = self.path
        return self.model(batch)[TARGET].transpose(1, 2)


def layout_of(case: Case) -> Layout:
    tables = {f"encoder.observations.{name}_table.weight": torch.empty(1024, 1) for name in ("type", "channel")}
    tables["encoder.observations.platform_table.weight"] = torch.empty(1024, 1)
    return SOURCES["physicsnemo"].layout(case.config, tables, 1)


def implementations(case: Case) -> tuple[dict[str, nn.Module], Layout]:
    """Ours and, of the same weights, PhysicsNeMo's or our loop."""
    torch.manual_seed(0)
    source = SOURCES["physicsnemo"]
    if not installed():
        layout = layout_of(case)
        model = build(source.overrides(case.config, {}), layout)
        _randomise(model)
        return {OURS: Ours(model), LOOP: Ours(model, loop=True)}, layout
    theirs = PhysicsNeMo(case.config)
    _randomise(theirs)
    overrides, layout, weights = convert("physicsnemo", theirs.model.state_dict(), case.config)
    model = build(overrides, layout)
    model.load_state_dict(weights)
    return {OURS: Ours(model), NAME: theirs}, layout


def _randomise(module: nn.Module) -> None:
    """Every layer shows in the output, gates included."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=(parameter.numel() / parameter.shape[0]) ** -0.5 if parameter.ndim > 1 else 0.1)


def batch_of(case: Case, layout: Layout, observations: int) -> Batch:
    random = torch.Generator().manual_seed(observations)
    given, wanted, rows = layout.inputs[INPUT], layout.targets[TARGET], layout.observations
    times = torch.arange(given.frames)[None] * given.step

    def field(item) -> Field:
        shape = (1, given.frames, len(item.variables), *item.grid.shape)
        return Field(torch.randn(shape, generator=random), item.variables, item.grid, times)

    def ids(size: int) -> Tensor:
        return torch.randint(0, size, (observations,), generator=random)

    return Batch(
        {INPUT: field(given)},
        {TARGET: field(wanted)},
        layout,
        observations=Observations(
            value=torch.randn(observations, generator=random),
            batch=ids(1),
            frame=ids(rows.frames),
            channel=ids(rows.num_channels),
            platform=ids(rows.num_platforms),
            type=ids(rows.num_types),
            times=times,
            features=torch.randn(observations, rows.num_features, generator=random),
            cell=ids(num_cells(case.level)),
        ),
    )


def largest_error(modules: dict[str, nn.Module], batch: Batch) -> float:
    """Largest difference of the two outputs over max(1, |output|)."""
    with torch.no_grad():
        ours, theirs = (module(batch) for module in modules.values())
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def _step(module: nn.Module, batch: Batch, mode: str) -> Callable[[], None]:
    def step() -> None:
        with torch.set_grad_enabled(mode != "forward"):
            output = module(batch)
        if mode != "forward":
            module.zero_grad(set_to_none=True)
            output.square().mean().backward()

    return step


def cpu_seconds(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of steps that take turns; one slower than SECONDS runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if seconds[name] and seconds[name][-1] > SECONDS:
                continue
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: round(median(values), 4) for name, values in seconds.items()}


def rows_of(case: Case, rounds: int) -> list[dict]:
    """Raises RuntimeError where outputs differ."""
    modules, layout = implementations(case)
    empty = batch_of(case, layout, 0)
    error = largest_error(modules, batch_of(case, layout, 200))
    if not error <= TOLERANCE:
        raise RuntimeError(f"case {case.name}: outputs differ by {error:.1e}, more than {TOLERANCE:g}")
    rows = []
    for count in case.observations:
        batch = batch_of(case, layout, count)
        for mode in MODES:
            chosen = {
                name: m for name, m in modules.items() if mode == "forward" or name == OURS or count in case.theirs
            }
            for name, module in chosen.items():
                _step(module, batch if name == OURS else empty, mode)()
            steps = {name: _step(module, batch, mode) for name, module in chosen.items()}
            seconds = cpu_seconds(steps, rounds)
            rows.append({"case": case.name, "observations": count, "mode": mode, "cpu_s": seconds, "error": error})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["cpu_s"]))
    alone = {(row["case"], row["mode"]): row["cpu_s"][OURS] for row in rows if row["observations"] == 0}
    lines = []
    for row in rows:
        seconds = row["cpu_s"]
        slower = [f"{seconds[name] / seconds[OURS]:.1f}x" for name in names if name != OURS and name in seconds]
        without = alone.get((row["case"], row["mode"]))
        added = "-" if not row["observations"] or without is None else f"{seconds[OURS] / without - 1:+.0%}"
        times = [f"{seconds[name]:.3f}" if name in seconds else "-" for name in names]
        cells = [row["case"], f"{row['observations']:,}", row["mode"], *times, slower[0] if slower else "-", added]
        lines.append(cells)
    peer = next((name for name in names if name != OURS), "peer")
    header = ["case", "observations", "mode", *(f"{name}, CPU s" for name in names)]
    return markdown([*header, f"{peer} / ours", "observations add (ours)"], lines)


def main(options: list[str]) -> None:
    parser = cpu_parser("healda_cpu", __doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args(options)
    if not installed():
        print(f"PhysicsNeMo is not installed, our loop over cells stands in for it; to compare with it: {INSTALL}")
    result = started("healda_cpu", options, threads=chosen.threads, packages=("nvidia-physicsnemo",))
    rows = [row for name in chosen.cases for row in rows_of(CASES[name], chosen.rounds)]

    def order(row: dict) -> tuple:
        return row["case"], row["observations"], MODES.index(row["mode"])

    key = ("case", "observations", "mode")
    finished("healda_cpu", result, rows, table, key=key, order=order, store=not chosen.no_store)
