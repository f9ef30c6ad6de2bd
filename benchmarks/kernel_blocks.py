"""Cases of `python -m benchmarks kernels` that are larger than a kernel: attention within a disk, a block.

Letters: T frames, X places of a frame, N = T X, C hidden, n observations, q query heads, d head width, c token width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import kernel_peer as peer
from benchmarks.kernel_cases import (
    BOTH,
    FORWARD,
    OURS,
    Parts,
    Prepared,
    Setting,
    checked,
    counted_offsets,
    differentiable,
)
from benchmarks.roofline import largest_error, poisoned
from data.healpix import cell_to_angles, num_cells
from models.attention.disk import Disk
from models.latents import ObservationContext
from models.positions.fourier import unit_sphere
from models.positions.rotary import FrameRotary
from models.processors.video_dit import VideoDiT, VideoDiTBlock

DENSE = "dense"  # attention among all places
DIFFERENCE = 0.1  # of ours and the peer's outputs: two roundings to 16 bits in every layer
RADIUS = 10.46  # degrees
CONDITION, TOKEN, HEAD, KV_HEADS = 128, 32, 32, 2
CHECKED_PLACES = 48  # of a frame in the comparison with float64: the same weights, fewer tokens


def disk_case(setting: Setting, *, frames: int, level: int, heads: int, width: int) -> Prepared:
    """Beside attention among all places, dense and without a mask, of the same tensors."""
    coordinates = torch.stack(cell_to_angles(torch.arange(num_cells(level)), level, "padxy"), dim=-1)
    disk, scale = Disk(coordinates, RADIUS).to(setting.device), width**-0.5
    places = len(coordinates)
    leaves = [setting.normal(frames, heads, places, width).requires_grad_() for _ in range(3)]
    runs = {OURS: lambda: disk.attend(*leaves, scale=scale)}
    chosen = setting.integers(places, 24).unique()
    gradient = torch.zeros_like(leaves[0], requires_grad=False)
    gradient[:1, :, chosen] = setting.normal(1, heads, len(chosen), width)
    few = [part[:1].detach().double().requires_grad_() for part in leaves]
    vectors = unit_sphere(coordinates.to(setting.device))
    inside = vectors[chosen] @ vectors.mT >= disk.cosine
    logits = (few[0][:, :, chosen] @ few[1].mT * scale).masked_fill(~inside, -torch.inf)
    output = logits.softmax(dim=-1) @ few[2]
    wanted = torch.autograd.grad(output, few, gradient[:1, :, chosen].double())

    def sampled(found: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [found[:1, :, chosen], *(part[:1] for part in gradients)]

    errors = checked(setting, runs, leaves, gradient, sampled, [output.detach(), *wanted])
    runs[DENSE] = lambda: F.scaled_dot_product_attention(*leaves, scale=scale)
    one = frames * heads * places * width * setting.size
    products = 4 * frames * heads * places**2 * width * float(inside.double().mean())  # of pairs within the disk
    floor = [(4 * one, products), (8 * one, 2.5 * products)]
    steps = differentiable(runs, leaves, setting.normal(*leaves[0].shape))
    return Prepared(errors, steps, {FORWARD: floor[:1], BOTH: floor}, notes={"places": places})


def our_block(setting: Setting, frames: int, hidden: int, heads: int, queries: int) -> VideoDiTBlock:
    """With weights of every size, gates included."""
    latents = SimpleNamespace(
        hidden_size=hidden, observation_size=TOKEN, frames=frames, condition_size=CONDITION, num_tokens=None
    )
    with setting.device:
        made = VideoDiT(None, latents, depth=1, num_heads=heads, observation_heads=queries).blocks[0].train()
    randomise(setting, made)
    return made


def randomise(setting: Setting, module: nn.Module) -> None:
    """Weights that let every part show in the output."""
    for parameter in module.parameters():
        fan_in = parameter.numel() / parameter.shape[0]
        drawn = setting.normal(*parameter.shape, dtype=torch.float32)
        parameter.data = drawn * (0.5 * fan_in**-0.5 if parameter.ndim > 1 else 0.1)


def their_block(ours: nn.Module, hidden: int, heads: int, queries: int) -> nn.Module:
    cross = {"token_dim": TOKEN, "n_q_heads": queries, "n_kv_heads": KV_HEADS, "d_head": HEAD}
    made = peer.block(ours, hidden=hidden, heads=heads, condition=CONDITION, cross=cross)
    return made.to(next(ours.parameters()).device)


def inputs(setting: Setting, frames: int, places: int, hidden: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, condition, tokens and offsets."""
    x, condition = setting.normal(1, frames, places, hidden), setting.normal(1, CONDITION, dtype=torch.float32)
    return x, condition, setting.normal(rows, TOKEN), counted_offsets(setting, frames * places, rows, "uniform")


def their_arguments(tokens: Tensor, offsets: Tensor, rotary: FrameRotary) -> dict[str, dict]:
    packed = peer.packing(offsets)
    return {
        "cross_attn_kwargs": {"tokens": tokens, **vars(packed)},
        "temporal_attn_kwargs": {"rope_cos": rotary.cos, "rope_sin": rotary.sin},
    }


