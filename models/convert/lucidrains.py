"""lucidrains/perceiver-pytorch: `Perceiver` (names of 0.11 and of 0.9; its keys changed between them).

Differences that a rule must bridge: keys and values are one matrix there, and Fourier features of an axis stand
together (sines, cosines, the position) where ours stand by kind (positions, sines, cosines, each axis by axis).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.layout import Layout
from models.convert.perceiver import TARGET, token_layout, typed

DEFAULTS = {
    "input_channels": 3,
    "input_axis": 2,
    "cross_heads": 1,
    "latent_heads": 8,
    "weight_tie_layers": False,
    "fourier_encode_data": True,
    "self_per_cross_attn": 1,
}
_UNKNOWN = ("inverted_cross_attn", "attn_residual")
_KV, _KEY, _VALUE = "fn.to_kv.weight", "fn.to_k.weight", "fn.to_v.weight"


@dataclass(frozen=True)
class LucidrainsSource:
    """cross, cross_mlp, own: names of the parts of an iteration, layers.<i>.<part>; own layers are numbered below."""

    recognises: str
    cross: str
    cross_mlp: str
    own: str
    model = "lucidrains' Perceiver with its classifier head"

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Our names -> theirs, after `canonical`."""
        given = _checked(config)
        names = {"encoder.latents": "latents"}
        for index in range(_distinct(given)):
            part = f"layers.{index}."
            names |= _layer(f"encoder.cross.{index}", part + self.cross, part + self.cross_mlp, cross=True)
            for number in range(given["self_per_cross_attn"]):
                own = f"{part}{self.own}.{number}."
                names |= _layer(f"encoder.blocks.{index}.{number}", own + "0", own + "1", cross=False)
        for kind in ("weight", "bias"):
            names[f"decoder.{TARGET}.norm.{kind}"] = f"to_logits.1.{kind}"
            names[f"decoder.{TARGET}.head.{kind}"] = f"to_logits.2.{kind}"
        return names

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Keys and values apart, columns in our order, layers that are tied once."""
        given, tensors = _checked(config), {}
        for name, array in state.items():
            tensor = torch.as_tensor(array).detach()
            if _repeats(name, given):
                continue
            if name.endswith(_KV):
                key, value = tensor.chunk(2)
                tensors[name.replace(_KV, _KEY)], tensors[name.replace(_KV, _VALUE)] = key, value
            else:
                tensors[name] = tensor
        columns = _columns(given)
        return {name: tensor[..., columns] if self._of_context(name) else tensor for name, tensor in tensors.items()}

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`."""
        given, found = _checked(config), {}
        columns = _columns(given).argsort()
        for name, tensor in tensors.items():
            if name.endswith(_VALUE):
                continue
            if name.endswith(_KEY):
                tensor = torch.cat([tensor, tensors[name.replace(_KEY, _VALUE)]])
            found[name.replace(_KEY, _KV)] = tensor[..., columns] if self._of_context(name) else tensor
        tied = [name for name in found if name.startswith("layers.1.") and given["weight_tie_layers"]]
        for index in range(2, given["depth"]):
            found |= {name.replace("layers.1.", f"layers.{index}.", 1): found[name].clone() for name in tied}
        return found

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        """What to type to build it. weights: by our names; widths are theirs."""
        given = _checked(config)
        share = "all_but_first" if given["weight_tie_layers"] else "none"
        options = {
            "hidden_size": weights["encoder.latents"].shape[1],
            "num_latents": weights["encoder.latents"].shape[0],
            "num_heads": given["latent_heads"],
            "mlp": "geglu",
            "mlp_ratio": 4,
            "dropout": 0.0,
            "encoder.embed": False,
            "encoder.cross_heads": given["cross_heads"],
            "encoder.num_cross": given["depth"],
            "encoder.self_per_cross": given["self_per_cross_attn"],
            "encoder.last_block": True,
            "encoder.share_cross": share,
            "encoder.share_self": share,
            "encoder.qkv_bias": False,
            "encoder.cross_qk_width": weights["encoder.cross.0.attention.query.weight"].shape[0],
        }
        if given["self_per_cross_attn"]:
            options["encoder.qk_width"] = weights["encoder.blocks.0.0.attention.query.weight"].shape[0]
        if given["fourier_encode_data"]:
            options["encoder.positions"] = "fourier"
            options["encoder.num_bands"] = given["num_freq_bands"]
            options["encoder.max_frequency"] = given["max_freq"] / 2
        return [
            "model=perceiver",
            "model/size=small",
            "model/processor=identity",
            "model/decoder=pooled",
            *(f"model.{name}={typed(value)}" for name, value in options.items()),
        ]

    def layout(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple) -> Layout:
        """num_tokens: sizes of the axes; one number stands for all of them. A video has two frames at least."""
        given = _checked(config)
        axes = (num_tokens,) * given["input_axis"] if isinstance(num_tokens, int) else tuple(num_tokens)
        if len(axes) == 3:
            axes = (max(2, axes[0]), *axes[1:])  # positions of one frame would not count frames as an axis
        outputs = weights[f"decoder.{TARGET}.head.weight"].shape[0]
        return token_layout(channels=given["input_channels"], num_tokens=axes, outputs=outputs, queries=1)

    def _of_context(self, name: str) -> bool:
        """Whether the columns of a tensor are channels of the tokens."""
        place = name.split(".")
        inside = place[0] == "layers" and place[2] == self.cross
        return inside and any(part in name for part in ("norm_context", _KEY, _VALUE, _KV))


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Perceiver`; absent entries are class defaults. Raises ValueError on what ours has not."""
    given = {**DEFAULTS, **config}
    for name in _UNKNOWN:
        value = given.get(name, False)
        if any(value) if isinstance(value, list | tuple) else value:
            raise ValueError(f"lucidrains {name}={value} is not known here; convert a model without it")
    if not given.get("final_classifier_head", True):
        raise ValueError("lucidrains final_classifier_head=False has no output; convert a model with its head")
    return given


def _distinct(given: Mapping[str, Any]) -> int:
    """How many iterations have weights of their own: all, or the first and the others."""
    return min(given["depth"], 2) if given["weight_tie_layers"] else given["depth"]


def _repeats(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a name is of an iteration that is tied to an earlier one."""
    return name.startswith("layers.") and int(name.split(".")[1]) >= _distinct(given)


def _layer(ours: str, attention: str, mlp: str, *, cross: bool) -> dict[str, str]:
    names = {
        f"{ours}.attention.query.weight": f"{attention}.fn.to_q.weight",
        f"{ours}.attention.key.weight": f"{attention}.{_KEY}",
        f"{ours}.attention.value.weight": f"{attention}.{_VALUE}",
    }
    pairs = {"query_norm": f"{attention}.norm", "attention.output": f"{attention}.fn.to_out"}
    pairs |= {"mlp_norm": f"{mlp}.norm", "mlp.up": f"{mlp}.fn.net.0", "mlp.down": f"{mlp}.fn.net.2"}
    pairs |= {"context_norm": f"{attention}.norm_context"} if cross else {}
    for kind in ("weight", "bias"):
        names |= {f"{ours}.{part}.{kind}": f"{theirs}.{kind}" for part, theirs in pairs.items()}
    return names


def _columns(given: Mapping[str, Any]) -> Tensor:
    """For every channel of our tokens, the channel there."""
    channels, axes = given["input_channels"], given["input_axis"]
    values = torch.arange(channels)
    if not given["fourier_encode_data"]:
        return values
    bands = given["num_freq_bands"]
    theirs = channels + torch.arange(axes * (2 * bands + 1)).view(axes, 2 * bands + 1)
    sines, cosines, positions = theirs.split([bands, bands, 1], dim=1)
    return torch.cat([values, positions.flatten(), sines.flatten(), cosines.flatten()])


SOURCE = LucidrainsSource("layers.0.cross_attn.", cross="cross_attn", cross_mlp="cross_ff", own="self_attns")
SOURCE_0_9 = LucidrainsSource("layers.0.0.", cross="0", cross_mlp="1", own="2")
