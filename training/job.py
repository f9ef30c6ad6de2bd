"""What Hydra knows of a job, as plain values that travel to other processes, where there is no Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training import environment
from training.sweep import parent_run

# What is typed for every job of a sweep alike, and says nothing about the model.
UNNAMED = ("tracking", "data.path", "trainer.progress")


@dataclass(frozen=True)
class Job:
    """directory: the output folder. overrides: what was typed. choices: {group: option}. command: the whole line.

    in_sweep: one of several jobs. parent: the MLflow run of the sweep, or None.
    """

    directory: Path
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    command: str
    in_sweep: bool = False
    parent: str | None = None

    @staticmethod
    def current() -> Job:
        """The running Hydra job."""
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra = HydraConfig.get()
        return Job(
            directory=Path(hydra.runtime.output_dir),
            overrides=tuple(hydra.overrides.task),
            choices={str(group): str(option) for group, option in hydra.runtime.choices.items()},
            command=environment.command(),
            in_sweep=hydra.mode == RunMode.MULTIRUN,
            parent=parent_run(),
        )

    @property
    def name(self) -> str:
        """A sweep's job is named by what was typed, a single run by its preset."""
        if not self.in_sweep:
            return self.choices["model"]
        return " ".join(item for item in self.overrides if not item.startswith(UNNAMED))[:250]
