"""Weights of other projects to ours and back, by rule: names are translated, shapes and head counts are read.

    overrides, layout, weights = convert("transformers", state_dict, config)
    model = build(overrides, layout); model.load_state_dict(weights)
    state_dict = export("transformers", model, config)

A source is an entry of `SOURCES`: how to recognise it, what it is in our vocabulary (`Perceiver`) and the names of its
weights. All of them are the Perceiver IO of arXiv:2107.14795: a raw token sequence (B, M, channels), one or several
cross-attentions, a latent transformer, trainable queries, a linear read-out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.batch import Batch, Field, InputLayout, Layout, TargetLayout, Variable
from data.grids import Points

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
    blocks: the blocks after the last one. A layer that appears more than once is shared.
    """

    latents: str
    cross: tuple[Layer, ...]
    between: tuple[tuple[Layer, ...], ...]
    blocks: tuple[tuple[Layer, ...], ...]
    queries: str
    decoder: Layer
    head: str
    mlp: str = "gelu"


@dataclass(frozen=True)
class Source:
    """model: what state dicts it has. recognises: how a key starts that no other source has. describe: from its config.

    names: our name of each part of an attention layer (cross or self) -> its name there.
    """

    model: str
    recognises: str
    describe: Callable[[Mapping[str, Any]], Perceiver]
    names: Callable[[Layer, bool], dict[str, str]]


def convert(
    source: str, state_dict: Mapping[str, Any], config: Mapping[str, Any], *, num_tokens: int = 1
) -> tuple[list[str], Layout, dict[str, Tensor]]:
    """(overrides, layout, state dict) of our model that computes the same function.

    state_dict: tensors or arrays by the source's names. config: the source's configuration as plain values. num_tokens:
    length of the input sequence in the layout; no weight depends on it. Raises ValueError for unknown sources, for
    weights that the rule leaves unused or misses, and for options that our model does not have.
    """
    rule = _source(source)
    described = rule.describe(config)
    names = _translation(rule, described)
    unused, missing = set(state_dict) - set(names.values()), set(names.values()) - set(state_dict)
    if unused or missing:
        kind, keys = ("missing", missing) if missing else ("unknown", unused)
        raise ValueError(f"{source} weights: {min(keys)!r} is {kind} ({len(keys)} such); give those of {rule.model}")
    weights = {ours: torch.as_tensor(np.asarray(state_dict[theirs])).clone() for ours, theirs in names.items()}
    return _overrides(described, weights), _layout(weights, num_tokens), weights


