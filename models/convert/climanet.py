"""ClimaNet's SpatioTemporalModel (ESMValGroup): the model of its design page, and the one that followed in 2026.

config: its constructor arguments; absent ones are defaults. `sh_dim` or `scale_dim` among them tells the newer model,
which codes the calendar and describes each sample by one vector (`model.encoder.geography=given`) and has no scale,
no bias and no positions of patches. `token_order: reinterpret` is for weights trained on its scrambled order of tokens
(ours, no argument of theirs; default: correct). Encodings that are constants are left out and made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.grids import PlanarGrid, Points
from data.layout import InputLayout, Layout, TargetLayout, Variable
from models.positions.geography import NUM_SIZES
from models.positions.sinusoidal import sinusoids

INPUT, GEOGRAPHY, TARGET = "daily", "geography", "monthly"
DAY = 86_400
DEFAULTS = {
    "in_chans": 1,
    "embed_dim": 128,
    "patch_size": (1, 4, 4),
    "hidden": 256,
    "overlap": 1,
    "max_days": 31,
    "max_months": 12,
    "num_months": 12,
    "spatial_depth": 2,
    "spatial_heads": 4,
    "dropout": 0.0,
    "sh_dim": 96,
    "scale_dim": 10,
    "token_order": "correct",
}
_BOTH = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_CONSTANTS = (
    "temporal.pos_days.pe",
    "temporal.pos_months.pe",
    "temporal.time_embed.freqs",
    "temporal.month_embed.freq",
)


def is_newer(config: Mapping[str, Any]) -> bool:
    return "sh_dim" in config or "scale_dim" in config


class ClimaNetSource:
    """`SpatioTemporalModel`, as `models/convert` reads it."""

    model = "ClimaNet's SpatioTemporalModel (its newer one where the config has sh_dim and scale_dim)"
    recognises = "temporal.day_scorer."

    def names(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Our names -> theirs; projections of attention by the names that `canonical` gives them."""
        newer, given = is_newer(config), {**DEFAULTS, **config}
        after = int(newer)  # its dropouts take a place in sequences
        names: dict[str, str] = {}

        def layer(ours: str, theirs: str, kinds: tuple[str, ...] = _BOTH) -> None:
            names.update({f"{ours}.{kind}": f"{theirs}.{kind}" for kind in kinds})

        def attention(ours: str, theirs: str) -> None:
            for part in ("query", "key", "value"):
                layer(f"{ours}.{part}", f"{theirs}.in_proj_{part}")
            layer(f"{ours}.output", f"{theirs}.out_proj")

        layer("encoder.embed", "encoder.proj")
        layer("encoder.norm", "encoder.norm")
        for ours, theirs in {"score_norm": 0, "score_up": 1, "score_out": 3 + after}.items():
            layer(f"encoder.aggregator.{ours}", f"temporal.day_scorer.{theirs}")
        layer("encoder.aggregator.month_norm", "temporal.month_ln")
        attention("encoder.aggregator.attention", "temporal.month_attn")
        for ours, theirs in {"mlp_norm": 0, "mlp.up": 1, "mlp.down": 3 + after}.items():
            layer(f"encoder.aggregator.{ours}", f"temporal.month_ffn.{theirs}")
        for index in range(given["spatial_depth"]):
            ours, theirs = f"processor.layers.{index}", f"spatial_tr.enc.layers.{index}"
            attention(f"{ours}.attention", f"{theirs}.self_attn")
            for our, their in {
                "query_norm": "norm1",
                "mlp_norm": "norm2",
                "mlp.up": "linear1",
                "mlp.down": "linear2",
            }.items():
                layer(f"{ours}.{our}", f"{theirs}.{their}")
        decoder = f"decoder.{TARGET}"
        for ours, theirs in {"project": "proj", "spread": "deconv", "head": "head"}.items():
            layer(f"{decoder}.{ours}", f"decoder.{theirs}")
        for index, (convolution, norm) in enumerate(((0, 1), (3 + after, 4 + after))):
            layer(f"{decoder}.refine.{index}", f"decoder.refine.{convolution}")
            layer(f"{decoder}.norms.{index}", f"decoder.refine.{norm}", _BOTH if newer else _BOTH + _STATISTICS)
        if newer:
            layer("encoder.codes.month", "temporal.month_embed.proj", ("weight",))
            geography = {"harmonics_gain": "sh_gain", "sizes_gain": "scale_gain"}
            names.update({f"encoder.geography.{ours}": f"geo_embedding.{theirs}" for ours, theirs in geography.items()})
            for ours, theirs in {
                "sizes_norm": "scale_norm",
                "norm": "proj.0",
                "up": "proj.1",
                "down": "proj.3",
            }.items():
                layer(f"encoder.geography.{ours}", f"geo_embedding.{theirs}")
        else:
            names.update({f"{decoder}.{part}": f"decoder.{part}" for part in ("scale", "bias")})
        return names

    def canonical(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state dict without constants, with the three projections of every attention apart.

        Raises ValueError where the config is that of the other model.
        """
        newer = "geo_embedding.sh_gain" in state
        if newer != is_newer(config):
            raise ValueError(
                "these weights are of the newer ClimaNet; give its sh_dim and scale_dim in the config"
                if newer
                else "these weights are of the first ClimaNet; leave sh_dim and scale_dim out of the config"
            )
        tensors: dict[str, Tensor] = {}
        for name, array in state.items():
            tensor = torch.as_tensor(array).detach()
            head, found, kind = name.partition("in_proj_")
            if found:
                for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    tensors[f"{head}in_proj_{part}.{kind}"] = rows
            elif name not in _CONSTANTS:
                tensors[name] = tensor
        return tensors

    def original(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse of `canonical`."""
        given, state = {**DEFAULTS, **config}, {}
        for name, tensor in tensors.items():
            head, found, rest = name.partition("in_proj_")
            if not found:
                state[name] = tensor
            elif rest.startswith("query."):
                kind = rest.removeprefix("query.")
                parts = [tensors[f"{head}in_proj_{part}.{kind}"] for part in ("query", "key", "value")]
                state[f"{head}in_proj_{kind}"] = torch.cat(parts)
        width = given["embed_dim"]
        if is_newer(config):
            state["temporal.time_embed.freqs"] = torch.arange(1, width // 8 + 1).float()
            state["temporal.month_embed.freq"] = torch.arange(1, 7).float()
        else:
            state["temporal.pos_days.pe"] = sinusoids(given["max_days"], width)
            state["temporal.pos_months.pe"] = sinusoids(given["max_months"], width)
        return state

    def overrides(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[str]:
        """What to type to build it."""
        newer, given = is_newer(config), {**DEFAULTS, **config}
        frames, rows, columns = given["patch_size"]
        if rows != columns:
            raise ValueError(f"patch_size {given['patch_size']}: patches must be square here, like (1, 4, 4)")
        if given["scale_dim"] != NUM_SIZES:
            raise ValueError(f"scale_dim {given['scale_dim']}: a domain is described by {NUM_SIZES} sizes here")
        values = {
            "model.hidden_size": given["embed_dim"],
            "model.depth": given["spatial_depth"],
            "model.num_heads": given["spatial_heads"],
            "model.patch_size": rows,
            "model.dropout": given["dropout"],
            "model.encoder.patch_frames": frames,
            "model.encoder.codes": "cyclic" if newer else "sinusoidal",
            "model.encoder.scores": "calendar" if newer else "tokens",
            "model.encoder.branches": "parallel" if newer else "sequential",
            "model.encoder.position": "none" if newer else "sum",
            "model.encoder.geography": "given" if newer else "none",
            "model.encoder.token_order": given["token_order"],
            "model.processor.dropout": given["dropout"] if newer else 0.0,
            "model.decoder.width": given["hidden"],
            "model.decoder.overlap": given["overlap"],
            "model.decoder.norm": "group" if newer else "batch",
            "model.decoder.num_months": 0 if newer else given["num_months"],
        }
        return ["model=sst_spatiotemporal", "model/size=tiny", *(f"{key}={value}" for key, value in values.items())]

    def layout(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], num_tokens: int | tuple[int, ...]
    ) -> Layout:
        """num_tokens: months, frames of a month, rows and columns; otherwise a year of days on the default's grid."""
        given = {**DEFAULTS, **config}
        months, days, rows, columns = num_tokens if isinstance(num_tokens, tuple) else (12, 31, 128, 128)
        variables = tuple(Variable(f"input_{number}") for number in range(given["in_chans"]))
        grid, month = PlanarGrid.regular(rows, columns), days * DAY
        inputs = {INPUT: InputLayout(variables, grid, months * days, DAY, gaps=True, frames_per_group=days)}
        if is_newer(config):
            described = [f"harmonic_{number}" for number in range(given["sh_dim"])]
            described += [f"size_{number}" for number in range(given["scale_dim"])]
            inputs[GEOGRAPHY] = InputLayout(tuple(map(Variable, described)), Points([[0.0, 0.0]]), 1, DAY)
        times = tuple((number + 1 - months) * month for number in range(months))
        return Layout(inputs, {TARGET: TargetLayout((Variable("output"),), grid, times)})


SOURCE = ClimaNetSource()
