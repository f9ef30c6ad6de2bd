"""krasserm/perceiver-io: `CausalSequenceModel`, its Perceiver AR (names and class defaults of 0.11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.layout import Layout, SequenceLayout
from models.convert.krasserm import ATTENTION, MLP

TOKENS = "tokens"  # the input, and the target
DEFAULTS = {
    "num_heads": 8,
    "num_self_attention_layers": 8,
    "num_self_attention_rotary_layers": 1,
    "self_attention_widening_factor": 4,
    "cross_attention_widening_factor": 4,
    "cross_attention_dropout": 0.5,
    "post_attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "max_latents": 512,
    "output_norm": False,
    "output_bias": True,
    "abs_pos_emb": True,
    "max_seq_len": 4096,
}


class PerceiverARSource:
    """A Perceiver AR as `models/convert` reads it.

    config: a `CausalSequenceModelConfig`; absent entries are class defaults.
    """

    model = "krasserm's CausalSequenceModel"
    recognises = "input_adapter.txt_embedding."

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: torch.as_tensor(array).detach() for name, array in state.items()}

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Our names -> theirs."""
        given = {**DEFAULTS, **config}
        names = {
            "encoder.embedding.weight": "input_adapter.txt_embedding.weight",
            "processor.rotary.rates": "input_adapter.frq_pos_encoding.inv_freq",
        }
        if given["abs_pos_emb"]:
            names["encoder.position.weight"] = "input_adapter.pos_embedding.weight"
        names |= _layer("processor.cross", "cross_attention", {**ATTENTION, **MLP}, output_bias=True)
        own = {
            "query_norm": "norm",
            **{ours: name for ours, name in ATTENTION.items() if ours.startswith("attention.")},
        }
        for index in range(given["num_self_attention_layers"]):
            names |= _layer(f"processor.layers.{index}", f"self_attention.{index}", own | MLP, output_bias=False)
        if given["output_norm"]:
            names |= {f"decoder.{TOKENS}.norm.{kind}": f"out_norm.{kind}" for kind in ("weight", "bias")}
        if given["output_bias"]:
            names[f"decoder.{TOKENS}.bias"] = "output_adapter.bias"
        return names

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        """What to type to build it. weights: by our names."""
        given = {**DEFAULTS, **config}
        hidden, heads, turned = (
            weights["encoder.embedding.weight"].shape[1],
            given["num_heads"],
            2 * weights["processor.rotary.rates"].shape[0],
        )
        layers = given["num_self_attention_rotary_layers"]
        options = {
            "hidden_size": hidden,
            "depth": given["num_self_attention_layers"],
            "num_heads": heads,
            "mlp": "gelu",
            "mlp_ratio": float(given["self_attention_widening_factor"]),
            "dropout": given["residual_dropout"],
            "encoder.learned_positions": given["abs_pos_emb"],
            "processor.cross_mlp_ratio": float(given["cross_attention_widening_factor"]),
            "processor.rotary_layers": "null" if layers == -1 else layers,
            "processor.rotary_share": turned / (hidden // heads),
            "processor.prefix_dropout": given["cross_attention_dropout"],
            "processor.attention_dropout": given["post_attention_dropout"],
            "decoder.output_norm": given["output_norm"],
            "decoder.bias": given["output_bias"],
        }
        typed = (f"model.{name}={str(value).lower()}" for name, value in options.items())
        return ["model=perceiver_ar", "model/size=small", *typed]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int) -> Layout:
        """The longest sequence and the most latents of the config; num_tokens is not needed."""
        given = {**DEFAULTS, **config}
        vocab_size = weights["encoder.embedding.weight"].shape[0]
        return Layout(
            inputs={TOKENS: SequenceLayout(vocab_size, given["max_seq_len"])},
            targets={TOKENS: SequenceLayout(vocab_size, given["max_latents"])},
        )


def _layer(ours: str, theirs: str, parts: Mapping[str, str], *, output_bias: bool) -> dict[str, str]:
    """Weights of a layer: norms have biases, and the attention's output may have one."""
    names = {}
    for part, name in parts.items():
        biased = part.endswith("norm") or (part == "attention.output" and output_bias)
        level = "" if name.startswith("1.") else "0.module."  # the MLP has its level in its name
        for kind in ("weight", "bias") if biased else ("weight",):
            names[f"{ours}.{part}.{kind}"] = f"{theirs}.{level}{name}.{kind}"
    return names


SOURCE = PerceiverARSource()
