"""ClimaNet's SpatioTemporalModel written from its specification, in float64 and without masks tricks: the first model
and the newer one, with the deterministic weights and inputs that its golden statistics were made with.

Letters: B batch, M months, T tokens a month, S = h w places, E hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from data.batch import Batch
from data.field import Field
from data.layout import Layout
from models import build
from models.convert import SOURCES, climanet, convert, export

SIZES = (2, 4, 12, 16)  # months, days, rows, columns
FIRST = {"in_chans": 1, "embed_dim": 16, "patch_size": [1, 4, 4], "hidden": 16, "spatial_depth": 1, "spatial_heads": 2}
NEWER = {**FIRST, "sh_dim": 12, "scale_dim": 10}


def filled_state(config: Mapping, sizes: tuple[int, ...] = SIZES) -> dict[str, Tensor]:
    """A state dict whose numbers follow from their place and from the order of the names."""
    source = SOURCES["climanet"]
    model = build(source.overrides(config, {}), source.layout(config, {}, sizes))
    state = export("climanet", model, config)
    constant = ("pe", "freqs", "freq", "num_batches_tracked")
    for k, name in enumerate(sorted(name for name in state if name.split(".")[-1] not in constant)):
        tensor = state[name]
        values = 0.1 * torch.sin(0.37 * torch.arange(tensor.numel(), dtype=torch.float64) + 0.11 * k)
        if (name.endswith("weight") and tensor.ndim == 1) or name == "decoder.scale":
            values = 1 + values
        elif name.endswith("running_var"):
            values = 1 + 0.5 * values
        state[name] = values.reshape(tensor.shape).to(tensor.dtype)
    return state


@dataclass
class Sample:
    """What the model is called with; masks are True where something is missing."""

    x: Tensor  # (B, 1, M, T, H, W)
    missing: Tensor
    land: Tensor  # (B, H, W)
    padded: Tensor  # (B, M, T)
    phases: Tensor  # (B, M, T, 3): month of the year, day of the year, hour of the day
    geography: Tensor
    sizes: Tensor


def golden_sample(batch: int = 2, sizes: tuple[int, ...] = SIZES) -> Sample:
    months, days, rows, columns = sizes
    shape = (batch, 1, months, days, rows, columns)
    index = torch.arange(math.prod(shape)).reshape(shape)
    padded = torch.zeros(batch, months, days, dtype=torch.bool)
    padded[:, 1:, -1] = True
    month, day = torch.meshgrid(torch.arange(months), torch.arange(days), indexing="ij")
    phases = [month / 12, (1 + 31 * month + day) / 365.24, torch.zeros_like(month)]
    return Sample(
        x=torch.sin(0.013 * index.double()),
        missing=index % 3 == 0,
        land=torch.arange(batch * rows * columns).reshape(batch, rows, columns) % 7 == 0,
        padded=padded,
        phases=2 * math.pi * torch.stack(phases, dim=-1).double().expand(batch, -1, -1, -1),
        geography=torch.cos(0.1 * torch.arange(batch * 12).double()).reshape(batch, 12),
        sizes=torch.sin(0.2 * torch.arange(batch * 10).double()).reshape(batch, 10),
    )


def batch_of(layout: Layout, sample: Sample, *, padded: bool = True) -> Batch:
    """The same sample for our model. padded: whether it is told which days are."""
    described, target = layout.inputs[climanet.INPUT], layout.targets[climanet.TARGET]
    values, missing = (rearrange(part, "b c m t h w -> b (m t) c h w") for part in (sample.x, sample.missing))
    frames = values.shape[:2]
    day = (sample.phases[..., 1] * 365.24 / (2 * math.pi)).flatten(1).round().float()
    month = torch.arange(frames[1]) // described.frames_per_group
    clock = {"second_of_day": torch.zeros(frames), "day_of_year": day}
    times = (torch.arange(frames[1]) * climanet.DAY).expand(frames)
    inputs = {
        climanet.INPUT: Field(
            torch.where(missing, torch.nan, values.float()),
            described.variables,
            described.grid,
            times.contiguous(),
            valid=~missing,
            frame_valid=~sample.padded.flatten(1) if padded else None,
            group=month.expand(frames).contiguous(),
            **clock,
        )
    }
    if climanet.GEOGRAPHY in layout.inputs:
        item = layout.inputs[climanet.GEOGRAPHY]
        vector = torch.cat([sample.geography, sample.sizes], dim=1).float()[:, None, :, None]
        inputs[climanet.GEOGRAPHY] = Field(vector, item.variables, item.grid, times[:, -1:].contiguous())
    months = len(target.lead_times)
    blank = Field(
        torch.full((frames[0], months, 1, *target.grid.shape), torch.nan),
        target.variables,
        target.grid,
        times[:, described.frames_per_group - 1 :: described.frames_per_group].contiguous(),
        domain=~sample.land[:, None, None].expand(-1, months, -1, -1, -1),
    )
    return Batch(inputs, {climanet.TARGET: blank}, layout)


def our_model(config: Mapping, state: Mapping[str, Tensor], sizes: tuple[int, ...] = SIZES):
    """In evaluation mode, with its layout."""
    overrides, layout, weights = convert("climanet", state, config, num_tokens=sizes)
    model = build(overrides, layout).eval()
    model.load_state_dict(weights)
    return model, layout


class Reference:
    """stages(sample): outputs of encoder, temporal, spatial_tr and decoder by the specification."""

    def __init__(self, config: Mapping, state: Mapping[str, Tensor]):
        self.config = {**climanet.DEFAULTS, **config}
        self.newer = climanet.is_newer(config)
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def stages(self, sample: Sample) -> dict[str, Tensor]:
        batch, _, months, days, rows, columns = sample.x.shape
        frames, p, q = self.config["patch_size"]
        tokens, (high, wide) = days // frames, (rows // p, columns // q)
        encoded = self.encoder(sample)
        grid = rearrange(encoded, "(b m) (t s) e -> b m t s e", b=batch, t=tokens)
        if self.config["token_order"] == "reinterpret":
            scrambled = grid.reshape(batch, high * wide, months, tokens, -1)
            grid = rearrange(scrambled, "b s m t e -> b m t s e")
        padded = sample.padded.unflatten(2, (tokens, frames)).all(-1)
        temporal = (self.newer_temporal if self.newer else self.first_temporal)(grid, padded, sample)
        if self.newer:
            placed = temporal + self.geography(sample)[:, None, None]
        else:
            placed = temporal + self.places(high, wide)
        spatial = rearrange(placed, "b m s e -> (b m) s e")
        for layer in range(self.config["spatial_depth"]):
            spatial = self.transformer_layer(spatial, f"spatial_tr.enc.layers.{layer}.")
        return {
            "encoder": encoded,
            "temporal": temporal,
            "spatial_tr": spatial,
            "decoder": self.decoder(spatial, (batch, months, high, wide), sample.land),
        }

    def encoder(self, sample: Sample) -> Tensor:
        joined = torch.cat([sample.x.masked_fill(sample.missing, 0), (~sample.missing).double()], dim=1)
        joined = rearrange(joined, "b c m t h w -> (b m) c t h w")
        weight = self.state["encoder.proj.weight"]
        tokens = F.conv3d(joined, weight, self.state["encoder.proj.bias"], stride=weight.shape[2:])
        return self.norm(rearrange(tokens, "n e t h w -> n (t h w) e"), "encoder.norm.")

    def first_temporal(self, tokens: Tensor, padded: Tensor, sample: Sample) -> Tensor:
        days, months = (self.state[f"temporal.pos_{name}.pe"] for name in ("days", "months"))
        q = tokens + days[: tokens.shape[2], None] + months[: tokens.shape[1], None, None]
        logits = self.sequence(q, "temporal.day_scorer.", last=3)
        weights = logits.masked_fill(padded[:, :, :, None, None], -torch.inf).softmax(2)
        z = rearrange((weights * q).sum(2), "b m s e -> (b s) m e")
        z = z + self.attention(self.norm(z, "temporal.month_ln."), "temporal.month_attn.", 4)
        z = z + self.sequence(z, "temporal.month_ffn.", last=3)
        return rearrange(z, "(b s) m e -> b m s e", b=tokens.shape[0])

    def newer_temporal(self, tokens: Tensor, padded: Tensor, sample: Sample) -> Tensor:
        month, day, hour = sample.phases.unbind(-1)
        k = torch.arange(1, self.config["embed_dim"] // 8 + 1).double()
        blocks = []
        for phase in (day, hour, day + hour, day - hour):
            blocks += [(phase[..., None] * k).sin(), (phase[..., None] * k).cos()]
        k = torch.arange(1, 7).double()
        waves = torch.cat([(month[..., None] * k).sin(), (month[..., None] * k).cos()], dim=-1)
        e = torch.cat(blocks, dim=-1) + waves @ self.state["temporal.month_embed.proj.weight"].T
        logits = self.sequence(e, "temporal.day_scorer.", last=4)
        weights = logits.masked_fill(padded[..., None], -torch.inf).softmax(2)
        z = (weights[..., None] * tokens).sum(2) + (weights * e).sum(2)[:, :, None]
        z = self.norm(rearrange(z, "b m s e -> (b s) m e"), "temporal.month_ln.")
        z = z + self.attention(z, "temporal.month_attn.", 4) + self.sequence(z, "temporal.month_ffn.", last=4)
        return rearrange(z, "(b s) m e -> b m s e", b=tokens.shape[0])

    def geography(self, sample: Sample) -> Tensor:
        sizes = self.state["geo_embedding.scale_gain"] * self.norm(sample.sizes, "geo_embedding.scale_norm.")
        joined = torch.cat([self.state["geo_embedding.sh_gain"] * sample.geography, sizes], dim=-1)
        return self.sequence(joined, "geo_embedding.proj.", last=3)

    def places(self, rows: int, columns: int) -> Tensor:
        half = self.config["embed_dim"] // 2

        def table(count: int) -> Tensor:
            rates = 10_000 ** (-torch.arange(0, half, 2).double() / half)
            angles = torch.arange(count).double()[:, None] * rates
            return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)

        both = table(rows)[:, None] + table(columns)[None]
        return torch.cat([both, both], dim=-1).flatten(0, 1)

    def transformer_layer(self, x: Tensor, name: str) -> Tensor:
        x = self.norm(x + self.attention(x, name + "self_attn.", self.config["spatial_heads"]), name + "norm1.")
        hidden = F.gelu(self.linear(x, name + "linear1."))
        return self.norm(x + self.linear(hidden, name + "linear2."), name + "norm2.")

    def decoder(self, spatial: Tensor, shape: tuple[int, ...], land: Tensor) -> Tensor:
        batch, months, rows, _ = shape
        x = rearrange(spatial, "n (h w) e -> n e h w", h=rows)
        stride, overlap = self.config["patch_size"][1:], self.config["overlap"]
        x = F.conv2d(x, self.state["decoder.proj.weight"], self.state["decoder.proj.bias"])
        deconv = (self.state["decoder.deconv.weight"], self.state["decoder.deconv.bias"])
        x = F.conv_transpose2d(x, *deconv, stride=stride, padding=overlap)
        for convolution, norm in ((0, 1), (4, 5) if self.newer else (3, 4)):
            name = f"decoder.refine.{convolution}."
            x = F.conv2d(x, self.state[name + "weight"], self.state[name + "bias"], padding=1)
            x = F.gelu(self.channel_norm(x, f"decoder.refine.{norm}."))
        x = F.conv2d(x, self.state["decoder.head.weight"], self.state["decoder.head.bias"])
        x = rearrange(x, "(b m) 1 h w -> b m h w", b=batch)
        if not self.newer:
            scale, bias = (self.state[f"decoder.{part}"][:months, None, None] for part in ("scale", "bias"))
            x = x * scale + bias
        return x.masked_fill(land[:, None], 0)

    def channel_norm(self, x: Tensor, name: str) -> Tensor:
        affine = (self.state[name + "weight"], self.state[name + "bias"])
        if self.newer:
            return F.group_norm(x, 8, *affine)
        return F.batch_norm(x, self.state[name + "running_mean"], self.state[name + "running_var"], *affine)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[name + "weight"], self.state[name + "bias"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[name + "weight"], self.state[name + "bias"])

    def sequence(self, x: Tensor, name: str, *, last: int) -> Tensor:
        return self.linear(F.gelu(self.linear(self.norm(x, f"{name}0."), f"{name}1.")), f"{name}{last}.")

    def attention(self, x: Tensor, name: str, heads: int) -> Tensor:
        joined = F.linear(x, self.state[name + "in_proj_weight"], self.state[name + "in_proj_bias"])
        query, key, value = rearrange(joined, "b n (s h d) -> s b h n d", s=3, h=heads)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        return self.linear(rearrange(weights @ value, "b h n d -> b n (h d)"), name + "out_proj.")
