"""Perceiver IO of other projects in one vocabulary: what is computed in which order, and under which names.

arXiv:2107.14795 on a raw token sequence (B, M, channels): one or several cross-attentions, a latent transformer,
trainable queries, a linear read-out. A project describes its model as a `Perceiver`; the rest follows by rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.field import Field
from data.grids import PlanarGrid, Points
from data.layout import InputLayout, Layout, TargetLayout, Variable

INPUT, TARGET = "tokens", "output"
STEP = 3600  # nominal seconds between frames; a token sequence has one


@dataclass(frozen=True)
class Layer:
    """An attention layer as its source describes it: prefix of its names there, heads, residual to the queries."""

    prefix: str
    heads: int
    residual: bool = True


@dataclass(frozen=True)
class Perceiver:
    """A Perceiver IO in the order of its computation.

    cross: cross-attentions. between: the block of self-attention layers after each cross-attention but the last.
    blocks: the blocks after the last one. A layer that appears more than once is shared. queries: the learned table of
    output queries, or None where the tokens that were read are the queries.
    """

    latents: str
    cross: tuple[Layer, ...]
    between: tuple[tuple[Layer, ...], ...]
    blocks: tuple[tuple[Layer, ...], ...]
    queries: str | None
    decoder: Layer
    head: str
    mlp: str = "gelu"


@dataclass(frozen=True)
class PerceiverSource:
    """A project's Perceiver IO, as `models/convert` reads it.

    model: what state dicts it has. recognises: how a key starts that no other source has. describe: of a config.
    layer_names: our name of each part of an attention layer (cross or self) -> its name there.
    """

    model: str
    recognises: str
    describe: Callable[[Mapping[str, Any]], Perceiver]
    layer_names: Callable[[Layer, bool], dict[str, str]]

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Our names -> theirs. Several of ours point to one of theirs where the source shares more than we do."""
        described = self.describe(config)
        names = {"encoder.latents": described.latents}
        if described.queries is not None:
            names[f"decoder.{TARGET}.table"] = described.queries

        def layer(prefix: str, theirs: Layer, *, cross: bool) -> None:
            for ours, name in self.layer_names(theirs, cross).items():
                for kind in ("weight", "bias"):
                    names[f"{prefix}.{ours}.{kind}"] = f"{theirs.prefix}.{name}.{kind}"

        for index, theirs in enumerate(_distinct(described.cross)):
            layer(f"encoder.cross.{index}", theirs, cross=True)
        for block, layers in enumerate(_distinct(described.between)):
            for index, theirs in enumerate(layers):
                layer(f"encoder.blocks.{block}.{index}", theirs, cross=False)
        for index, theirs in enumerate(_unrolled(described.blocks)):
            layer(f"processor.layers.{index}", theirs, cross=False)
        layer(f"decoder.{TARGET}.layer", described.decoder, cross=True)
        for kind in ("weight", "bias"):
            names[f"decoder.{TARGET}.head.{kind}"] = f"{described.head}.{kind}"
        return names

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: torch.as_tensor(array).detach() for name, array in state.items()}

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        """What to type to build it. weights: by our names; widths are theirs."""
        return _overrides(self.describe(config), weights)

    def layout(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple[int, ...]
    ) -> Layout:
        return token_layout(
            channels=weights["encoder.cross.0.context_norm.weight"].shape[0],
            num_tokens=num_tokens,
            outputs=weights[f"decoder.{TARGET}.head.weight"].shape[0],
            queries=weights[f"decoder.{TARGET}.table"].shape[0],
        )


def token_batch(layout: Layout, tokens: Tensor, valid: Tensor | None = None) -> Batch:
    """A batch of raw token sequences. tokens: (B, M, channels), or (B, *axes, channels) of images or videos. valid:
    (B, M) or (B, *axes) bool, True = keep, or None."""
    batch, described, target = tokens.shape[0], layout.inputs[INPUT], layout.targets[TARGET]
    age = torch.arange(1 - described.frames, 1) * described.step
    shape = (batch, described.frames, *described.grid.shape)
    now = torch.zeros(batch, 1, dtype=torch.int64)
    empty = torch.zeros(batch, 1, len(target.variables), *target.grid.shape)
    given = Field(
        values=tokens.reshape(*shape, -1).movedim(-1, 2),  # a view: (B, T, channels, *grid.shape)
        variables=described.variables,
        grid=described.grid,
        times=age.expand(batch, -1),
        valid=None if valid is None else valid.reshape(shape)[:, :, None],
    )
    wanted = Field(values=empty, variables=target.variables, grid=target.grid, times=now)
    return Batch(inputs={INPUT: given}, targets={TARGET: wanted}, layout=layout)


