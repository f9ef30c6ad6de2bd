"""What tests of sharding let ranks do: a whole run of a tiny HealDA without its scores, and what is left of it."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models import build
from models.composition import compose
from tests.model_examples import tiny_batch, tiny_layout
from training.job import Job
from training.launch import launch
from training.ranks import Mesh, Ranks
from training.run import Run, build_data, build_model, build_task
from training.sharding import shard
from training.tracking import NoTracker

TRAINER = SimpleNamespace(device="cpu", timeout=300.0)
TINY = (
    "model=healda_v2",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=2",
    "model.num_heads=2",
    "model.observation_heads=2",
    "model.drop_path=0",  # drawn by part of the samples: another number of parts draws others
    "model.processor.checkpoint=1",
    "task.frames=4",
    "task.stride=4",
    "task.row_dropout=0",
    "task.platform_dropout=0",
    "data.level=1",
    "data.stations=10",
    "data.sondes=2",
    "data.split.train=[2001-01-01,2001-01-08]",
    "data.split.validation=[2001-01-09,2001-01-13]",
    "data.split.test=[2001-01-14,2001-01-18]",
    "trainer.batch_size=2",
    "trainer.accumulate=2",
    "trainer.max_steps=4",
    "trainer.validate_every=2",
    "trainer.clip_norm=0.5",
    "trainer.ema_decay=0.9",
    "trainer.precision=float32",
    "trainer.progress=false",
    "optimizer.eps=1e-4",  # Adam would turn the rounding of gradients near 0 into full steps
    "tracking=none",
)


def trained(folder: Path, *overrides: str, mesh: Mesh | None = None) -> dict:
    """Trains on the ranks of a mesh, in other processes where there are several."""
    mesh = Mesh() if mesh is None else mesh
    folder.mkdir(parents=True, exist_ok=True)
    return launch(train, folder, [*TINY, *overrides], mesh=mesh, trainer=TRAINER)


def train(ranks: Ranks, folder: Path, overrides: Sequence[str]) -> dict:
    """Whole weights, average and optimiser state, and how many bytes of them this rank holds."""
    run = new_run(ranks, folder, overrides)
    run.train()
    loop = run.loop
    found = {"model": loop.model.state_dict(), "ema": loop.average.model.state_dict() if loop.average else {}}
    states = loop.optimizer.state_dict()["state"]
    found["optimizer"] = {f"{index}.{key}": value for index, held in states.items() for key, value in held.items()}
    held = sum(_held(tensor) for tensors in found.values() for tensor in tensors.values())
    return {name: {key: _whole(value) for key, value in part.items()} for name, part in found.items()} | {"held": held}


def new_run(ranks: Ranks, folder: Path, overrides: Sequence[str]) -> Run:
    config = compose(overrides)
    data, task = build_data(config), build_task(config)
    layout = task.layout(data)
    run = Run(
        config,
        data,
        task,
        build_model(config, layout),
        layout=layout,
        job=Job(folder, tuple(overrides), {}, "train.py"),
        ranks=ranks,
    )
    run.tracker = NoTracker()
    return run


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _held(tensor: Tensor) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.numel() * tensor.element_size()


def assert_close(found: dict, expected: dict, *, tolerance: float) -> None:
    """Every tensor to a share of its norm."""
    for name in ("model", "ema", "optimizer"):
        assert found[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            error = (found[name][key].double() - value.double()).norm()
            assert error <= tolerance * value.double().norm().clamp(min=1e-4), f"{name} {key}: off by {error:.1e}"


def assert_equal(found: dict, expected: dict) -> None:
    for name in ("model", "ema", "optimizer"):
        assert found[name].keys() == expected[name].keys()
        assert all(torch.equal(found[name][key], value) for key, value in expected[name].items()), name


def train_with_a_small_disk(ranks: Ranks, folder: Path, overrides: Sequence[str]) -> None:
    """From the second checkpoint on, the second rank may write 20 kB a file."""
    run = new_run(ranks, folder, overrides)
    save = run.loop.save

    def limited() -> None:
        if run.loop.progress.step == 2 and ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        save()

    run.loop.save = limited
    run.train()


MODELS = {
    "perceiver": ("model=perceiver_io",),
    "perceiver, weights used twice": (
        "model=perceiver_io",
        "model/processor=latent_transformer",
        "model.processor.num_blocks=2",
    ),
    "patches": ("model=patch_transformer",),
    "video": ("model=video_dit",),
    "no processor": ("model=perceiver_io", "model/processor=identity"),
}


def compared_gradients(ranks: Ranks) -> dict[str, tuple[float, set[torch.dtype]]]:
    """How far sharded gradients of each model, of the same batch on all ranks, are from those of whole weights; and the
    dtypes that sharded weights are kept in."""
    found = {}
    for name, overrides in MODELS.items():
        layout = tiny_layout()
        for precision in ("float32", "bf16"):
            torch.manual_seed(0)
            batch = tiny_batch(layout)
            model = build([*overrides, "model/size=tiny", "model.patch_size=2"], layout).eval()  # no dropout
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            whole = copy.deepcopy(model)
            shard(model, ranks, precision=precision)
            for network in (whole, model):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    outputs = network(batch)
                outputs["forecast"].float().square().mean().backward()
            gradients = [
                torch.cat([_whole(p.grad).flatten() for p in network.parameters()]) for network in (model, whole)
            ]
            error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
            found[f"{name}, {precision}"] = (float(error), {parameter.dtype for parameter in model.parameters()})
    return found
