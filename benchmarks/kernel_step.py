"""A training step of `model=healda_v2`, the case of `python -m benchmarks kernels` that is a whole model.

The parts of the preset with its options, put together without Hydra: raw observations and fixed fields on HEALPix in,
74 fields of every frame out; every block computed again in the backward pass, Huber loss by area, AdamW.
Letters: T frames, X tokens of a frame, C hidden, n observations, V variables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import kernel_peer as peer
from benchmarks.kernel_blocks import CONDITION, TOKEN, difference, floors, randomise, their_arguments, their_block
from benchmarks.kernel_cases import BOTH, FORWARD, OURS, Case, Parts, Prepared, Setting, raw_rows
from benchmarks.roofline import poisoned
from data.batch import Batch
from data.field import Field, Reference
from data.healpix import HEALPixGrid
from data.layout import InputLayout, Layout, ObservationLayout, TargetLayout, Variable
from data.observations import Observations
from kernels.film_tokenizer import row_bytes
from models.conditioning.noise_level import EDMEmbedder
from models.decoders.video_patch import VideoPatchDecoder
from models.encode_process_decode import EncodeProcessDecode
from models.encoders.video_patch import VideoPatchEncoder
from models.heads import DeterministicHead
from models.latents import Latents
from models.positions.rotary import FrameRotary
from models.processors.video_dit import VideoDiT

STEP = "model=healda_v2, training step, blocks recomputed"  # its row
PATCH, SECONDS, FIXED, TARGET = 2, 21_600, 2, "analysis"
FEATURES, TYPES, CHANNELS, PLATFORMS = 50, 16, 543, 64  # ids as `raw_rows` draws them


def layout_of(frames: int, level: int, variables: int) -> Layout:
    """Fixed fields and observations of T frames; V variables at the times of all."""
    grid = HEALPixGrid(level, "padxy")
    fields = tuple(Variable(f"v{number}") for number in range(variables))
    times = tuple((frame + 1 - frames) * SECONDS for frame in range(frames))
    return Layout(
        inputs={"static": InputLayout((Variable("orography"), Variable("land")), grid, 1, SECONDS)},
        targets={TARGET: TargetLayout(fields, grid, times)},
        observations=ObservationLayout(
            num_channels=CHANNELS,
            num_platforms=PLATFORMS,
            num_types=TYPES,
            num_features=FEATURES,
            frames=frames,
            step=SECONDS,
        ),
    )


def model_of(layout: Layout, *, hidden: int, heads: int, queries: int, layers: int) -> EncodeProcessDecode:
    encoder = VideoPatchEncoder(layout, carries_context=True, hidden_size=hidden, patch_size=PATCH, token_size=TOKEN)
    condition = EDMEmbedder(size=CONDITION, num_features=CONDITION)
    latents = replace(encoder.latent_layout, condition_size=condition.size)
    processor = VideoDiT(
        layout,
        latents,
        depth=layers,
        num_heads=heads,
        observation_heads=queries,
        observation_kv_heads=2,
        checkpoint="all",
    )
    read = replace(latents, frames=1, held=(0,))
    return EncodeProcessDecode(
        encoder,
        processor,
        nn.ModuleDict({TARGET: VideoPatchDecoder(layout, read, target=TARGET, outputs_per_variable=1)}),
        layout=layout,
        head=DeterministicHead(loss="huber"),
        condition=condition,
        frames={TARGET: layout.frames_of(TARGET, latents.frames)},
    )


class TheirBlocks(nn.Module):
    """PhysicsNeMo's blocks with the weights of ours, in the place of our processor. Each is recomputed, as ours are."""

    def __init__(self, ours: VideoDiT, frames: int, hidden: int, heads: int, queries: int):
        super().__init__()
        self.blocks = nn.ModuleList(their_block(block, hidden, heads, queries) for block in ours.blocks)
        self.rotary = FrameRotary(frames, hidden // heads, 100.0)

    def forward(self, latents: Latents) -> Latents:
        x, arguments = latents.tokens, their_arguments(latents.context.tokens, latents.context.offsets, self.rotary)
        for block in self.blocks:
            x = checkpoint(block, x, latents.condition, **arguments, use_reentrant=False)
        return latents.with_tokens(x)


def batch_of(setting: Setting, layout: Layout, rows: int) -> Batch:
    """One sample of random fields and observations."""
    columns = raw_rows(setting, rows)
    last = columns["times"].new_full((1, 1), int(columns["times"][0, 0]) + (layout.frames - 1) * SECONDS)
    times = last + torch.tensor(layout.targets[TARGET].lead_times, device=setting.device)
    frame = columns["frame"] % layout.frames
    offset = setting.integers(SECONDS, rows, dtype=torch.int32) - SECONDS // 2
    columns |= {"times": times, "frame": frame, "time_offset": offset}

    def field(item: InputLayout | TargetLayout, at: Tensor) -> Field:
        shape = (1, at.shape[1], len(item.variables), *item.grid.shape)
        return Field(setting.normal(*shape, dtype=torch.float32), item.variables, item.grid, at)

    target = field(layout.targets[TARGET], times)
    reference = Reference(torch.zeros_like(target.values), torch.ones_like(target.values[:1, :1]))
    return Batch(
        {"static": field(layout.inputs["static"], last)},
        {TARGET: replace(target, reference=reference)},
        layout,
        observations=Observations(**columns),
    )


def step_case(
    setting: Setting,
    *,
    frames: int,
    places: int,
    hidden: int,
    heads: int,
    queries: int,
    rows: int,
    layers: int,
    variables: int,
) -> Prepared:
    """places: X, of which PATCH x PATCH cells each make the grid. The peer is PhysicsNeMo's blocks between our
    tokenizers and read-out. Blocks were compared with float64 by their own case; here both outputs are compared."""
    level = round(math.log2(places * PATCH**2 / 12) / 2)
    layout = layout_of(frames, level, variables)
    with setting.device:
        ours = model_of(layout, hidden=hidden, heads=heads, queries=queries, layers=layers).train()
    randomise(setting, ours)
    batch = batch_of(setting, layout, rows)
    models = {OURS: ours}
    if setting.theirs:
        blocks = TheirBlocks(ours.processor, frames, hidden, heads, queries).to(setting.device)
        parts = (ours.encoder, blocks, ours.decoder)
        shared = {"layout": layout, "head": ours.head, "condition": ours.condition, "frames": ours.frames}
        models[peer.NAME] = EncodeProcessDecode(*parts, **shared).train()
    found, steps = {}, {}
    for name, model in models.items():
        with poisoned(setting.device), torch.no_grad(), setting.autocast():
            found[name] = model(batch)[TARGET].float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=setting.device.type == "cuda")
        steps[name] = training_step(setting, model, batch, optimizer)
    errors: dict[str, float] = {}
    notes = {"layers": layers, **difference(found, errors)}
    return Prepared(errors, {BOTH: steps}, {BOTH: step_floors(setting, batch, hidden, queries, layers)}, notes=notes)