def _distinct(items: tuple) -> tuple:
    """In order of first use."""
    return tuple(dict.fromkeys(items))


def _unrolled(blocks: tuple[tuple[Layer, ...], ...]) -> tuple[Layer, ...]:
    """The processor's layers: one block where all are the same (it is applied repeatedly), else all in a row."""
    return blocks[0] if len(set(blocks)) == 1 else sum(blocks, ())


def _share(items: tuple) -> str:
    """Which of the encoder's sharing options uses the same weights in these places."""
    return "all" if len(set(items)) == 1 and len(items) > 1 else "all_but_first"


def _overrides(described: Perceiver, weights: Mapping[str, Tensor]) -> list[str]:
    def widths(name: str) -> dict[str, Any]:
        query, value = (weights[f"{name}.attention.{part}.weight"].shape[0] for part in ("query", "value"))
        ratio = weights[f"{name}.mlp.down.weight"].shape
        return {"qk_width": query, "v_width": value, "mlp_ratio": ratio[1] / ratio[0]}

    cross, own, decoder = widths("encoder.cross.0"), widths("processor.layers.0"), widths(f"decoder.{TARGET}.layer")
    layers = _unrolled(described.blocks)
    options = {
        "hidden_size": weights["encoder.latents"].shape[1],
        "num_latents": weights["encoder.latents"].shape[0],
        "num_heads": layers[0].heads,
        "depth": len(layers),
        "mlp": described.mlp,
        "dropout": 0.0,
        "drop_path": 0.0,
        "encoder.embed": False,
        "encoder.cross_heads": described.cross[0].heads,
        "encoder.query_residual": described.cross[0].residual,
        "encoder.num_cross": len(described.cross),
        "encoder.self_per_cross": len(described.between[0]) if described.between else 0,
        "encoder.share_cross": _share(described.cross),
        "encoder.share_self": _share(described.between),
        **{f"encoder.cross_{name}": value for name, value in cross.items()},
        **{f"encoder.{name}": value for name, value in own.items()},
        **{f"processor.{name}": value for name, value in own.items()},
        "processor.num_blocks": len(described.blocks) if len(set(described.blocks)) == 1 else 1,
        "decoder.hidden_size": weights[f"decoder.{TARGET}.layer.query_norm.weight"].shape[0],
        "decoder.num_heads": described.decoder.heads,
        **{f"decoder.{name}": value for name, value in decoder.items()},
        "decoder.query_residual": described.decoder.residual,
        "decoder.queries": "index" if described.queries is None else "trainable",
        "decoder.features": int(described.queries is None),
        "decoder.moment": False,
        "decoder.output_norm": False,
    }
    return [
        "model=perceiver",
        "model/size=small",
        *(f"model.{name}={typed(value)}" for name, value in options.items()),
    ]


def typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def token_layout(*, channels: int, num_tokens: int | tuple[int, ...], outputs: int, queries: int) -> Layout:
    """Layout of a token sequence, an image (two axes) or a video (three) in, and a sequence of outputs.

    Points have no place, which nothing reads; pixels have one.
    """
    axes = (num_tokens,) if isinstance(num_tokens, int) else num_tokens
    frames = axes[0] if len(axes) == 3 else 1
    if len(axes) == 1:
        grid = Points(np.zeros((axes[0], 2)))
    else:
        grid = PlanarGrid.regular(*axes[-2:], units="pixels")
    return Layout(
        inputs={INPUT: InputLayout(_variables("feature", channels), grid, frames, step=STEP)},
        targets={TARGET: TargetLayout(_variables("output", outputs), Points(np.zeros((queries, 2))), lead_times=(0,))},
    )


def _variables(name: str, count: int) -> tuple[Variable, ...]:
    return tuple(Variable(f"{name}_{index}") for index in range(count))
