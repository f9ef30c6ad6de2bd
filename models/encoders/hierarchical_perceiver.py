"""The Hierarchical Perceiver as an encoder: tokens in groups, groups merged step by step into one bank of latents.

HiP (Carreira et al. 2022, arXiv:2202.10890); with one group a timestep it is a history encoder: every stream of a time
(fields on any grid, fixed fields, observations) is read together, then times merge. `fan_out` goes on through the
mirror image of the hierarchy back to every input cell, as published. Letters: B batch, G groups, M tokens of a group,
R rows (the tokens of all inputs), K latents of a group, E width of a token, C channels of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout
from models.attention import AttentionLayer, Modulations
from models.encoders.groups import GROUPINGS, STATICS, by_stream, by_time
from models.encoders.hierarchy import GroupBlock
from models.encoders.input_tokens import InputTokens, ObservationRows, any_present, cells
from models.initialisation import lecun_
from models.latents import LatentLayout, Latents

POSITIONS = ("fourier", "learned")
MISSING = ("skip", "zero")


class HierarchicalPerceiverEncoder(nn.Module):
    """Batch -> Latents without a grid: one frame, at the last input frame's time.

    groups: of every block; None: as the grouping gives, then 1 / `merge` of the block before, down to one, and with
        fan_out back again. hidden_size, num_latents (a group), num_heads, self_per_cross (self-attention layers): of
        all blocks, or a list with one of each. embed_size: of tokens; None: the first block's hidden_size.
    grouping: time (a group a timestep) or stream (groups of one input each, as published). static: whether inputs of
        one frame are repeated in every group of a time or have an own group (`models/encoders/groups.py`).
    fan_out: false ends in the one group of the last block, (B, 1, K, C); true reads the result back at every input
        cell, (B, 1, R, E), for `decoder=grouped_reconstruction`.
    train_latents: how many latents of the bottleneck a training step draws for each sample; None: all.
    missing: skip (tokens of which nothing is present are not read) or zero (they are read as zeros at their place).
    positions: fourier features of real coordinates, the calendar and the age within the window, or learned tables.
    Raises ValueError on values not allowed.
    """

    reads_observations = True
    accepts_modulation = True
    reads_coordinates = True
    frame_local = False

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int | Sequence[int],
        num_latents: int | Sequence[int],
        num_heads: int | Sequence[int],
        self_per_cross: int | Sequence[int] = 1,
        groups: Sequence[int] | None = None,
        merge: int = 4,
        embed_size: int | None = None,
        grouping: str = "time",
        static: str = "repeated",
        fan_out: bool = False,
        train_latents: int | None = None,
        missing: str = "skip",
        positions: str = "fourier",
        num_bands: int = 16,
        spacing: str = "linear",
        calendar: str = "season_and_hour",
        cross_heads: int = 1,
        mlp_ratio: float = 4.0,
        cross_mlp_ratio: float = 1.0,
        mlp: str = "squared_relu",
        dropout: float = 0.0,
        attention: str = "auto",
    ):
        super().__init__()
        for name, value, allowed in (
            ("grouping", grouping, GROUPINGS),
            ("static", static, STATICS),
            ("missing", missing, MISSING),
            ("positions", positions, POSITIONS),
        ):
            if value not in allowed:
                raise ValueError(f"model.encoder.{name}={value} is unknown; use one of {', '.join(allowed)}")
        if merge < 2:
            raise ValueError(f"model.encoder.merge={merge} must be at least 2 groups that become one")
        self.layout, self.missing = layout, missing
        if groups is not None:
            _check_groups(groups, fan_out)
        wanted = None if groups is None else groups[0]
        table = by_stream(layout, wanted) if grouping == "stream" else by_time(layout, wanted, static=static)
        for name in ("rows", "frames", "slots"):
            self.register_buffer(name, getattr(table, name), persistent=False)
        self.complete = bool((table.rows >= 0).all())
        groups = _hierarchy(table.rows.shape[0], merge, fan_out) if groups is None else groups
        hidden_sizes, latents, heads, layers = (
            _of_blocks(name, value, len(groups))
            for name, value in (
                ("hidden_size", hidden_size),
                ("num_latents", num_latents),
                ("num_heads", num_heads),
                ("self_per_cross", self_per_cross),
            )
        )
        _check_latents(groups, latents, fan_out, train_latents)
        embed_size = hidden_sizes[0] if embed_size is None else embed_size
        shared = dict(mlp=mlp, dropout=dropout, backend=attention)

        fourier = dict(num_bands=num_bands, spacing=spacing)
        self.learned = LearnedPositions(layout, embed_size) if positions == "learned" else None
        self.inputs = nn.ModuleDict(
            {
                name: nn.Linear(item.channels, embed_size)
                if positions == "learned"
                else InputTokens(item, embed_size, calendar=calendar, **fourier)
                for name, item in layout.inputs.items()
            }
        )
        self.observations = None
        if layout.observations is not None:
            self.observations = ObservationRows(layout.observations, embed_size, **fourier)
        middle = len(groups) // 2 if fan_out else len(groups) - 1
        self.blocks = nn.ModuleList(
            GroupBlock(
                groups=count,
                num_latents=latents[index],
                hidden_size=hidden_sizes[index],
                context_size=embed_size if index == 0 else hidden_sizes[index - 1],
                num_heads=heads[index],
                cross_heads=cross_heads,
                self_layers=layers[index],
                mlp_ratio=mlp_ratio,
                cross_mlp_ratio=cross_mlp_ratio,
                skip_size=hidden_sizes[len(groups) - 1 - index] if index > middle else None,
                train_latents=train_latents if index == middle else None,
                **shared,
            )
            for index, count in enumerate(groups)
        )
        self.read_back = None
        if fan_out:
            self.read_back = AttentionLayer(
                embed_size,
                hidden_sizes[-1],
                num_heads=1,
                qk_width=hidden_sizes[-1],
                v_width=hidden_sizes[-1],
                mlp_ratio=cross_mlp_ratio,
                residual=False,
                **shared,
            )
            self.latent_layout = LatentLayout(num_tokens=len(table.slots), hidden_size=embed_size, of_inputs=True)
        else:
            self.latent_layout = LatentLayout(num_tokens=latents[-1], hidden_size=hidden_sizes[-1])
        self.initialise()

    def initialise(self) -> None:
        for module in (self.inputs, self.learned, self.blocks, self.read_back):
            for layer in () if module is None else module.modules():
                if isinstance(layer, nn.Linear):
                    lecun_(layer)  # as released; gentler ones leave all latents of a group alike for long

    def forward(self, batch: Batch, *, modulation: Modulations | None = None) -> Latents:
        tokens, positions, present = self._rows(batch)
        latents, valid = self._grouped(batch, tokens, present)  # (B, G, M, E)
        made = []
        for index, block in enumerate(self.blocks):
            mirrored = self.read_back is not None and index > len(self.blocks) // 2
            skip = made[len(self.blocks) - 1 - index] if mirrored else None
            latents, valid = block(latents, valid, skip, modulation=modulation)
            made.append(latents)
        if self.read_back is not None:
            latents = self._everywhere(latents, valid, positions, modulation)
        certain = self.read_back is not None or (present is None and self.observations is None)
        return Latents(tokens=latents, times=batch.clock.times[:, -1:], valid=None if certain else valid)

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens (B, R, E), what they know of place and time (B or 1, R, E), which may be read (B, R) or None (all)."""
        tokens, positions, present = [], [], []
        for name, field in batch.inputs.items():
            values = cells(field, gaps=self.layout.inputs[name].gaps)
            if self.learned is None:
                place, moment = self.inputs[name].positions(field, batch.base_time)
                values, position = self.inputs[name].value(values), place + moment
            else:
                values, position = self.inputs[name](values), self.learned(name)[None]  # (1, F, P, E)
            tokens.append((values + position).flatten(1, 2))
            positions.append(position.flatten(1, 2))
            there = any_present(field) if self.missing == "skip" else None
            everything = torch.ones(tokens[-1].shape[:2], dtype=torch.bool, device=values.device)
            present.append(everything if there is None else there.flatten(1))
        complete = self.missing == "zero" or all(field.presence is None for field in batch.inputs.values())
        if self.learned is not None:
            positions = [position.expand(1, -1, -1) for position in positions]
        return torch.cat(tokens, 1), torch.cat(positions, 1), None if complete else torch.cat(present, 1)

    def _grouped(self, batch: Batch, tokens: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, G, M, E) and which of it may be read, (B, G, M) or None (all); observations stand behind the cells."""
        rows = self.rows.clamp(min=0)
        grouped, valid = tokens[:, rows], None
        if present is not None or not self.complete or self.observations is not None:
            valid = (self.rows >= 0).expand(len(tokens), -1, -1)
            valid = valid if present is None else valid & present[:, rows]
        if self.observations is None:
            return grouped, valid
        given, held = self.observations(batch.observations, batch.base_time, each=True)  # (B T, n, E)
        given, held = (rearrange(part, "(b t) ... -> b t ...", b=len(tokens)) for part in (given, held))
        frames = self.frames.clamp(min=0)
        held = held[:, frames] & (self.frames >= 0)[..., None]  # (B, G, c, n)
        return (
            torch.cat([grouped, given[:, frames].flatten(2, 3)], dim=2),
            torch.cat([valid, held.flatten(2)], dim=2),
        )

    def _everywhere(
        self, latents: Tensor, valid: Tensor | None, positions: Tensor, modulation: Modulations | None
    ) -> Tensor:
        """What the groups (B, G, K, C) hold at every input cell, (B, 1, R, E): each cell asks its own group."""
        queries = positions[:, self.rows.clamp(min=0)].expand(len(latents), -1, -1, -1)
        read = self.read_back(
            rearrange(queries, "b g m e -> (b g) m e"),
            rearrange(latents, "b g k c -> (b g) k c"),
            mask=None if valid is None else rearrange(valid, "b g k -> (b g) k"),
            modulation=None if modulation is None else modulation.repeated(latents.shape[1]),
        )
        return rearrange(read, "(b g) m e -> b 1 (g m) e", b=len(latents))[:, :, self.slots]


class LearnedPositions(nn.Module):
    """Learned tables of places and frames, one a stream, through a projection that streams on a kind of grid share."""

    def __init__(self, layout: Layout, size: int):
        super().__init__()
        self.kinds = {name: item.grid.kind for name, item in layout.inputs.items()}
        self.tables = nn.ParameterDict(
            {
                name: nn.Parameter(torch.empty(item.frames, item.grid.num_points, size))
                for name, item in layout.inputs.items()
            }
        )
        self.projections = nn.ModuleDict(
            {kind: nn.Linear(size, size, bias=False) for kind in sorted(set(self.kinds.values()))}
        )
        self.initialise()

    def initialise(self) -> None:
        for table in self.tables.values():
            nn.init.normal_(table)  # as wide as Fourier features: places must differ for attention to tell them apart

    def forward(self, name: str) -> Tensor:
        """(F, P, E) of one input."""
        return self.projections[self.kinds[name]](self.tables[name])


def _hierarchy(first: int, merge: int, fan_out: bool) -> tuple[int, ...]:
    """Groups of every block: a `merge`-th of the block before, down to one; mirrored where they fan out."""
    groups = [first]
    while groups[-1] > 1:
        groups.append(-(-groups[-1] // merge))
    if fan_out and len(groups) == 1:
        groups = [1, 1]
    return (*groups, *reversed(groups[:-1])) if fan_out else tuple(groups)


def _check_groups(groups: Sequence[int], fan_out: bool) -> None:
    given = f"model.encoder.groups=[{','.join(map(str, groups))}]"
    if not groups or min(groups) < 1:
        raise ValueError(f"{given} must be numbers of groups of at least 1, one a block, like [4,1]")
    middle = len(groups) // 2
    mirrored = len(groups) >= 3 and len(groups) % 2 == 1 and groups[middle] == 1
    if fan_out and not (mirrored and list(groups) == list(groups)[::-1]):
        raise ValueError(f"{given} must lead to one group and back the same way with fan_out, like [4,1,4]")
    if not fan_out and groups[-1] != 1:
        raise ValueError(f"{given} must end in one group, like [4,1]; or use model.encoder.fan_out=true")


def _check_latents(groups: Sequence[int], latents: tuple[int, ...], fan_out: bool, drawn: int | None) -> None:
    middle = len(groups) // 2 if fan_out else len(groups) - 1
    if fan_out and any(latents[index] != latents[-1 - index] for index in range(middle)):
        raise ValueError(
            f"model.encoder.num_latents={list(latents)} must be equal in blocks that mirror each other, "
            "like [16,8,16]; or give one number"
        )
    if drawn is not None and not 1 <= drawn <= latents[middle]:
        raise ValueError(
            f"model.encoder.train_latents={drawn} must be between 1 and the {latents[middle]} latents of the bottleneck"
        )
    for index in range(middle, len(groups) - 1):
        parts = -(-groups[index + 1] // groups[index])
        for count in {latents[index], drawn or latents[index]} if index == middle else {latents[index]}:
            if count % parts:
                raise ValueError(
                    f"{count} latents of block {index} cannot be split over {parts} groups each; change "
                    "model.encoder.num_latents, train_latents or groups so that they divide"
                )


def _of_blocks(name: str, value: int | Sequence[int], blocks: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * blocks
    if len(value) != blocks:
        raise ValueError(
            f"model.encoder.{name}={list(value)} has {len(value)} values for {blocks} blocks; "
            "give one number, or one each"
        )
    return tuple(value)
