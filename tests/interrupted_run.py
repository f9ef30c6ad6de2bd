"""A training run on ranks that is slow enough to be interrupted anywhere, started from a process of its own."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

from data.datasets.gridded import GriddedData
from tests.tiny_run import SPLIT, tiny_loop
from training import command_line
from training.launch import launch
from training.ranks import Mesh, Ranks
from training.run_folder import last_checkpoint
from training.tracking import NoTracker

SETTINGS = dict(max_steps=24, validate_every=4, checkpoint_every=3, accumulate=2, keep=2)


class Paced(NoTracker):
    """Takes so many seconds after each step."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def log(self, step: int, values: dict[str, float]) -> None:
        time.sleep(self.seconds)


def train(ranks: Ranks, folder: str, data: GriddedData, seconds: float) -> int:
    """Trains, or goes on where it was interrupted; the last step."""
    run = Path(folder) / "run"
    loop = tiny_loop(run, data, ranks=ranks, **SETTINGS)
    if (run / "checkpoints" / "last").exists():
        loop.resume(last_checkpoint(run))
    return loop.run(Paced(seconds)).progress.step


def main() -> None:
    folder, ranks, seconds, workers = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    data = GriddedData(str(Path(folder) / "weather.nc"), split=SPLIT, cache="ram", num_workers=workers)
    trainer = SimpleNamespace(device="cpu", timeout=60.0)
    print("step", launch(train, folder, data, seconds, mesh=Mesh(dp=ranks), trainer=trainer))


if __name__ == "__main__":
    command_line.run(main)