def training_step(
    setting: Setting, model: EncodeProcessDecode, batch: Batch, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    target = batch.targets[TARGET]
    weights = target.grid.area_weights.to(setting.device, torch.float32)

    def step() -> None:
        with setting.autocast():
            output = model(batch)[TARGET]
        error, weight = model.head.loss(output.float(), target, weights)
        (error / weight).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_floors(setting: Setting, batch: Batch, hidden: int, queries: int, layers: int) -> Parts:
    """Blocks forward, again, and backward; the tokenizer of observations and both ends of the model, forward and
    backward."""
    layout, rows = batch.layout, len(batch.observations)
    cells = layout.targets[TARGET].grid.num_points
    frames, places = layout.frames, cells // PATCH**2
    parts = floors(setting, frames, places, hidden, queries, rows)
    numbers = frames * cells * (FIXED + len(layout.targets[TARGET].variables))
    ends = (4 * numbers + frames * places * hidden * setting.size, 2 * numbers * hidden)
    described, film = FEATURES + 28, 2 * TOKEN  # 28: widths of the three embeddings
    tokens = (
        rows * (row_bytes(vars(batch.observations), FEATURES) + 4 * TOKEN),
        2 * rows * (described * film + film * 2 * TOKEN),
    )
    once = [ends, (2 * ends[0], 2 * ends[1]), tokens, (tokens[0], 2 * tokens[1])]
    return once + layers * (parts[FORWARD] + parts[BOTH])


def fitting(case: Case, free: float) -> Case:
    """With as many of its layers as fit, and what those need."""
    if not case.layer_needs:
        return case
    layers = max(1, min(case.shape["layers"], int((free - case.needs) // case.layer_needs)))
    needs = case.needs + layers * case.layer_needs
    return replace(case, shape=case.shape | {"layers": layers}, needs=needs, layer_needs=0.0)


def layer_costs(rows: list[dict]) -> str:
    """What one layer more adds to a training step, from the steps of most and fewest layers; empty without two."""
    steps = sorted((row for row in rows if row["what"] == STEP and "seconds" in row), key=lambda row: row["layers"])
    if len(steps) < 2 or steps[0]["layers"] == steps[-1]["layers"]:
        return ""
    few, many = steps[0], steps[-1]
    more = many["layers"] - few["layers"]
    costs = [
        f"{name} {1000 * (many['seconds'][name] - few['seconds'][name]) / more:.3g} ms"
        for name in many["seconds"]
        if name in few["seconds"]
    ]
    return f"One layer more adds to a training step: {', '.join(costs)}."