def export(source: str, model: nn.Module, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The source's state dict with the weights of our model, built for the same config: the inverse of `convert`.

    Raises ValueError where weights that the source shares have been trained apart, or where the config is another's.
    """
    rule = _source(source)
    weights = model.state_dict()
    names = _translation(rule, rule.describe(config))
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
    return exported


def recognise(state_dict: Mapping[str, Any]) -> str:
    """The source whose state dict this is. Raises ValueError when none of them fits."""
    for name, source in SOURCES.items():
        if any(key.startswith(source.recognises) for key in state_dict):
            return name
    raise ValueError(
        f"no known source has weights like {min(state_dict, default='none')!r}; known: {', '.join(SOURCES)}"
    )


def token_batch(layout: Layout, tokens: Tensor, valid: Tensor | None = None) -> Batch:
    """A batch of raw token sequences. tokens: (B, M, channels). valid: (B, M) bool, True = keep, or None."""
    batch = tokens.shape[0]
    now = torch.zeros(batch, 1, dtype=torch.int64)
    target = layout.targets[TARGET]
    empty = torch.zeros(batch, 1, len(target.variables), target.grid.num_points)
    given = Field(
        values=tokens.transpose(1, 2)[:, None],  # a view: (B, 1, channels, M)
        variables=layout.inputs[INPUT].variables,
        grid=layout.inputs[INPUT].grid,
        times=now,
        valid=None if valid is None else valid[:, None, None],
    )
    wanted = Field(values=empty, variables=target.variables, grid=target.grid, times=now)
    return Batch(inputs={INPUT: given}, targets={TARGET: wanted}, layout=layout)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"unknown source of weights {name!r}; use one of {', '.join(SOURCES)}")
    return SOURCES[name]


def _translation(rule: Source, described: Perceiver) -> dict[str, str]:
    """Our names -> theirs. Several of ours point to one of theirs where the source shares more than we do."""
    names = {"encoder.latents": described.latents, f"decoder.{TARGET}.table": described.queries}

    def layer(prefix: str, theirs: Layer, *, cross: bool) -> None:
        for ours, name in rule.names(theirs, cross).items():
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
    """What to type to build it. Widths are those of the weights."""

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
        "decoder.hidden_size": weights[f"decoder.{TARGET}.table"].shape[1],
        "decoder.num_heads": described.decoder.heads,
        **{f"decoder.{name}": value for name, value in decoder.items()},
        "decoder.query_residual": described.decoder.residual,
        "decoder.queries": "trainable",
        "decoder.features": 0,
        "decoder.moment": False,
        "decoder.output_norm": False,
    }
    return [
        "model=perceiver",
        "model/size=small",
        *(f"model.{name}={_typed(value)}" for name, value in options.items()),
    ]


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _layout(weights: Mapping[str, Tensor], num_tokens: int) -> Layout:
    """Tokens and outputs are points without a place: nothing in the model reads where they are."""
    channels = weights["encoder.cross.0.context_norm.weight"].shape[0]
    queries = weights[f"decoder.{TARGET}.table"].shape[0]
    outputs = weights[f"decoder.{TARGET}.head.weight"].shape[0]
    nowhere = [Points(np.zeros((count, 2))) for count in (num_tokens, queries)]
    return Layout(
        inputs={INPUT: InputLayout(_variables("feature", channels), nowhere[0], frames=1, step=STEP)},
        targets={TARGET: TargetLayout(_variables("output", outputs), nowhere[1], lead_times=(0,))},
    )


def _variables(name: str, count: int) -> tuple[Variable, ...]:
    return tuple(Variable(f"{name}_{index}") for index in range(count))


# Names that transformers and krasserm give to the parts of a layer.
_TRANSFORMERS = {
    "query_norm": "attention.self.layernorm1",
    "context_norm": "attention.self.layernorm2",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "mlp_norm": "layernorm",
    "mlp.up": "mlp.dense1",
    "mlp.down": "mlp.dense2",
}
_KRASSERM = {
    "query_norm": "q_norm",
    "context_norm": "kv_norm",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
}
_KRASSERM_MLP = {"mlp_norm": "1.module.0", "mlp.up": "1.module.1", "mlp.down": "1.module.3"}

# `hidden_act` of transformers -> our name of the MLP.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}


def _describe_transformers(config: Mapping[str, Any]) -> Perceiver:
    """`PerceiverConfig` with the `PerceiverBasicDecoder` arguments as decoder_*; absent entries are class defaults.

    `layer_norm_eps` is in the config but not in the model: every norm there has 1e-5, as ours.
    """
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"transformers hidden_act={activation!r} is not known; allowed: {', '.join(_ACTIVATIONS)}")
    heads = config.get("num_self_attention_heads", 8)
    layers = config.get("num_self_attends_per_block", 26)
    block = tuple(Layer(f"encoder.self_attends.{index}", heads) for index in range(layers))
    cross_heads, residual = config.get("num_cross_attention_heads", 8), config.get("use_query_residual", True)
    return Perceiver(
        latents="embeddings.latents",
        cross=(Layer("encoder.cross_attention", cross_heads, residual),),
        between=(),
        blocks=(block,) * config.get("num_blocks", 1),
        queries="decoder.output_position_encodings.position_embeddings",
        decoder=Layer(
            "decoder.decoding_cross_attention",
            config.get("decoder_heads", 1),
            config.get("decoder_query_residual", False),
        ),
        head="decoder.final_layer",
        mlp=_ACTIVATIONS[activation],
    )


def _names_transformers(layer: Layer, cross: bool) -> dict[str, str]:
    return {ours: theirs for ours, theirs in _TRANSFORMERS.items() if cross or ours != "context_norm"}


def _describe_krasserm(config: Mapping[str, Any]) -> Perceiver:
    """Arguments of `PerceiverEncoder`, and of `PerceiverDecoder` as decoder_*; absent entries are class defaults.

    Iteration 1 has its own cross-attention and, if not shared, its own block; blocks beyond the cross-attentions follow.
    """
    num_cross, num_blocks = config.get("num_cross_attention_layers", 1), config.get("num_self_attention_blocks", 1)
    heads, layers = config.get("num_self_attention_heads", 4), config.get("num_self_attention_layers_per_block", 6)
    cross_heads = config.get("num_cross_attention_heads", 4)

    def block(name: str) -> tuple[Layer, ...]:
        return tuple(Layer(f"0.{name}.{index}", heads) for index in range(layers))

    later_cross = "cross_attn_1" if config.get("first_cross_attention_layer_shared", False) else "cross_attn_n"
    later_block = "self_attn_1" if config.get("first_self_attention_block_shared", True) else "self_attn_n"
    crosses = ["cross_attn_1", *[later_cross] * (num_cross - 1)]
    blocks = [block("self_attn_1"), *[block(later_block)] * (num_blocks - 1)]
    return Perceiver(
        latents="0.latent_provider._query",
        cross=tuple(Layer(f"0.{name}", cross_heads) for name in crosses),
        between=tuple(blocks[: num_cross - 1]),
        blocks=tuple(blocks[num_cross - 1 :]),
        queries="1.output_query_provider._query",
        decoder=Layer(
            "1.cross_attn",
            config.get("decoder_num_cross_attention_heads", 4),
            config.get("decoder_cross_attention_residual", True),
        ),
        head="1.output_adapter.linear",
    )


def _names_krasserm(layer: Layer, cross: bool) -> dict[str, str]:
    """A residual around the attention is a module of its own there and adds a level to the names."""
    level = "0.module." if layer.residual else "0."
    names = _KRASSERM if cross else {**_KRASSERM, "query_norm": "norm"}
    attention = {ours: level + theirs for ours, theirs in names.items() if cross or ours != "context_norm"}
    return attention | _KRASSERM_MLP


SOURCES = {
    "transformers": Source(
        model="PerceiverModel with a PerceiverBasicDecoder of trainable queries",
        recognises="embeddings.latents",
        describe=_describe_transformers,
        names=_names_transformers,
    ),
    "perceiver_io": Source(
        model="krasserm's PerceiverIO with an identity input adapter, trainable queries and a linear output adapter",
        recognises="0.latent_provider.",
        describe=_describe_krasserm,
        names=_names_krasserm,
    ),
}
