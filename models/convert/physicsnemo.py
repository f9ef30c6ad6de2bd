"""PhysicsNeMo: `VideoHealDA` (names and defaults of 2.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.healpix import HEALPixGrid
from data.layout import InputLayout, Layout, ObservationLayout, TargetLayout, Variable
from models.conditioning.noise_level import NoiseFeatures

INPUT, TARGET = "static", "analysis"
STEP = 6 * 3600
DEFAULTS = {
    "in_channels": 2,
    "out_channels": 74,
    "hidden_size": 1536,
    "num_layers": 32,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "level_in": 6,
    "level_model": 5,
    "time_length": 8,
    "condition_embed_dim": 128,
    "noise_channels": 128,
    "condition_dim": 0,
    "temporal_attention": True,
    "is_causal": True,
    "linear_attention": True,
    "use_rope": True,
    "rope_base": 100,
    "temporal_causal_window": None,
    "drop_path": 0.1,
    "drop_path_zero_first_n_blocks": 4,
    "qk_norm_type": "RMSNorm",
    "qk_norm_affine": False,
    "obs_token_dim": 32,
    "obs_meta_dim": 50,
    "obs_type_embed_dim": 4,
    "channel_embed_dim": 16,
    "platform_embed_dim": 8,
    "obs_film_hidden_dim": 64,
    "pixel_attn_n_q_heads": 64,
    "pixel_attn_n_kv_heads": 2,
    "pixel_attn_head_dim": 32,
    "pixel_attn_use_proj_bias": True,
}
_QK_NORMS = {"RMSNorm": "rms", "LayerNorm": "layer", None: "none"}
_WEIGHT, _BOTH = ("weight",), ("weight", "bias")


class PhysicsNeMoSource:
    """`VideoHealDA`, as `models/convert` reads it. config: its constructor arguments; absent ones are defaults."""

    model = "VideoHealDA"
    recognises = "dit."

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Our names -> theirs."""
        given = {**DEFAULTS, **config}
        names = {
            "encoder.position": "dit.tokenizer.pos_embed",
            "condition.noise.frequencies": "dit.conditioning_embedder.map_noise.freqs",
        }

        def layer(ours: str, theirs: str, kinds: tuple[str, ...] = _BOTH) -> None:
            names.update({f"{ours}.{kind}": f"{theirs}.{kind}" for kind in kinds})

        layer("encoder.embed", "dit.tokenizer.conv")
        layer("condition.up", "dit.conditioning_embedder.map_layer0")
        layer("condition.out", "dit.conditioning_embedder.map_layer1")
        if given["condition_dim"]:
            layer("condition.label", "dit.conditioning_embedder.map_condition")
        layer(f"decoder.{TARGET}.norm.linear", "dit.detokenizer.adaptive_modulation.1")
        layer(f"decoder.{TARGET}.head", "dit.detokenizer.conv_t")
        tables = {"type": "embed_table", "channel": "channel_embedding", "platform": "platform_embedding"}
        for ours, theirs in tables.items():
            if ours != "platform" or given["platform_embed_dim"]:
                layer(f"encoder.observations.{ours}_table", f"obs_tokenizer.{theirs}", _WEIGHT)
        for ours, theirs in {"expand": 0, "norm": 1, "project": 3}.items():
            layer(f"encoder.observations.{ours}", f"obs_tokenizer.cond_mlp.{theirs}")
        for index in range(given["num_layers"]):
            for ours, theirs, kinds in self._block(given):
                layer(f"processor.blocks.{index}.{ours}", f"dit.blocks.{index}.{theirs}", kinds)
        return names

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state dict with every tensor of `names` under its name there."""
        tensors = {name: torch.as_tensor(array).detach() for name, array in state.items()}
        embedder = "dit.conditioning_embedder"
        return self.with_frequencies(tensors, f"{embedder}.map_noise.freqs", f"{embedder}.map_layer0.weight")

    @staticmethod
    def with_frequencies(tensors: dict[str, Tensor], frequencies: str, layer: str) -> dict[str, Tensor]:
        """Older state dicts leave out the frequencies of the noise level: constants, as many as `layer` reads."""
        if frequencies not in tensors and layer in tensors:
            tensors[frequencies] = NoiseFeatures(tensors[layer].shape[1]).frequencies
        return tensors

    def _block(self, given: Mapping[str, Any]) -> list[tuple[str, str, tuple[str, ...]]]:
        """(our part, theirs, its tensors) of one block."""
        parts = [
            ("norm.linear", "norm1_modulation.modulation.1", _BOTH),
            ("spatial.qkv", "attention.attn_op.qkv", _BOTH),
            ("spatial.output", "attention.attn_op.proj", _BOTH),
            ("mlp.up", "linear.layers.0", _BOTH),
            ("mlp.down", "linear.layers.2", _BOTH),
            ("observations_norm.linear", "cross_attn_modulation.modulation.1", _BOTH),
            ("observations.key", "cross_attention.k_proj", _WEIGHT),
        ]
        biases = _BOTH if given["pixel_attn_use_proj_bias"] else _WEIGHT
        for ours, theirs in {"query": "q_proj", "value": "v_proj", "output": "out_proj"}.items():
            parts.append((f"observations.{ours}", f"cross_attention.{theirs}", biases))
        if given["temporal_attention"]:
            parts += [
                ("temporal_norm.linear", "temporal_attn_modulation.modulation.1", _BOTH),
                ("temporal.qkv", "temporal_attention.qkv", _BOTH),
                ("temporal.output", "temporal_attention.proj", _BOTH),
            ]
        if given["qk_norm_type"] is not None and given["qk_norm_affine"]:
            kinds = _BOTH if given["qk_norm_type"] == "LayerNorm" else _WEIGHT
            parts += [(f"spatial.{one}_norm", f"attention.attn_op.{one[0]}_norm", kinds) for one in ("query", "key")]
        return parts

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        """What to type to build it. weights: by our names."""
        given = {**DEFAULTS, **config}
        values = {
            "model.hidden_size": given["hidden_size"],
            "model.depth": given["num_layers"],
            "model.num_heads": given["num_heads"],
            "model.mlp_ratio": float(given["mlp_ratio"]),
            "model.patch_size": 2 ** (given["level_in"] - given["level_model"]),
            "model.drop_path": given["drop_path"],
            "model.observation_heads": given["pixel_attn_n_q_heads"],
            "model.observation_kv_heads": given["pixel_attn_n_kv_heads"],
            "model.condition.size": given["condition_embed_dim"],
            "model.condition.num_features": given["noise_channels"],
            "model.condition.label_size": given["condition_dim"],
            "model.encoder.token_size": given["obs_token_dim"],
            "model.encoder.type_size": given["obs_type_embed_dim"],
            "model.encoder.channel_size": given["channel_embed_dim"],
            "model.encoder.platform_size": given["platform_embed_dim"],
            "model.encoder.film_size": given["obs_film_hidden_dim"],
            "model.processor.temporal": given["temporal_attention"],
            "model.processor.softmax": not given["linear_attention"],
            "model.processor.causal": given["is_causal"],
            "model.processor.window": given["temporal_causal_window"],
            "model.processor.rotary_base": float(given["rope_base"]) if given["use_rope"] else None,
            "model.processor.qk_norm": _QK_NORMS[given["qk_norm_type"]],
            "model.processor.qk_norm_affine": given["qk_norm_affine"],
            "model.processor.observation_head_dim": given["pixel_attn_head_dim"],
            "model.processor.projection_bias": given["pixel_attn_use_proj_bias"],
            "model.processor.drop_path_from": given["drop_path_zero_first_n_blocks"],
        }
        typed = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
        return ["model=healda_v2", "model/size=tiny", *typed]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int) -> Layout:
        """Static inputs on the fine grid, observations, an analysis at every frame; channels have no names."""
        given = {**DEFAULTS, **config}
        grid, frames = HEALPixGrid(given["level_in"], "padxy"), given["time_length"]

        def unnamed(count: int, kind: str) -> tuple[Variable, ...]:
            return tuple(Variable(f"{kind}_{number}") for number in range(count))

        sizes = {
            f"num_{kind}s": weights[f"encoder.observations.{kind}_table.weight"].shape[0]
            for kind in ("channel", "type")
        }
        platforms = weights.get("encoder.observations.platform_table.weight")
        observed = ObservationLayout(
            **sizes,
            num_platforms=sizes["num_channels"] if platforms is None else platforms.shape[0],
            num_features=given["obs_meta_dim"],
            frames=frames,
            step=STEP,
        )
        times = tuple((frame + 1 - frames) * STEP for frame in range(frames))
        return Layout(
            inputs={INPUT: InputLayout(unnamed(given["in_channels"], "input"), grid, frames, STEP)},
            targets={TARGET: TargetLayout(unnamed(given["out_channels"], "output"), grid, times)},
            observations=observed,
        )


SOURCE = PhysicsNeMoSource()
