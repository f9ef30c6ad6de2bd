"""transformers: `PerceiverModel` with a `PerceiverBasicDecoder` of trainable queries (names and defaults of 5.23)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.convert.perceiver import Layer, Perceiver, PerceiverSource

_NAMES = {
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


def describe(config: Mapping[str, Any]) -> Perceiver:
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


def layer_names(layer: Layer, cross: bool) -> dict[str, str]:
    return {ours: theirs for ours, theirs in _NAMES.items() if cross or ours != "context_norm"}


SOURCE = PerceiverSource(
    model="PerceiverModel with a PerceiverBasicDecoder of trainable queries",
    recognises="embeddings.latents",
    describe=describe,
    layer_names=layer_names,
)
