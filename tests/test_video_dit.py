"""The video transformer against a plain float64 reading of its equations, and what it promises about training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu, silu

from kernels.segments import Occupied
from models.attention.self_attention import TemporalAttention
from models.latents import LatentLayout, Latents, ObservationContext
from models.processors.video_dit import VideoDiT
from tests.waiting import NoDataDependence

B, T, X, D, HEADS, DC, TOKEN = 2, 4, 5, 12, 2, 6, 7
OBSERVATION = {"observation_heads": 4, "observation_kv_heads": 2, "observation_head_dim": 3}
COUNTS = [3, 0, 1, 0, 0] * (B * T)  # observations in each cell; most cells are empty


def processor(**options) -> VideoDiT:
    """In float64 with random weights everywhere, gates included."""
    torch.manual_seed(0)
    described = LatentLayout(num_tokens=X, hidden_size=D, frames=T, observation_size=TOKEN, condition_size=DC)
    given = {"depth": 1, "num_heads": HEADS, "mlp_ratio": 2.0, **OBSERVATION, **options}
    model = VideoDiT(None, described, **given).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def latents(*, masked: bool = False) -> Latents:
    torch.manual_seed(1)
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    valid = None
    if masked:
        valid = torch.rand(B, T, X) < 0.6
        valid[0, 1] = False  # a frame of which nothing is known
    return Latents(
        tokens=torch.randn(B, T, X, D, dtype=torch.float64, requires_grad=True),
        times=torch.zeros(B, T, dtype=torch.int64),
        valid=valid,
        frames=(0, T),
        context=ObservationContext(
            torch.randn(int(offsets[-1]), TOKEN, dtype=torch.float64, requires_grad=True), offsets, Occupied.of(offsets)
        ),
        condition=torch.randn(B, DC, dtype=torch.float64, requires_grad=True),
    )


# The reference: one token, one head, one observation at a time


def normed(x, eps=1e-6):
    return (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt()


def head_norm(block, kind: str, heads, which: str):
    if kind == "none":
        return heads
    if kind == "layer":
        heads = normed(heads, 1e-5)
    else:
        heads = heads / (heads.square().mean() + 1e-6).sqrt()
    norm = getattr(block.spatial, f"{which}_norm")
    heads = heads if norm.weight is None else heads * norm.weight
    return heads if norm.bias is None else heads + norm.bias


def split(vector, parts: int):
    return vector.reshape(parts, -1)


def softmax(logits):
    weights = torch.stack(logits).exp()
    return weights / weights.sum()


def mixed(weights, values):
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def turned(vector, frame: int, base: float):
    """Adjacent pairs of a head turn by frame * base**(-2j / width)."""
    out = []
    for j in range(len(vector) // 2):
        angle = frame * base ** (-2 * j / len(vector))
        first, second = vector[2 * j], vector[2 * j + 1]
        out += [first * math.cos(angle) - second * math.sin(angle), second * math.cos(angle) + first * math.sin(angle)]
    return torch.stack(out)


def reference(model: VideoDiT, given: Latents, *, qk_norm, softmax_frames, causal, window, base) -> torch.Tensor:
    block = model.blocks[0]
    grid = [[list(frame) for frame in sample] for sample in given.tokens]  # of (D,) vectors
    if given.valid is not None:
        for b, t, x in (~given.valid).nonzero().tolist():
            grid[b][t][x] = torch.zeros(D, dtype=torch.float64)
    width = D // HEADS

    def parts(norm, b, count):
        return split(norm.linear(silu(given.condition[b])), count)

    def branch(function, norm, count=3, first=0):
        """Adds gate * function(modulated tokens) at every place at once."""
        result = []
        for b in range(B):
            shift, scale, gate = parts(norm, b, count)[first : first + 3]
            inside = [[normed(vector) * (1 + scale) + shift for vector in frame] for frame in grid[b]]
            result.append([[grid[b][t][x] + gate * function(inside, b, t, x) for x in range(X)] for t in range(T)])
        grid[:] = result

    def spatial(inside, b, t, x):
        qkv = [split(block.spatial.qkv(vector), 3 * HEADS) for vector in inside[t]]
        seen = [y for y in range(X) if given.valid is None or given.valid[b, t, y]]
        heads = []
        for h in range(HEADS):
            query = head_norm(block, qk_norm, qkv[x][h], "query")
            keys = [head_norm(block, qk_norm, qkv[y][HEADS + h], "key") for y in seen]
            values = [qkv[y][2 * HEADS + h] for y in seen]
            weights = softmax([query @ key / math.sqrt(width) for key in keys]) if seen else []
            heads.append(mixed(weights, values) if seen else torch.zeros(width, dtype=torch.float64))
        return block.spatial.output(torch.cat(heads))

    def observed(inside, b, t, x):
        layer, cell = block.observations, (b * T + t) * X + x
        rows = given.context.tokens[given.context.offsets[cell] : given.context.offsets[cell + 1]]
        num, shared, wide = (OBSERVATION[f"observation_{name}"] for name in ("heads", "kv_heads", "head_dim"))
        queries = split(layer.query(inside[t][x]), num)
        heads = []
        for h in range(num):
            g = h // (num // shared)
            keys = [split(layer.key(row), shared)[g] for row in rows]
            values = [split(layer.value(row), shared)[g] for row in rows]
            weights = softmax([queries[h] @ key / math.sqrt(wide) for key in keys]) if len(rows) else []
            heads.append(mixed(weights, values) if len(rows) else torch.zeros(wide, dtype=torch.float64))
        return layer.output(torch.cat(heads))

    def temporal(inside, b, t, x):
        qkv = [split(block.temporal.qkv(inside[s][x]), 3 * HEADS) for s in range(T)]
        seen = [s for s in range(T) if (not causal or s <= t) and (window is None or t - s < window)]
        heads = []
        for h in range(HEADS):
            query, keys = qkv[t][h], {s: qkv[s][HEADS + h] for s in seen}
            if base is not None:
                query, keys = turned(query, t, base), {s: turned(keys[s], s, base) for s in seen}
            logits = [query @ keys[s] / math.sqrt(width) for s in seen]
            heads.append(mixed(softmax(logits) if softmax_frames else logits, [qkv[s][2 * HEADS + h] for s in seen]))
        return block.temporal.output(torch.cat(heads))

    branch(spatial, block.norm, count=6)
    branch(observed, block.observations_norm)
    branch(temporal, block.temporal_norm)
    branch(
        lambda inside, b, t, x: block.mlp.down(gelu(block.mlp.up(inside[t][x]), approximate="tanh")),
        block.norm,
        count=6,
        first=3,
    )
    return torch.stack([torch.stack([torch.stack(frame) for frame in sample]) for sample in grid])


VARIANTS = {
    "production": {},
    "softmax window": {"softmax": True, "window": 2},
    "all frames": {"causal": False, "rotary_base": None},
    "softmax, all frames, another base": {"softmax": True, "causal": False, "rotary_base": 7.0},
    "window": {"window": 3, "qk_norm": "layer", "qk_norm_affine": True},
    "learned scale": {"qk_norm_affine": True, "rotary_base": None},
    "plain queries": {"qk_norm": "none", "projection_bias": False},
}


@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_block_and_its_gradients_equal_the_plain_equations(options, masked):
    model, given = processor(**options).eval(), latents(masked=masked)
    wanted = reference(
        model,
        given,
        qk_norm=options.get("qk_norm", "rms"),
        softmax_frames=options.get("softmax", False),
        causal=options.get("causal", True),
        window=options.get("window"),
        base=options.get("rotary_base", 100.0),
    )
    output = model(given).tokens
    # Angles are float32 by contract; without them everything is float64.
    tolerance = 1e-5 if options.get("rotary_base", 100.0) else 1e-11
    torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)
    inputs = [given.tokens, given.context.tokens, given.condition, *model.parameters()]
    towards = torch.randn_like(output)
    for ours, theirs in zip(
        torch.autograd.grad((output * towards).sum(), inputs),
        torch.autograd.grad((wanted * towards).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def test_what_is_masked_is_never_read():
    model, given = processor().eval(), latents(masked=True)
    expected = model(given).tokens
    hidden = given.tokens.detach().masked_fill(~given.valid[..., None], torch.nan).requires_grad_()
    output = model(given.with_tokens(hidden)).tokens
    assert torch.equal(output, expected)
    output.sum().backward()
    assert hidden.grad.isfinite().all() and not hidden.grad[~given.valid].any()


@pytest.mark.parametrize("window", (None, 2))
@pytest.mark.parametrize("softmax", (False, True))
def test_frames_read_themselves_and_the_past_within_the_window(softmax, window):
    torch.manual_seed(0)
    layer = TemporalAttention(8, num_heads=2, num_frames=T, softmax=softmax, window=window)
    x = torch.randn(1, T, 1, 8)
    reads = torch.autograd.functional.jacobian(layer, x)[0, :, 0, :, 0, :, 0].abs().sum(dim=(1, 3)) > 0
    age = torch.arange(T)[:, None] - torch.arange(T)
    assert torch.equal(reads, (age >= 0) & (age < (window or T)))


def test_an_impossible_window_is_refused():
    for wrong in ({"window": 0}, {"window": 2, "causal": False}):
        with pytest.raises(ValueError, match=r"model\.processor\.window=\d must be at least 1 and needs"):
            processor(**wrong)
    with pytest.raises(ValueError, match=r"model\.processor\.qk_norm=batch is unknown; use one of rms, layer, none"):
        processor(qk_norm="batch")
    with pytest.raises(ValueError, match=r"model\.processor\.drop_path=1\.0 must be at least 0 and below 1"):
        processor(drop_path=1.0)
    with pytest.raises(ValueError, match=r"model\.processor\.checkpoint=some must be all, none or the number of last"):
        processor(checkpoint="some")


# Training


def test_blocks_begin_as_nothing():
    torch.manual_seed(0)
    described = LatentLayout(num_tokens=X, hidden_size=D, frames=T, observation_size=TOKEN, condition_size=DC)
    model, given = VideoDiT(None, described, depth=2, num_heads=HEADS, **OBSERVATION).double(), latents()
    assert torch.equal(model(given).tokens, given.tokens)


def test_drop_path_closes_gates_of_samples_at_its_rate_and_spares_the_first_blocks():
    model = processor(depth=4, drop_path=0.3, drop_path_from=1).train()
    drawn = [[] for _ in range(4)]
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, arguments, index=index: drawn[index].append(arguments[4]))
    given = latents()
    with torch.no_grad():
        for _ in range(150):
            model(given)
    keep = torch.stack([torch.stack(calls) for calls in drawn])  # (block, call, branch, sample)
    assert keep[0].eq(1).all()
    torch.testing.assert_close(keep[1:].unique(), torch.tensor([0.0, 1 / 0.7]))
    dropped = keep[1:].eq(0).double()
    rate = dropped.mean(dim=1)  # of each block, branch and sample: 150 draws each
    assert (rate - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 150)
    together = (dropped[..., 0] * dropped[..., 1]).mean()  # samples are drawn apart
    assert abs(together - 0.09) < 0.03
    calls = len(drawn[1])
    model.eval()(given)
    assert len(drawn[1]) == calls + 1 and drawn[1][-1] is None


def test_a_closed_gate_leaves_its_sample_as_it_was_and_an_open_one_is_scaled():
    block, given = processor().blocks[0], latents()
    rest = (given.condition, None, given.context)
    keep = torch.ones(4, B)
    keep[:, 0] = 0
    tokens = block(given.tokens, *rest, keep)
    assert torch.equal(tokens[0], given.tokens[0])
    torch.testing.assert_close(tokens[1], block(given.tokens, *rest, None)[1])
    keep[:3] = 0
    keep[3] = 2  # of the MLP alone
    step = block(given.tokens, *rest, keep) - given.tokens
    keep[3] = 1
    torch.testing.assert_close(step, 2 * (block(given.tokens, *rest, keep) - given.tokens))


@pytest.mark.parametrize("checkpoint, recomputed", (("none", 0), (1, 1), (2, 2), (9, 3), ("all", 3)))
def test_recomputed_activations_change_no_gradient(checkpoint, recomputed):
    def gradients(option):
        model, given, calls = processor(depth=3, drop_path=0.5, checkpoint=option).train(), latents(), []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(2)
        inputs = [given.tokens, given.context.tokens, given.condition, *model.parameters()]
        return torch.autograd.grad(model(given).tokens.square().sum(), inputs), len(calls)

    (plain, calls), (found, more) = gradients("none"), gradients(checkpoint)
    assert (calls, more) == (3, 3 + recomputed)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_cells_that_hold_observations_are_looked_for_once(monkeypatch):
    model, given = processor(depth=3, checkpoint="all").train(), latents()
    expected = model(given).tokens
    searches, of = [], Occupied.of
    monkeypatch.setattr(Occupied, "of", lambda offsets: searches.append(offsets) or of(offsets))
    found = model(replace(given, context=replace(given.context, occupied=None))).tokens
    found.sum().backward()
    assert len(searches) == 1 and torch.equal(found, expected)


@pytest.mark.parametrize("masked", (False, True))
def test_a_block_never_waits_for_the_device(masked):
    model, given = processor(drop_path=0.5).train(), latents(masked=masked)
    with NoDataDependence():
        model(given).tokens.sum().backward()
    with pytest.raises(AssertionError, match="waits for the device"), NoDataDependence():
        model(replace(given, context=replace(given.context, occupied=None)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_block_never_waits_for_a_cuda_device():
    model, given = processor(drop_path=0.5).train().cuda(), latents()
    context = given.context
    offsets = context.offsets.cuda()
    given = replace(
        given,
        tokens=given.tokens.cuda(),
        condition=given.condition.cuda(),
        context=ObservationContext(context.tokens.cuda(), offsets, Occupied.of(offsets)),
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(given).tokens.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
