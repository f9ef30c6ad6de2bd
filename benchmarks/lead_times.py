"""One encoding for many lead times against one for each: `python -m benchmarks lead_times`.

A nowcast: radar frames of a context in, a window of it at 1, 12 and 48 lead times out. `model.condition=decoder`
encodes once and decodes every lead time from it; `model.condition=all` runs everything again for each, as MetNet does;
the Perceiver that reads a timestep an iteration is the recurrent alternative to the hierarchy. Process CPU time of a
forward pass without gradients and of a training step, models in turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from benchmarks.measure import cpu_parser, finished, markdown, paired_cpu_seconds, ratio, started
from data.batch import Batch
from data.field import Field
from data.grids import PlanarGrid
from data.layout import InputLayout, Layout, TargetLayout, Variable
from models import build
from models.encode_process_decode import EncodeProcessDecode

MODELS = {
    "hip_metnet, condition=decoder": ["model=hip_metnet"],
    "hip_metnet, condition=all (MetNet)": ["model=hip_metnet", "model.condition=all"],
    "perceiver, inputs_per_iteration=timestep": [
        "model=hip_metnet",
        "model/encoder=perceiver",
        "model.encoder.inputs_per_iteration=timestep",
    ],
}
ONCE, AGAIN = list(MODELS)[:2]
LEADS = (1, 12, 48)
LARGEST = 12  # lead times for which a whole model is run again within one step: memory grows with them
MINUTES = 5


@dataclass(frozen=True)
class Scene:
    """context and window: cells a side of what is read and of what is predicted in its middle. frames: read."""

    context: int = 128
    window: int = 64
    frames: int = 12
    batch: int = 1

    def layout(self, leads: int) -> Layout:
        grid = PlanarGrid.regular(self.context, self.context)
        first = (self.context - self.window) // 2
        inside = slice(first, first + self.window)
        rain, step = (Variable("rain_rate", "mm h-1"),), 60 * MINUTES
        times = tuple(step * (lead + 1) for lead in range(leads))
        return Layout(
            inputs={"radar": InputLayout(rain, grid, self.frames, step)},
            targets={"nowcast": TargetLayout(rain, grid.window(inside, inside), times, trained=(step, 48 * step))},
        )

    def example(self, leads: int) -> Batch:
        layout = self.layout(leads)
        (given,), (wanted,) = layout.inputs.values(), layout.targets.values()
        age = torch.arange(1 - given.frames, 1) * given.step
        fields = [
            Field(torch.randn(self.batch, len(times), 1, *item.grid.shape), item.variables, item.grid, times[None])
            for item, times in ((given, age), (wanted, torch.tensor(wanted.lead_times)))
        ]
        return Batch({"radar": fields[0]}, {"nowcast": fields[1]}, layout)


def built(name: str, scene: Scene, size: str) -> EncodeProcessDecode:
    torch.manual_seed(0)
    return build([*MODELS[name], f"model/size={size}"], scene.layout(max(LEADS)))


def forward(model: EncodeProcessDecode, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            model.eval()(batch)

    return step


def training(model: EncodeProcessDecode, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        model.train()(batch)["nowcast"].square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def measured(scene: Scene, size: str, *, rounds: int) -> list[dict]:
    """CPU seconds of every model at every number of lead times, forward, and of a training step."""
    models = {name: built(name, scene, size) for name in MODELS}
    steps = {}
    for leads in LEADS:
        batch = scene.example(leads)
        batch = replace(batch, layout=next(iter(models.values())).layout)  # lead times are data of the query
        for name, model in models.items():
            if name == AGAIN and leads > LARGEST:
                continue
            steps[name, leads, "forward"] = forward(model, batch)
            if leads <= LARGEST:
                steps[name, leads, "training"] = training(model, batch)
    seconds = paired_cpu_seconds(steps, rounds=rounds)
    rows = []
    for name, model in models.items():
        own = {key[1:]: values for key, values in seconds.items() if key[0] == name}
        film = sum(item.numel() for part, item in model.named_parameters() if "film" in part)
        rows.append(
            {
                "model": name,
                "parameters": sum(item.numel() for item in model.parameters()),
                "film": film,
                "cpu_ms": {f"{kind} {leads}": round(1e3 * median(own[leads, kind]), 1) for leads, kind in own},
                "ratio": {kind: round(ratio(own[LARGEST, kind], own[1, kind]), 2) for kind in ("forward", "training")},
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    columns = [*(f"forward {leads}" for leads in LEADS), *(f"training {leads}" for leads in LEADS if leads <= LARGEST)]
    lines = [
        [
            row["model"],
            *(f"{row['cpu_ms'][name]:.0f}" if name in row["cpu_ms"] else "-" for name in columns),
            *(f"{row['ratio'][kind]:.2f}x" for kind in ("forward", "training")),
            f"{row['film'] / row['parameters']:.2%}",
        ]
        for row in rows
    ]
    header = ["model", *columns, f"forward {LARGEST} / 1", f"training {LARGEST} / 1", "weights of FiLM"]
    return markdown(header, lines)


def main(options: list[str]) -> None:
    parser = cpu_parser("lead_times", __doc__)
    parser.add_argument("--context", type=int, default=Scene.context, help="cells a side that are read")
    parser.add_argument("--window", type=int, default=Scene.window, help="cells a side that are predicted")
    parser.add_argument("--frames", type=int, default=Scene.frames)
    parser.add_argument("--size", default="tiny", choices=("tiny", "small", "base"))
    chosen = parser.parse_args(options)
    result = started("lead_times", options, threads=chosen.threads, packages=())
    scene = Scene(context=chosen.context, window=chosen.window, frames=chosen.frames)
    rows = measured(scene, chosen.size, rounds=chosen.rounds)
    for row in rows:
        print(json.dumps(row), flush=True)
    finished("lead_times", result, rows, table, store=not chosen.no_store)
