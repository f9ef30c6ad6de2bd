"""Checks of a composed configuration, before data are read or processes started: one sentence each, with the fix.

The trunk is typed by `conf/schema.py`; parts (nodes with a `_target_`) are compared with their constructors'
signatures.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from models.ranges import check_options, check_trunk

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "conf"
PACKAGES = ("data", "evaluation", "kernels", "models", "training")
SLOTS = ("encoder", "processor", "decoder")
# Arguments that the builder gives; a configuration that sets them would be overruled silently.
INJECTED = ("layout", "latent_layout", "target", "outputs_per_variable", "carries_context", "embedding")


def check_config(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raises ValueError, one sentence, at the first thing that cannot be meant."""
    _check_root(config)
    _check_slots(config, overrides)
    for path, node in _parts(config):
        _check_part(path, node)
    check_trunk(config)
    _check_scalars(config)
    _check_condition(config)
    _check_ranks(config)
    _check_attention(config)


def part_class(node: Mapping[str, Any]) -> type:
    """The class of a node's `_target_`, from this project's packages only. Raises ValueError."""
    target = str(node["_target_"])
    module, _, name = target.rpartition(".")
    if module.split(".")[0] not in PACKAGES:
        raise ValueError(
            f"_target_: {target} is outside this project; only {', '.join(PACKAGES)} may be built from a file"
        )
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):
            raise
        found = None
    if not inspect.isclass(found) or found.__module__.split(".")[0] not in PACKAGES:
        raise ValueError(f"_target_: {target} names no class; correct the file that sets it")
    return found


def part_options(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "_target_"}


def _check_root(config: DictConfig) -> None:
    from conf.schema import Train

    known = [item.name for item in fields(Train)]
    for key in config:
        if key not in known:
            raise ValueError(f"there is no setting {key!r}; {_nearest(str(key), known)}")


def _check_slots(config: DictConfig, overrides: Sequence[str]) -> None:
    for group in ("data", "task", "model"):
        if not isinstance(config.get(group), DictConfig):
            raise ValueError(f"{group}={config.get(group)} is no configuration; choose with {group}={_options(group)}")
    for slot in SLOTS:
        node = config.model.get(slot)
        if not isinstance(node, DictConfig) or "_target_" not in node:
            given = node if isinstance(node, str) else "..."
            raise ValueError(
                f"model.{slot}={given} (with a dot) puts a value where a part belongs; "
                f"use model/{slot}={_option(f'model/{slot}', given)}"
            )
    for override in overrides:
        if override.lstrip("+").startswith("model.size="):
            size = override.partition("=")[2]
            raise ValueError(
                f"model.size={size} (with a dot) only changes the label; use model/size={_option('model/size', size)}"
            )


def _parts(config: DictConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, resolved, with its path."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)

    def walk(path: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(node, dict):
            if "_target_" in node:
                yield path, node
            for key, value in node.items():
                yield from walk(f"{path}.{key}" if path else str(key), value)

    yield from walk("", resolved)


def _check_part(path: str, node: dict[str, Any]) -> None:
    part = part_class(node)
    hints = typing.get_type_hints(part.__init__)
    known = {name: item for name, item in inspect.signature(part).parameters.items() if name not in INJECTED}
    options = part_options(node)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{path} has no setting {key!r}; {_nearest(key, list(known))}")
        if value == "???":
            raise ValueError(f"{path}.{key} must be given; type {path}.{key}=<{_spelled(hints.get(key))}>")
        if not _fits(value, hints.get(key, Any)):
            raise ValueError(f"{path}.{key}={value!r} is not {_spelled(hints[key])}; type {path}.{key}=<value>")
    check_options(path, options)
    for key, item in known.items():
        if item.default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"{path} needs {key!r} ({_spelled(hints.get(key))}); add it to the file of this part")


def _check_scalars(config: DictConfig) -> None:
    known = [*_read_scalars(), "name", "size", "condition", *SLOTS]
    for key in config.model:
        if key not in known:
            raise ValueError(f"no part reads model.{key}; {_nearest(str(key), known)}")


def _check_condition(config: DictConfig) -> None:
    condition = config.model.get("condition")
    if isinstance(condition, str) and condition not in ("decoder", "all"):
        raise ValueError(
            f"model.condition={condition} is unknown; use decoder or all (what knows the lead time), or an embedder of "
            "noise levels and labels, model/condition=edm|dit|zero"
        )


def _check_ranks(config: DictConfig) -> None:
    for key in ("cp", "dp"):
        if config[key] is not None and config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be at least 1; leave it out for one rank")
    if config.trainer.timeout <= 0:
        raise ValueError(f"trainer.timeout={config.trainer.timeout:g} must be more than 0 seconds")


def _check_attention(config: DictConfig) -> None:
    import torch

    from models.attention import require_backend

    device = config.trainer.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require_backend(config.model.attention, device)


@cache
def _read_scalars() -> tuple[str, ...]:
    """Shared scalars that some file under conf/model reads."""
    text = "".join(path.read_text() for path in sorted((CONFIG_FOLDER / "model").rglob("*.yaml")))
    return (*sorted(set(re.findall(r"\$\{model\.(\w+)\}", text))),)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value (from YAML) suits an annotation; annotations beyond plain types suit everything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    kind = origin or hint
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return isinstance(value, dict) and (not arguments or all(_fits(item, arguments[1]) for item in value.values()))
    if inspect.isclass(kind) and issubclass(kind, Sequence):
        return isinstance(value, list) and (not arguments or all(_fits(item, arguments[0]) for item in value))
    return True


def _spelled(hint: Any) -> str:
    """An annotation in words."""
    words = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spelled(option) for option in arguments)
    kind = origin or hint
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return "a mapping {name: value}"
    if inspect.isclass(kind) and issubclass(kind, Sequence):
        return "a list [..., ...]"
    return str(hint)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"


def _options(group: str) -> str:
    return "|".join(sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")))


def _option(group: str, name: str) -> str:
    return name if (CONFIG_FOLDER / group / f"{name}.yaml").is_file() else _options(group)
