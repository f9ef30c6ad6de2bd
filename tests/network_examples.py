"""A simulated network of observations, small enough to fit and train on in a test, and tasks and models of it."""

import torch
from hydra.utils import instantiate

from data.datasets.simulated_network import SimulatedNetwork
from models.composition import build_from_config, compose
from training.tasks.assimilation import AssimilationTask

SPLIT = {"train": ["2001-01", "2001-03"], "validation": "2001-04", "test": ["2001-05-01", "2001-05-08"]}
HOUR = 3600
SMALL = [
    "model=healda_v2",
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.num_latents=6",
    "model.observation_heads=2",
    "task.frames=3",
    "data.level=2",
    "data.stations=20",
    "data.sondes=4",
    "data.split.train=[2001-01-01,2001-01-20]",
    "data.split.validation=[2001-01-21,2001-01-24]",
    "data.split.test=[2001-01-25,2001-01-29]",
]


def small_network() -> SimulatedNetwork:
    return SimulatedNetwork(split=SPLIT, level=2, stations=20, sondes=4)


def task_of(**changes) -> AssimilationTask:
    settings = dict(
        frames=3, window=[-3 * HOUR, 3 * HOUR], reference="climatology", head="deterministic", loss="huber", stride=2
    )
    return AssimilationTask(**(settings | changes))


def composed(*overrides):
    config = compose([*SMALL, *overrides])
    data, task = (instantiate(node, _convert_="all") for node in (config.data, config.task))
    torch.manual_seed(0)
    return config, data, task, build_from_config(config, task.layout(data))


def one_step(task, model, batch) -> float:
    """The loss after a step of gradient descent, relative to before."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        sums = {name: errors for name, (errors, _) in task.sums(model(batch), batch).items()}
        loss = task.combine(sums, task.total_weights([batch]), batch.layout)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses[1] / losses[0]
