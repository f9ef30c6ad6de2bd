"""The Perceiver encoder: learned latents read all input cells of all frames through cross-attention.

Perceiver (Jaegle et al. 2021, arXiv:2103.03206), Perceiver IO (arXiv:2107.14795). Every cell of every frame is a token:
its values, their validity where gaps occur, Fourier features of its place, features of its time. Inputs on different
grids join one key/value sequence. Letters: B batch, T frames, C channels, P cells, M tokens, N latents, D hidden.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data.batch import Batch
from data.layout import Layout
from models.attention import AttentionLayer, Modulations
from models.encoders.input_tokens import ConcatenatedTokens, InputTokens, ObservationRows
from models.initialisation import table_
from models.latents import LatentLayout, Latents

SHARES = ("none", "all", "all_but_first")
FRAMES = ("joint", "each")  # the builder turns auto into one of them
ITERATIONS = ("all", "timestep")
POSITIONS = ("none", "fourier", "learned", "projected")


class PerceiverEncoder(nn.Module):
    """Batch -> Latents without a grid.

    num_cross: cross-attentions to the same tokens, with a block of self_per_cross self-attention layers between them;
        last_block: also after the last one (before model/processor=identity the latent transformer is then all here).
    inputs_per_iteration: all, or timestep: a cross-attention reads the tokens of one frame, older ones first, and
        num_cross counts the passes over the window: the Perceiver as a recurrent network over time.
    share_cross, share_self: none, all, or all_but_first repeats use the same weights; shared keys and values are
        computed once. frames: joint (all frames at once, one latent frame) or each (every frame on its own).
    cross_heads, num_heads: of cross- and of self-attention; likewise the widths of queries and keys (qk), of values (v)
        and of the MLP; None takes the latents' width, and cross_mlp_ratio=None the mlp_ratio.
    num_bands, spacing: of the places; calendar: what is known of the date (season_and_hour, hour, none).
    embed: false reads the values of a cell as its token, with the `positions` of published models, max_frequency and
        value_size (`ConcatenatedTokens`): no place on the globe and no time.
    query_residual: whether cross-attention adds to the latents or replaces them. qkv_bias: of queries, keys and values.
    Raises ValueError on values not allowed.
    """

    reads_observations = True
    accepts_modulation = True

    def __init__(
        self,
        layout: Layout,
        *,
        hidden_size: int,
        num_latents: int,
        num_heads: int,
        cross_heads: int = 1,
        num_cross: int = 1,
        self_per_cross: int = 2,
        share_cross: str = "all_but_first",
        share_self: str = "all",
        mlp_ratio: float = 1.0,
        cross_mlp_ratio: float | None = None,
        mlp: str = "gelu",
        qk_width: int | None = None,
        v_width: int | None = None,
        cross_qk_width: int | None = None,
        cross_v_width: int | None = None,
        last_block: bool = False,
        inputs_per_iteration: str = "all",
        query_residual: bool = True,
        qkv_bias: bool = True,
        embed: bool = True,
        positions: str = "none",
        value_size: int | None = None,
        max_frequency: float | None = None,
        num_bands: int = 16,
        spacing: str = "linear",
        calendar: str = "season_and_hour",
        frames: str = "joint",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        attention: str = "auto",
        kv_mode: str = "auto",
    ):
        super().__init__()
        for name, value, allowed in (
            ("share_cross", share_cross, SHARES),
            ("share_self", share_self, SHARES),
            ("frames", frames, FRAMES),
            ("inputs_per_iteration", inputs_per_iteration, ITERATIONS),
            ("positions", positions, POSITIONS),
        ):
            if value not in allowed:
                raise ValueError(f"model.encoder.{name}={value} is unknown; use one of {', '.join(allowed)}")
        if num_cross < 1:
            raise ValueError(f"model.encoder.num_cross={num_cross} must be at least 1")
        if embed and (positions != "none" or value_size is not None or max_frequency is not None):
            raise ValueError(
                "model.encoder.positions, value_size and max_frequency are of tokens without embedding; "
                "use model.encoder.embed=false"
            )
        self.layout, self.share_cross, self.share_self = layout, share_cross, share_self
        self.reads_coordinates = embed
        self.recurrent = inputs_per_iteration == "timestep"
        self.iterations = num_cross * (layout.frames if self.recurrent else 1)
        self.last_block = last_block
        self.num_frames = layout.frames if frames == "each" else 1
        self.frames = frames
        self.frame_local = frames == "each"
        if layout.observations is not None and not embed:
            raise ValueError("model.encoder.embed=false reads no observations; use model.encoder.embed=true")
        fourier = dict(num_bands=num_bands, spacing=spacing)
        given = dict(positions=positions, value_size=value_size, max_frequency=max_frequency)
        self.inputs = nn.ModuleDict(
            {
                name: InputTokens(item, hidden_size, calendar=calendar, **fourier)
                if embed
                else ConcatenatedTokens(item, **given, **fourier)
                for name, item in layout.inputs.items()
            }
        )
        widths = {hidden_size} if embed else {tokens.size for tokens in self.inputs.values()}
        if len(widths) > 1:
            raise ValueError(
                f"model.encoder.embed=false needs tokens of equally many channels, got {sorted(widths)}; "
                "use model.encoder.embed=true"
            )
        self.observations = None
        if layout.observations is not None:
            self.observations = ObservationRows(layout.observations, hidden_size, **fourier)
        shared = dict(mlp=mlp, qkv_bias=qkv_bias, dropout=dropout, attention_dropout=attention_dropout)
        self.latents = nn.Parameter(torch.empty(num_latents, hidden_size))
        self.cross = nn.ModuleList(
            AttentionLayer(
                hidden_size,
                next(iter(widths)),
                num_heads=cross_heads,
                qk_width=cross_qk_width,
                v_width=cross_v_width,
                mlp_ratio=mlp_ratio if cross_mlp_ratio is None else cross_mlp_ratio,
                residual=query_residual,
                kv_mode=kv_mode,
                backend=attention,
                **shared,
            )
            for _ in range(_distinct(self.iterations, share_cross))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                AttentionLayer(
                    hidden_size,
                    num_heads=num_heads,
                    qk_width=qk_width,
                    v_width=v_width,
                    mlp_ratio=mlp_ratio,
                    backend=attention,
                    **shared,
                )
                for _ in range(self_per_cross)
            )
            for _ in range(_distinct(self.iterations - (not last_block), share_self))
        )
        self.initialise()

    def initialise(self) -> None:
        table_(self.latents)

    @property
    def latent_layout(self) -> LatentLayout:
        return LatentLayout(num_tokens=self.latents.shape[0], hidden_size=self.latents.shape[1], frames=self.num_frames)

    def forward(self, batch: Batch, *, modulation: Modulations | None = None) -> Latents:
        tokens, valid = self._tokens(batch)  # (B T, M, D)
        latents = self.latents[None]  # (1, N, D), broadcast over the batch by the first cross-attention
        frames = self._frames(batch)
        film = None if modulation is None else modulation.repeated(frames)
        contexts = {}
        for index in range(self.iterations):
            which, frame = _which(index, len(self.cross), self.share_cross), self._frame_of(index)
            if (which, frame) not in contexts:
                chosen = (tokens, valid) if frame is None else self._of_frame(tokens, valid, frame)
                contexts[which, frame] = self.cross[which].prepare(
                    chosen[0], mask=chosen[1], num_queries=latents.shape[1]
                )
            latents = self.cross[which](latents, contexts[which, frame], modulation=film)
            if index + 1 < self.iterations or self.last_block:
                for layer in self.blocks[_which(index, len(self.blocks), self.share_self)]:
                    latents = layer(latents, modulation=film)
        return Latents(
            tokens=rearrange(latents, "(b t) n d -> b t n d", t=frames),
            times=batch.clock.times[:, -frames:],
            frames=(batch.first_frame, self.num_frames),
        )

    def _frame_of(self, iteration: int) -> int | None:
        """The frame that an iteration reads; None: all of them."""
        return iteration % self.layout.frames if self.recurrent else None

    def _of_frame(self, tokens: Tensor, valid: Tensor | None, frame: int) -> tuple[Tensor, Tensor | None]:
        """(B T, M, ...) -> (B, M, ...)"""
        frames = self.layout.frames
        return tokens[frame::frames], None if valid is None else valid[frame::frames]

    def _frames(self, batch: Batch) -> int:
        """Latent frames of this batch, which may hold some of the window's only."""
        return batch.num_frames if self.frames == "each" else 1

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        tokens, valid = [], []
        for name, field in batch.inputs.items():
            given, present = self.inputs[name](field, batch.base_time)
            if present is None:
                present = torch.ones(given.shape[:3], dtype=torch.bool, device=given.device)
            tokens.append(self._by_frame(given, batch))
            valid.append(self._by_frame(present, batch))
        complete = all(field.presence is None for field in batch.inputs.values()) and self.observations is None
        if self.observations is not None:
            rows, present = self.observations(batch.observations, batch.base_time, each=self._apart)
            tokens.append(rows)
            valid.append(present)
        joined = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
        return joined, None if complete else torch.cat(valid, dim=1)

    @property
    def _apart(self) -> bool:
        """Whether an attention reads the tokens of one frame only."""
        return self.recurrent or self.frames == "each"

    def _by_frame(self, tokens: Tensor, batch: Batch) -> Tensor:
        """(B, T, P, ...) -> (B, T P, ...) where frames are read jointly, (B T, P, ...) where each is read alone."""
        if not self._apart:
            return tokens.flatten(1, 2)
        return tokens.expand(-1, batch.num_frames, *tokens.shape[2:]).flatten(0, 1)


def _distinct(repeats: int, share: str) -> int:
    """How many sets of weights `repeats` uses need."""
    return min(repeats, {"none": repeats, "all": 1, "all_but_first": 2}[share])


def _which(index: int, distinct: int, share: str) -> int:
    return 0 if share == "all" else min(index, distinct - 1)
