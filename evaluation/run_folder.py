"""A finished run on disk: its configuration, what it logged, and its model, data and task built again."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.layout import Layout


@dataclass(frozen=True)
class RunFolder:
    """path: a run's `hydra.run.dir`."""

    path: Path

    @staticmethod
    def open(text: str | Path) -> RunFolder:
        """The run at a path: its folder, or a checkpoint inside it. Raises ValueError where there is none."""
        path = Path(text).expanduser()
        if path.parent.name == "checkpoints":
            path = path.parent.parent
        if not path.is_dir():
            raise ValueError(
                f"run={text} is neither a folder nor a run of the MLflow store; give the output folder of a run"
            )
        if not (path / "config.yaml").is_file():
            raise ValueError(
                f"run={text} is not the folder of a run (it has no config.yaml); give one that train.py wrote"
            )
        return RunFolder(path)

    @cached_property
    def config(self) -> DictConfig:
        """The run's resolved configuration. Raises ValueError where it is damaged."""
        import yaml

        try:
            config = OmegaConf.load(self.path / "config.yaml")
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path / 'config.yaml'} cannot be read ({str(error).splitlines()[0]})") from error
        missing = [name for name in ("data", "task", "model") if not isinstance(config.get(name), DictConfig)]
        if missing:
            raise ValueError(f"{self.path / 'config.yaml'} has no {missing[0]}; give a folder that train.py wrote")
        return config

    @property
    def overrides(self) -> list[str]:
        path = self.path / "overrides.txt"
        return path.read_text().split("\n")[:-1] if path.is_file() else []

    @cached_property
    def metrics(self) -> list[dict]:
        """Lines of `metrics.jsonl`; one cut short by a killed process is left out."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def outcome(self) -> dict:
        """`outcome.json`: seconds, samples per second; {} where the run did not finish."""
        return self._json("outcome.json")

    @property
    def scores(self) -> dict:
        """`scores.json`, or {} where the run has not been scored."""
        return self._json("scores.json")

    def _json(self, name: str) -> dict:
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it") from error

    def checkpoint(self, name: str) -> Path:
        """The folder of checkpoint `best`, `last` or `step_00000100`. Raises ValueError where there is none."""
        folder = self.path / "checkpoints" / name
        if not (folder / "config.json").is_file():
            parent = folder.parent
            found = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
            allowed = f"it has {', '.join(found)}" if found else "train it longer, until it has saved one"
            raise ValueError(f"run={self.path} has no checkpoint {name!r}; {allowed}")
        return folder

    def layout(self, checkpoint: str) -> Layout:
        """What the model of a checkpoint was built for. Raises ValueError where the file is damaged."""
        path = self.checkpoint(checkpoint) / "config.json"
        try:
            return Layout.from_dict(json.loads(path.read_text())["layout"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); try checkpoint=last") from error

    def data(self):
        """The GriddedData of the run."""
        return self._part("data")

    def task(self):
        """The task of the run."""
        return self._part("task")

    def _part(self, name: str):
        """Built from classes of this project alone: the folder may come from a stranger."""
        return _built(name, OmegaConf.to_container(self.config[name], resolve=True), self.path / "config.yaml")

    def model(self, checkpoint: str):
        """The model of a checkpoint, in evaluation mode, its averaged weights where it has them."""
        from safetensors import SafetensorError

        from models import load

        folder = self.checkpoint(checkpoint)
        try:
            return load(folder)
        except (SafetensorError, json.JSONDecodeError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{folder} is damaged or of another version ({reason}); try checkpoint=last") from error


def _built(name: str, node: dict, file: Path):
    """The part of a node with a `_target_`, and those inside it. Raises ValueError where another version wrote it."""
    from models.checks import part_class, part_options

    part, options = part_class(node), part_options(node)
    known = inspect.signature(part).parameters
    strange = [key for key in options if key not in known]
    lacking = [key for key, item in known.items() if item.default is item.empty and key not in options]
    if strange or lacking:
        said = [f"it sets {name}.{key}, which does not exist" for key in strange]
        said += [f"{name}.{key} is missing" for key in lacking]
        raise ValueError(f"{file} is of another version: {', '.join(said)}; rename or add it in that file")
    for key, item in options.items():
        if isinstance(item, dict) and "_target_" in item:
            options[key] = _built(f"{name}.{key}", item, file)
    return part(**options)
