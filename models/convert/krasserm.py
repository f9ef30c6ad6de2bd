"""krasserm/perceiver-io: `PerceiverIO` on a token sequence (names and class defaults of 0.11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.convert.perceiver import Layer, Perceiver, PerceiverSource

ATTENTION = {
    "query_norm": "q_norm",
    "context_norm": "kv_norm",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
}
MLP = {"mlp_norm": "1.module.0", "mlp.up": "1.module.1", "mlp.down": "1.module.3"}


def _describe(config: Mapping[str, Any]) -> Perceiver:
    """Arguments of `PerceiverEncoder`, and of `PerceiverDecoder` as decoder_*; absent entries are class defaults.

    Iteration 1 has its own cross-attention and, unless shared, its own block.
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


def _layer_names(layer: Layer, cross: bool) -> dict[str, str]:
    """A residual around the attention is a module of its own there and adds a level to the names."""
    level = "0.module." if layer.residual else "0."
    names = ATTENTION if cross else {**ATTENTION, "query_norm": "norm"}
    attention = {ours: level + theirs for ours, theirs in names.items() if cross or ours != "context_norm"}
    return attention | MLP


SOURCE = PerceiverSource(
    model="krasserm's PerceiverIO with an identity input adapter, trainable queries and a linear output adapter",
    recognises="0.latent_provider.",
    describe=_describe,
    layer_names=_layer_names,
)