def block_case(
    setting: Setting, *, frames: int, places: int, hidden: int, heads: int, queries: int, rows: int, compiled: str
) -> Prepared:
    ours = our_block(setting, frames, hidden, heads, queries)
    modules: dict[str, nn.Module] = {OURS: ours}
    if setting.theirs:
        modules[peer.NAME] = their_block(ours, hidden, heads, queries)
    rotary = FrameRotary(frames, hidden // heads, 100.0).to(setting.device)

    def run(name: str, module: Callable, x: Tensor, condition: Tensor, tokens: Tensor, offsets: Tensor) -> Callable:
        if name == OURS:
            with setting.autocast():
                context = ours.observations.planned(ObservationContext(tokens, offsets))
            return setting.autocast()(lambda: module(x, condition, None, context, None))
        arguments = their_arguments(tokens, offsets, rotary)
        return setting.autocast()(lambda: module(x, condition, **arguments))

    errors = _block_errors(setting, modules, run, frames, hidden, max(rows // max(places // CHECKED_PLACES, 1), 1))
    if compiled == "compiled":
        modules = {name: torch.compile(module) for name, module in modules.items()}
    x, condition, tokens, offsets = inputs(setting, frames, places, hidden, rows)
    x.requires_grad_(), tokens.requires_grad_()
    runs = {name: run(name, module, x, condition, tokens, offsets) for name, module in modules.items()}
    gradient = setting.normal(*x.shape)
    found = {}
    for name, whole in runs.items():
        with poisoned(setting.device), torch.no_grad():
            found[name] = whole()
    notes = difference(found, errors)
    steps = {FORWARD: {}, BOTH: {}}
    for name, whole in runs.items():
        leaves = [x, tokens, *modules[name].parameters()]
        for mode, step in differentiable({name: whole}, leaves, gradient).items():
            steps[mode] |= step
    return Prepared(errors, steps, floors(setting, frames, places, hidden, queries, rows), notes=notes)


def difference(found: dict[str, Tensor], errors: dict[str, float]) -> dict[str, float]:
    """At full size no float64 is at hand: ours and the peer's output are compared with each other, and no number may be
    NaN. Adds to the errors where that is not so."""
    errors |= {name: float("nan") for name, output in found.items() if not output.isfinite().all()}
    if len(found) < 2:
        return {}
    between = largest_error([found[OURS]], [found[peer.NAME]])
    if not between <= DIFFERENCE:
        errors[OURS] = between
    return {"difference": between}


def _block_errors(
    setting: Setting, modules: dict[str, nn.Module], run: Callable, frames: int, hidden: int, rows: int
) -> dict[str, float]:
    """Outputs and gradients of input, tokens and weights against our block in float64, on fewer places."""
    x, condition, tokens, offsets = inputs(setting, frames, CHECKED_PLACES, hidden, rows)
    gradient = setting.normal(*x.shape)
    exact = copy.deepcopy(modules[OURS]).double()
    wide = [part.double().requires_grad_() for part in (x, tokens)]
    output = exact(wide[0], condition.double(), None, ObservationContext(wide[1], offsets), None)
    names = [name for name, _ in exact.named_parameters()]
    expected = [output, *torch.autograd.grad(output, [*wide, *exact.parameters()], gradient.double())]
    x.requires_grad_(), tokens.requires_grad_()
    errors = {}
    for name, module in modules.items():
        weights = [module.get_parameter(one if name == OURS else peer.their_name(one)) for one in names]
        with poisoned(setting.device):
            output = run(name, module, x, condition, tokens, offsets)()
            gradients = torch.autograd.grad(output, [x, tokens, *weights], gradient.to(output.dtype))
        errors[name] = largest_error([output, *gradients], expected)
    return errors


def floors(setting: Setting, frames: int, places: int, hidden: int, queries: int, rows: int) -> dict[str, Parts]:
    """Each sub-layer ideally fused: a row of (activations read and written forward, backward, products forward)."""
    cells, size = frames * places, setting.size
    one = cells * hidden * size
    wide = queries * HEAD / hidden  # of the projected queries, in activations
    product = 2 * cells * hidden * hidden
    parts = [
        (20, 24, 0),  # four norms with shift and scale, four gated residuals
        (4, 8, 3 * product),  # query, key and value of a frame
        (4, 6, 0),  # their norms
        (4, 8, 4 * cells * places * hidden),
        (2, 4, product),
        (1 + wide, 2 + 2 * wide, wide * product),
        (1 + wide, 2 + 2 * wide, wide * product),
        (4, 8, 3 * product),  # query, key and value of a place
        (4, 7, 4 * cells * frames * hidden),
        (2, 4, product),
        (5, 14, 4 * product),
        (5, 10, 4 * product),
    ]
    forward = [(moved * one, operations) for moved, _, operations in parts]
    backward = [(moved * one, 2 * operations) for _, moved, operations in parts]
    backward[3] = (backward[3][0], 2.5 * parts[3][2])  # the logits again
    long, per_row = rows * TOKEN * size, 2 * rows * queries * TOKEN
    forward.append((2 * wide * one + long, 2 * per_row))
    backward.append((4 * wide * one + 2 * long, 5 * per_row))
    return {FORWARD: forward, BOTH: forward + backward}
