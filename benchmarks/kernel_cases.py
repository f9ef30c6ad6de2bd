"""What `python -m benchmarks kernels` measures: per kernel its inputs, a float64 reference, the peer, and a floor.

Floors count bytes that must move and operations that must be done: each input read once, each output written once,
nothing in between, and pixel attention with its projections absorbed into query and output.
Letters: N cells, n observations, q query heads, g key/value heads, d head width, c token width, C hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks import kernel_peer as peer
from benchmarks.roofline import largest_error, poisoned
from kernels.film_tokenizer import film_tokenizer, row_bytes
from kernels.pixel_attention import pixel_attention, plan
from kernels.sort_and_pack import sort_and_pack
from kernels.temporal_attention import temporal_attention
from models.positions.rotary import FrameRotary

OURS, LOOP = "ours", "reference"
FORWARD, BOTH = "forward", "forward+backward"
Output = Tensor | Sequence[Tensor]  # of an implementation
Parts = list[tuple[float, float]]  # (bytes, operations) that follow each other
GIGA = 2**30


@dataclass(frozen=True)
class Setting:
    """Where and in which dtype; theirs: whether there is a peer; loops: whether to time our own references too."""

    device: torch.device
    dtype: torch.dtype
    random: torch.Generator
    theirs: bool
    loops: bool

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device, dtype=dtype or self.dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self.random, device=self.device, dtype=dtype)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """what: its row. shape: numbers that `prepare` takes. needs: bytes of memory; layer_needs: of each layer, of
    which as many are measured as fit. takes: seconds on a GPU that it may need, compiling included; allowances, not
    measurements."""

    what: str
    shape: dict[str, int | str]
    prepare: Callable[..., Prepared]
    needs: float = 0.0
    takes: float = 20.0
    layer_needs: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """errors: largest error of each implementation against float64, found before anything is timed. steps: mode ->
    implementation -> step. floors: mode -> parts. absent: why there is no peer."""

    errors: dict[str, float]
    steps: dict[str, dict[str, Callable[[], object]]]
    floors: dict[str, Parts]
    absent: str = ""
    notes: dict[str, float] = field(default_factory=dict)


def counted_offsets(setting: Setting, cells: int, rows: int, counts: str) -> Tensor:
    """(N + 1,) int64 of n rows, uniform over the cells or heavy-tailed: three of ten cells empty, the others Pareto
    distributed with a mean that samples hardly reach, the fullest with up to 100,000 rows."""
    weights = torch.ones(cells, device=setting.device, dtype=torch.float64)
    if counts == "heavy-tailed":
        drawn = torch.rand(cells, generator=setting.random, device=setting.device, dtype=torch.float64)
        weights = drawn.clamp(min=1e-9) ** (-1 / 1.1) * (drawn > 0.3).flip(0)
        weights = (weights / weights.sum()).clamp(max=min(1e5 / rows, 0.5))
    ends = weights.cumsum(0)
    drawn = torch.rand(rows, generator=setting.random, device=setting.device, dtype=torch.float64) * ends[-1]
    found = torch.bincount(torch.searchsorted(ends, drawn, right=True).clamp(max=cells - 1), minlength=cells)
    return torch.cat([found.new_zeros(1), found.cumsum(0)])


def several(output: Output) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def gradients_of(output: Output, leaves: Sequence[Tensor], gradient: Output) -> tuple[Tensor, ...]:
    """Of leaves; gradient: of each output, in any dtype."""
    outputs = several(output)
    towards = [part.to(one.dtype) for part, one in zip(several(gradient), outputs, strict=True)]
    return torch.autograd.grad(outputs, leaves, towards)


def differentiable(
    runs: dict[str, Callable[[], Output]], leaves: Sequence[Tensor], gradient: Output
) -> dict[str, dict[str, Callable[[], object]]]:
    """Steps in both modes."""

    def forward(run: Callable[[], Output]) -> Callable[[], object]:
        return torch.no_grad()(run)

    def both(run: Callable[[], Output]) -> Callable[[], object]:
        return lambda: gradients_of(run(), leaves, gradient)

    return {
        FORWARD: {name: forward(run) for name, run in runs.items()},
        BOTH: {name: both(run) for name, run in runs.items()},
    }


def checked(
    setting: Setting,
    runs: dict[str, Callable[[], Output]],
    leaves: Sequence[Tensor],
    gradient: Output,
    sampled: Callable[[Output, Sequence[Tensor]], list[Tensor]],
    expected: list[Tensor],
) -> dict[str, float]:
    """Errors of outputs and gradients in full-size runs on poisoned memory. gradient: zero outside the sample, so that
    gradients of weights are those of the sample; sampled: the numbers that `expected` holds."""
    errors = {}
    for name, run in runs.items():
        with poisoned(setting.device):
            output = run()
            gradients = gradients_of(output, leaves, gradient)
        spread = [part for part in (*several(output), *gradients) if not part.isfinite().all()]
        errors[name] = math.nan if spread else largest_error(sampled(output, gradients), expected)
    return errors


def pixel_case(setting: Setting, *, cells: int, rows: int, heads: int, groups: int, counts: str) -> Prepared:
    width = token = 32
    scale = width**-0.5
    offsets = counted_offsets(setting, cells, rows, counts)
    query, tokens = setting.normal(cells, heads, width), setting.normal(rows, token)
    weights = [setting.normal(groups * width, token) * token**-0.5 for _ in range(2)] + [setting.normal(groups * width)]
    leaves = [part.requires_grad_() for part in (query, tokens, *weights)]
    planned = plan(offsets, rows, query, weights[0])

    def ours(path: str) -> Callable[[], Tensor]:
        occupied = planned if path == "auto" and setting.device.type == "cuda" else None
        return lambda: pixel_attention(query, tokens, offsets, *weights, scale=scale, path=path, occupied=occupied)

    runs = {OURS: ours("auto")}
    if setting.loops:
        runs[LOOP] = ours("reference")
    if setting.theirs:
        packed = peer.packing(offsets)
        runs[peer.NAME] = lambda: peer.pixel_attention(
            query, tokens, tuple(weights), kv_heads=groups, scale=scale, packed=packed
        )
    # The sample: cells at random, the fullest and, where there is one, an empty one.
    length = offsets.diff()
    chosen = torch.cat([setting.integers(cells, 24), length.argmax()[None], length.argmin()[None]]).unique()
    taken = torch.cat([torch.arange(offsets[i], offsets[i + 1], device=setting.device) for i in chosen.tolist()])
    gradient = torch.zeros(cells, heads * width, device=setting.device, dtype=setting.dtype)
    gradient[chosen] = setting.normal(len(chosen), heads * width)
    few = [part.detach().double().requires_grad_() for part in (query[chosen], tokens[taken], *weights)]
    local = torch.cat([length.new_zeros(1), length[chosen].cumsum(0)])
    output = pixel_attention(few[0], few[1], local, *few[2:], scale=scale, path="reference")
    expected = [output.detach(), *torch.autograd.grad(output, few, gradient[chosen].double())]
    checks = {name: run for name, run in runs.items() if name == OURS or setting.device.type == "cuda"}
    errors = checked(
        setting, checks, leaves, gradient, lambda out, g: [out[chosen], g[0][chosen], g[1][taken], *g[2:]], expected
    )
    for name in runs.keys() - checks.keys():  # loops, whose backward pass takes minutes: outputs alone
        with torch.no_grad():
            errors[name] = largest_error([runs[name]()[chosen]], expected[:1])
    wide, long = cells * heads * width * setting.size, rows * token * setting.size
    projecting, products = 2 * cells * heads * width * token, 2 * rows * heads * token
    forward = (2 * wide + long + 8 * cells, 2 * projecting + 2 * products)
    backward = (4 * wide + 2 * long + 8 * cells, 6 * projecting + 5 * products)
    steps = differentiable(runs, leaves, setting.normal(cells, heads * width))
    notes = {"fullest": int(length.max()), "empty": int((length == 0).sum())}
    return Prepared(errors, steps, {FORWARD: [forward], BOTH: [forward, backward]}, notes=notes)


def raw_rows(setting: Setting, rows: int) -> dict[str, Tensor | None]:
    """Rows as they come from files: half measured in place, half from satellites."""

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(rows, generator=setting.random, device=setting.device)
        return low + (high - low) * drawn

    times = 1_700_000_000 + torch.arange(8, device=setting.device)[None] * 21_600
    frame = setting.integers(8, rows, dtype=torch.int8)
    in_place = torch.rand(rows, generator=setting.random, device=setting.device) < 0.5
    angles = {"scan_angle": (-50, 50), "satellite_zenith": (0, 60), "solar_zenith": (0, 180)}
    seen = {name: uniform(*range_).masked_fill(in_place, torch.nan) for name, range_ in angles.items()}
    measured = {"height": uniform(0, 20_000), "pressure": uniform(1, 1050)}
    return {
        "value": setting.normal(rows, dtype=torch.float32),
        "features": None,
        "latitude": uniform(-90, 90),
        "longitude": uniform(0, 360),
        "time_offset": setting.integers(21_600, rows, dtype=torch.int32) - 10_800,
        "times": times,
        "batch": torch.zeros_like(frame),
        "frame": frame,
        **{name: setting.integers(high, rows, dtype=torch.int16) for name, high in _IDS.items()},
        **{name: part.masked_fill(~in_place, torch.nan) for name, part in measured.items()},
        **seen,
    }


_IDS = {"type": 16, "channel": 543, "platform": 64}


def film_case(setting: Setting, *, rows: int, features: int) -> Prepared:
    columns = raw_rows(setting, rows)
    widths, hidden, token = (4, 16, 8), 64, 32

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(setting.normal(*shape, dtype=torch.float32) * shape[-1] ** -0.5)

    tables = [weight(1024, width) for width in widths]
    known = features + sum(widths)
    expand, norm = (weight(hidden, known), weight(hidden)), (weight(hidden), weight(hidden))
    project = (weight(2 * token, hidden), weight(2 * token))
    leaves = [*tables, *expand, *norm, *project]

    def ours(path: str) -> Callable[[], Tensor]:
        return setting.autocast()(lambda: film_tokenizer(columns, tables, expand, norm, project, path=path))

    runs = {OURS: ours("auto")}
    if setting.loops:
        runs[LOOP] = ours("reference")
    if setting.theirs and features == 30:
        runs[peer.NAME] = peer.film_tokenizer(columns, tables, expand, norm, project)
    chosen = setting.integers(rows, min(4096, rows)).unique()
    gradient = torch.zeros(rows, token, device=setting.device)
    gradient[chosen] = setting.normal(len(chosen), token, dtype=torch.float32)
    some = {name: part if name in ("features", "times") else part[chosen] for name, part in columns.items()}
    few = [part.detach().double().requires_grad_() for part in leaves]
    some["value"] = some["value"].double()
    output = film_tokenizer(some, few[:3], few[3:5], few[5:7], few[7:], path="reference")
    expected = [output.detach(), *torch.autograd.grad(output, few, gradient[chosen].double())]
    errors = checked(setting, runs, leaves, gradient, lambda out, g: [out[chosen], *g], expected)
    read, written = row_bytes(columns, features), 4 * token
    products = 2 * rows * (known * hidden + 2 * hidden * token)
    forward = (rows * (read + written), products)
    backward = (rows * (read + written), 3 * products)
    steps = differentiable(runs, leaves, setting.normal(rows, token, dtype=torch.float32))
    why = "" if features == 30 else f"{peer.NAME} computes no {features} features"
    return Prepared(errors, steps, {FORWARD: [forward], BOTH: [forward, backward]}, absent=why)


def sort_case(setting: Setting, *, cells: int, rows: int) -> Prepared:
    cell = setting.integers(cells, rows, dtype=torch.int32)
    few = cell[: min(rows, 5000)]

    def wrong(order: Tensor, offsets: Tensor, *, stable: bool) -> float:
        """0.0 where it is right, else infinite: every row once, in the order of cells, offsets as counted."""
        counts = torch.bincount(cell, minlength=cells)
        right = torch.equal(offsets.long().diff(), counts) and int(offsets[0]) == 0
        sorted_cells = cell[order.long()]
        right &= bool((sorted_cells.diff() >= 0).all())
        right &= bool((torch.bincount(order.long(), minlength=rows) == 1).all())
        if stable:
            right &= not bool(((order.diff() < 0) & (sorted_cells.diff() == 0)).any())
        return 0.0 if right else math.inf

    runs = {OURS: lambda: sort_and_pack(cell, cells)}
    if setting.loops:
        runs[LOOP] = lambda: sort_and_pack(cell, cells, path="reference")
    if setting.theirs:
        runs[peer.NAME] = lambda: peer.sort_and_pack(cell, cells)
    with poisoned(setting.device):
        errors = {name: wrong(*run(), stable=name != peer.NAME) for name, run in runs.items()}
        pairs = zip(sort_and_pack(few, cells), sort_and_pack(few, cells, path="reference"), strict=True)
        errors[OURS] = max(errors[OURS], 0.0 if all(torch.equal(*pair) for pair in pairs) else math.inf)
    return Prepared(errors, {FORWARD: runs}, {FORWARD: [(12 * rows + 8 * cells, 0)]})


def temporal_case(setting: Setting, *, frames: int, places: int, heads: int, width: int) -> Prepared:
    """Rotation by frame, causal, linear: HealDA's."""
    qkv = setting.normal(1, frames, places, 3, heads, width).requires_grad_()
    tables = FrameRotary(frames, width, 100.0).to(setting.device)
    rotation, options = (tables.cos, tables.sin), {"softmax": False, "causal": True, "window": None}
    runs = {OURS: lambda: temporal_attention(qkv, rotation, **options)}
    if setting.loops:
        runs[LOOP] = lambda: temporal_attention(qkv, rotation, **options, path="reference")
    if setting.theirs:
        theirs = peer.temporal_attention(rotation, heads=heads, width=heads * width)
        runs[peer.NAME] = lambda: theirs(qkv.flatten(3)).unflatten(-1, (heads, width))
    some = (slice(None), slice(None), slice(None, None, max(places // 16, 1)))
    gradient = torch.zeros(1, frames, places, heads, width, device=setting.device, dtype=setting.dtype)
    gradient[some] = setting.normal(*gradient[some].shape)
    few = qkv[some].detach().double().requires_grad_()
    turned = [_rotated(part, *rotation) for part in few.unbind(3)[:2]]
    output = temporal_attention(torch.stack([*turned, few[:, :, :, 2]], dim=3), None, **options, path="reference")
    expected = [output.detach(), *torch.autograd.grad(output, [few], gradient[some].double())]
    errors = checked(setting, runs, [qkv], gradient, lambda out, g: [out[some], g[0][some]], expected)
    one = frames * places * heads * width * setting.size
    products = 2 * 2 * frames * frames * places * heads * width
    forward, backward = (4 * one, products), (7 * one, 2.5 * products)
    steps = differentiable(runs, [qkv], setting.normal(*gradient.shape))
    return Prepared(errors, steps, {FORWARD: [forward], BOTH: [forward, backward]})


def _rotated(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table.double()[:, None, None] for table in (cos, sin))
    return part * cos + torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2) * sin
