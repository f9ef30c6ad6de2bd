"""HealDA's training package (NVlabs/HealDA): PhysicsNeMo's `VideoHealDA` by the names it was trained with.

Its configuration is written in the words of `VideoHealDA`'s constructor (`models/convert/physicsnemo.py`); recipes
named d128 have 12 heads, and channel tables may have 2048 rows. Where versions of the package name the tensors of a
part differently, they are found by role and shape inside the part, and written back by the names below. Rotation tables
are constants and are left out.

The package's last norm of a block, before the MLP, adds 1e-5 to the variance where PhysicsNeMo and we add 1e-6: outputs
differ by 1e-6 of their largest value (two layers, random weights), a tenth of what the order of sums changes. Its
switch `temporal_attn_legacy_scaling_bug` scales temporal products by the number of frames; such weights are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.convert.physicsnemo import PhysicsNeMoSource

# PhysicsNeMo's name -> the package's, in this order.
_RENAMED = (
    ("dit.tokenizer.pos_embed", "pos_embed.pos_embed"),
    ("dit.tokenizer.conv.", "pos_embed.proj."),
    ("dit.conditioning_embedder.", "noise_embed."),
    ("dit.detokenizer.adaptive_modulation.1.", "proj_out_1."),
    ("dit.detokenizer.conv_t.", "patch_decode."),
    ("dit.blocks.", "transformer_blocks."),
    ("obs_tokenizer.", "backbone_obs_tokenizer."),
    (".norm1_modulation.modulation.1.", ".norm1.linear."),
    (".attention.attn_op.", ".attn1."),
    (".temporal_attn_modulation.modulation.1.", ".temporal_attn_norm.linear."),
    (".temporal_attention.", ".temporal_attn."),
    (".cross_attn_modulation.modulation.1.", ".obs_attn_norm.linear."),
    (".cross_attention.", ".obs_attn."),
    (".linear.layers.0.", ".ff.net.0.proj."),
    (".linear.layers.2.", ".ff.net.2."),
)
_CONSTANT = re.compile(r"\.rope\.freqs_(cos|sin)$|\._extra_state$")
_ATTENTION = re.compile(r"transformer_blocks\.\d+\.attn1\.")
_ROLES = {"q": "query", "k": "key", "v": "value", "query": "query", "key": "key", "value": "value"}


class HealDASource(PhysicsNeMoSource):
    """HealDA of the training package, as `models/convert` reads it."""

    model = "HealDA's training package"
    recognises = "transformer_blocks."

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        return {ours: _renamed(theirs) for ours, theirs in super().names(config).items()}

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        if config.get("temporal_attn_legacy_scaling_bug"):
            raise ValueError(
                "temporal_attn_legacy_scaling_bug=true scales by the number of frames and is not supported; "
                "give weights trained without it"
            )
        given = {name: value for name, value in config.items() if name != "temporal_attn_legacy_scaling_bug"}
        return super().overrides(given, weights)

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, array in state.items():
            if _CONSTANT.search(key):
                continue
            attention = _ATTENTION.match(key)
            part = attention.group() if attention else key.split(".")[0] + "."
            tensor = torch.as_tensor(array).detach()
            if attention or part in _READERS:
                parts.setdefault(part, {})[key.removeprefix(part)] = tensor
            else:
                found[key] = tensor
        for part, tensors in parts.items():
            reader = _READERS.get(part, _attention)
            found |= {part + name: tensor for name, tensor in reader(_sorted(tensors)).items()}
        return self.with_frequencies(found, "noise_embed.map_noise.freqs", "noise_embed.map_layer0.weight")


def _renamed(name: str) -> str:
    for theirs, package in _RENAMED:
        name = name.replace(theirs, package)
    return name


def _sorted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, numbers by size: layers in the order of their computation."""

    def order(name: str) -> list:
        return [(piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in re.split(r"(\d+)", name)]

    return {name: tensors[name] for name in sorted(tensors, key=order)}


def _kind(name: str) -> str:
    return "bias" if name.endswith("bias") else "weight"


def _position(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A convolution and the table of places, (X, C) or (1, X, C)."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim in (2, 3):
            found["pos_embed"] = tensor.reshape(tensor.shape[-2:])
        else:
            found[f"proj.{_kind(name)}"] = tensor
    return found


def _patches(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_kind(name): tensor for name, tensor in tensors.items()}


def _noise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Frequencies, two layers in order, and the layer of the label."""
    found, layers = {}, []
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if "freq" in name:
            found["map_noise.freqs"] = tensor
        elif re.search("cond|label|class", module.rpartition(".")[2]):
            found[f"map_condition.{_kind(name)}"] = tensor
        else:
            layers += [module] if module not in layers else []
            found[f"map_layer{layers.index(module)}.{_kind(name)}"] = tensor
    return found


def _tokenizer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Three tables by what they embed, and the modulation network, whose layers have biases: linear, norm, linear."""
    found, layers = {}, []
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if f"{module}.bias" not in tensors:
            table = next((f"{kind}_embedding" for kind in ("channel", "platform") if kind in name), "embed_table")
            found[f"{table}.weight"] = tensor
        else:
            layers += [module] if module not in layers else []
            place = layers.index(module)
            found[f"cond_mlp.{(0, 1, 3)[place] if place < 3 else module}.{_kind(name)}"] = tensor
    return found


def _attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One fused projection, or three apart, which are stacked; norms of queries and keys; the output."""
    found, apart = {}, {}
    for name, tensor in tensors.items():
        words = re.split(r"[._]", name)
        role = next((_ROLES[word] for word in words if word in _ROLES), None)
        if any("norm" in word for word in words):
            found[f"{(role or name)[0]}_norm.{_kind(name)}"] = tensor
        elif role is not None:
            apart[_kind(name), role] = tensor
        else:
            found[f"{'qkv' if 'qkv' in words else 'proj'}.{_kind(name)}"] = tensor
    for kind in {kind for kind, _ in apart}:
        found[f"qkv.{kind}"] = torch.cat(
            [apart[kind, role] for role in ("query", "key", "value") if (kind, role) in apart]
        )
    return found


_READERS = {
    "pos_embed.": _position,
    "patch_decode.": _patches,
    "noise_embed.": _noise,
    "backbone_obs_tokenizer.": _tokenizer,
}
SOURCE = HealDASource()
