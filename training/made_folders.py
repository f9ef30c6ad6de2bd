"""Which folders a run's output made, so that one that writes nothing leaves the disk as it found it; a job of a sweep
removes its own folder, be it empty."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

_made: tuple[Path, ...] = ()  # by the run of this process, innermost first


class MadeFolders(Callback):
    """Notes, before Hydra makes `hydra.run.dir`, which levels of it are not there."""

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        global _made
        running = HydraConfig.instance()
        before = running.cfg
        running.set_config(config)  # the folder's name may ask for it: ${hydra:...}
        try:
            folder = Path(config.hydra.run.dir).absolute()
        finally:
            running.cfg = before
        _made = tuple(level for level in (folder, *folder.parents) if not level.exists())


def remove_empty() -> None:
    """Removes what was made for the output of the running job, as long as it is empty."""
    hydra = HydraConfig.get()
    # The folder of a sweep holds its multirun.yaml, so of a job of it no more than its own can be empty.
    made = (Path(hydra.runtime.output_dir),) if hydra.mode == RunMode.MULTIRUN else _made
    for level in made:
        try:
            level.rmdir()
        except OSError:
            return
