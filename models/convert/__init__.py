"""Weights of other projects to ours and back, by rule: names are translated, shapes and head counts are read.

    overrides, layout, weights = convert("transformers", state_dict, config)
    model = build(overrides, layout)
    model.load_state_dict(weights)
    state_dict = export("transformers", model, config)

A source is an entry of `SOURCES`: a `model` (what its weights are of), a key prefix that `recognises` it,
`canonical(state_dict, config)` (tensors, by the names that the rule knows), where that changes tensors also
`original(tensors, config)`, its inverse, `names(config)` (our name of a weight -> theirs), `overrides(config, weights)`
and `layout(config, weights, num_tokens)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data.layout import Layout
from models.convert import (
    climanet,
    healda,
    krasserm,
    lucidrains,
    perceiver_ar,
    physicsnemo,
    transformers,
    transformers_tasks,
)
from models.convert.climanet import ClimaNetSource
from models.convert.lucidrains import LucidrainsSource
from models.convert.perceiver import TARGET, PerceiverSource, token_batch
from models.convert.perceiver_ar import PerceiverARSource
from models.convert.physicsnemo import PhysicsNeMoSource
from models.convert.transformers_tasks import UNSUPPORTED

__all__ = ["SOURCES", "TARGET", "convert", "export", "recognise", "token_batch"]

SOURCES: dict[str, PerceiverSource | PerceiverARSource | PhysicsNeMoSource | LucidrainsSource | ClimaNetSource] = {
    "transformers": transformers.SOURCE,
    "perceiver_io": krasserm.SOURCE,
    "perceiver_ar": perceiver_ar.SOURCE,
    "physicsnemo": physicsnemo.SOURCE,
    "healda": healda.SOURCE,
    "transformers_text": transformers_tasks.TEXT,
    "transformers_flow": transformers_tasks.FLOW,
    "transformers_image_learned": transformers_tasks.LEARNED_IMAGE,
    "transformers_text_classes": transformers_tasks.TEXT_CLASSES,
    "transformers_image": transformers_tasks.IMAGE,
    "lucidrains": lucidrains.SOURCE,
    "lucidrains_0.9": lucidrains.SOURCE_0_9,
    "climanet": climanet.SOURCE,
}


def convert(
    source: str, state_dict: Mapping[str, Any], config: Mapping[str, Any], *, num_tokens: int | tuple[int, ...] = 1
) -> tuple[list[str], Layout, dict[str, Tensor]]:
    """(overrides, layout, state dict) of our model that computes the same function.

    state_dict: tensors or arrays by the source's names. config: the source's configuration as plain values. num_tokens:
    length of the input sequence in the layout, or sizes of the axes of an image or video; no weight depends on it.
    Raises ValueError for unknown sources, for weights that the rule leaves unused or misses, and for options that our
    model does not have.
    """
    rule = _source(source)
    names = rule.names(config)
    tensors = rule.canonical(state_dict, config)
    unused, missing = set(tensors) - set(names.values()), set(names.values()) - set(tensors)
    if unused or missing:
        kind, keys = ("missing", missing) if missing else ("unknown", unused)
        raise ValueError(f"{source} weights: {min(keys)!r} is {kind} ({len(keys)} such); give those of {rule.model}")
    weights = {ours: tensors[theirs].clone() for ours, theirs in names.items()}
    return rule.overrides(config, weights), rule.layout(config, weights, num_tokens), weights


def export(source: str, model: nn.Module, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The source's state dict with the weights of our model, built for the same config: the inverse of `convert`.

    Raises ValueError where weights that the source shares have been trained apart, or where the config is another's.
    """
    rule = _source(source)
    weights = model.state_dict()
    names = rule.names(config)
    if set(names) != set(weights):
        key = min(set(names) ^ set(weights))
        raise ValueError(f"this model is no {source} model of that config: {key!r} is in one of them only")
    exported: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        if theirs in exported and not torch.equal(exported[theirs], weights[ours]):
            raise ValueError(
                f"{source} shares {theirs!r}, but the model's {ours!r} differs from it; export an untied copy"
            )
        exported[theirs] = weights[ours].clone()
    return rule.original(exported, config) if hasattr(rule, "original") else exported


def recognise(state_dict: Mapping[str, Any]) -> str:
    """The source whose state dict this is. Raises ValueError when none of them fits, or why one is not supported."""
    for start, why in UNSUPPORTED.items():
        if any(key.startswith(start) for key in state_dict):
            raise ValueError(why)
    for name, source in SOURCES.items():
        if any(key.startswith(source.recognises) for key in state_dict):
            return name
    raise ValueError(
        f"no known source has weights like {min(state_dict, default='none')!r}; known: {', '.join(SOURCES)}"
    )


def _source(name: str) -> PerceiverSource | PerceiverARSource | PhysicsNeMoSource | LucidrainsSource | ClimaNetSource:
    if name not in SOURCES:
        raise ValueError(f"unknown source of weights {name!r}; use one of {', '.join(SOURCES)}")
    return SOURCES[name]
