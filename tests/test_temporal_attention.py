"""Attention among frames: PyTorch's path and Triton's, under its interpreter, against loops over frames in float64."""

import itertools

import pytest
import torch
from torch.library import opcheck

from kernels.temporal_attention import temporal_attention
from models.attention.self_attention import TemporalAttention
from models.latents import LatentLayout
from models.positions.rotary import FrameRotary
from models.processors.video_dit import VideoDiT
from tests.interpreter import interpreted, needs_triton, run_interpreted

# (B, T, X, h, d): one frame, several places a tile and some left over, two tiles of rows, odd and wide heads.
SHAPES = [(2, 1, 3, 1, 8), (1, 2, 11, 2, 6), (2, 8, 3, 2, 40), (1, 12, 2, 2, 4), (1, 20, 2, 1, 8), (1, 3, 2, 1, 70)]
OPTIONS = [
    {"softmax": softmax, "causal": causal, "window": window}
    for softmax, (causal, window) in itertools.product((False, True), ((True, None), (True, 2), (False, None)))
]


def _draw(shape, *, dtype=torch.float64) -> torch.Tensor:
    batch, frames, places, heads, width = shape
    random = torch.Generator().manual_seed(frames)
    return torch.randn(batch, frames, places, 3, heads, width, generator=random, dtype=torch.float64).to(dtype)


def _rotation(shape) -> tuple[torch.Tensor, torch.Tensor]:
    tables = FrameRotary(shape[1] + 2, shape[-1], 7.0)
    return tables.cos, tables.sin


def _outcome(qkv, rotation, **options) -> list[torch.Tensor]:
    qkv = qkv.detach().requires_grad_()
    output = temporal_attention(qkv, rotation, **options)
    towards = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).cos()
    return [output.detach(), *torch.autograd.grad(output, qkv, towards.to(output.dtype))]


def _compare(shape, options, path, dtype, tolerance, *, rotates=True):
    qkv, rotation = _draw(shape, dtype=dtype), _rotation(shape) if rotates else None
    exact = _outcome(qkv.double(), rotation, path="reference", **options)
    for expected, found in zip(exact, _outcome(qkv, rotation, path=path, **options), strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rotates", (True, False))
def test_the_vectorised_path_equals_loops_over_frames(options, rotates):
    for shape in SHAPES:
        # Rotated numbers are float32 by contract.
        _compare(shape, options, "vectorised", torch.float64, 3e-6 if rotates else 1e-12, rotates=rotates)
        _compare(shape, options, "vectorised", torch.bfloat16, 3e-2, rotates=rotates)


def test_no_places_and_no_samples():
    for shape in ((1, 2, 0, 1, 4), (0, 2, 3, 1, 4)):
        found = temporal_attention(_draw(shape), None, softmax=False, causal=True, window=None)
        assert found.shape == (*shape[:3], *shape[3:])


def test_sequences_too_long_for_registers_are_refused_by_triton_only():
    qkv = _draw((1, 33, 2, 1, 4), dtype=torch.float32)
    assert temporal_attention(qkv, None, softmax=False, causal=True, window=None).shape == (1, 33, 2, 1, 4)
    with pytest.raises(ValueError, match="path triton of temporal_attention does not serve this call"):
        temporal_attention(qkv, None, softmax=False, causal=True, window=None, path="triton")


@needs_triton
def test_under_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("options", OPTIONS)
def test_triton_equals_float64(options):
    for shape in SHAPES:
        _compare(shape, options, "triton", torch.float32, 5e-6)
    _compare(SHAPES[2], options, "triton", torch.float32, 5e-6, rotates=False)
    _compare((1, 4, 3, 2, 5), options, "triton", torch.float32, 5e-6, rotates=False)


@interpreted
def test_triton_takes_nothing_and_any_layout():
    options = {"softmax": False, "causal": True, "window": None, "path": "triton"}
    for shape in ((1, 2, 0, 1, 4), (0, 2, 3, 1, 4)):
        assert temporal_attention(_draw(shape, dtype=torch.float32), None, **options).shape == shape
    qkv = _draw(SHAPES[2], dtype=torch.float32)
    apart = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    for tables in (None, _rotation(SHAPES[2])):
        spread = None if tables is None else [table.T.contiguous().T for table in tables]
        for ours, theirs in zip(_outcome(apart, spread, **options), _outcome(qkv, tables, **options), strict=True):
            assert torch.equal(ours, theirs)


@interpreted
def test_every_number_is_written_and_no_other_is_read(monkeypatch):
    """Whatever `empty` returns is NaN here, and a place leaves its neighbours in the tile alone."""
    plain, plain_new = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: plain_new(*a, **k).fill_(torch.nan))
    _compare(SHAPES[1], OPTIONS[0], "triton", torch.float32, 5e-6)
    qkv = _draw(SHAPES[1], dtype=torch.float32)
    whole = _outcome(qkv, None, path="triton", **OPTIONS[3])
    qkv[:, :, 1::2] = 0.0
    for ours, theirs in zip(_outcome(qkv, None, path="triton", **OPTIONS[3]), whole, strict=True):
        assert torch.equal(ours[:, :, ::2], theirs[:, :, ::2])


@interpreted
def test_operators_are_registered_completely():
    qkv, rotation = _draw(SHAPES[1], dtype=torch.float32).requires_grad_(), _rotation(SHAPES[1])
    for tables in (rotation, (None, None)):
        arguments = (qkv, *tables, True, True, 2)
        opcheck(torch.ops.hydrasphere.temporal_attention.default, arguments)
        output = torch.ops.hydrasphere.temporal_attention(*arguments).detach()
        given = (output, qkv.detach(), *arguments[1:])
        opcheck(torch.ops.hydrasphere.temporal_attention_backward.default, given)


@interpreted
def test_the_layer_computes_the_same_with_triton_eager_and_compiled():
    x = torch.randn(1, 4, 3, 16, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for path, compiles in (("vectorised", False), ("triton", False), ("triton", True)):
        torch.manual_seed(0)
        layer = TemporalAttention(16, num_heads=2, num_frames=4, path=path)
        output = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer)(x)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    for found in outcomes[1:]:
        for ours, theirs in zip(found, outcomes[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@interpreted
def test_a_block_of_the_video_transformer_is_one_graph_of_our_operators():
    described = LatentLayout(num_tokens=3, hidden_size=16, frames=4, condition_size=0)
    torch.manual_seed(0)
    model = VideoDiT(None, described, depth=1, num_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block, x = model.blocks[0], torch.randn(2, 4, 3, 16)
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if "hydrasphere" in str(node.target))
        return graph.forward

    outputs = [
        function(x, None, None, None, None)
        for function in (block, torch.compile(block, fullgraph=True, backend=backend))
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    kinds = ("modulated_norm", "gated_norm", "gated", "temporal_attention")
    assert [sum(kind == name.split(".")[1] for name in called) for kind in kinds] == [1, 2, 1, 1]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("frames, width", ((8, 96), (8, 128), (16, 64), (32, 128)))
@pytest.mark.parametrize("dtype, precision", (("*bf16", "ieee"), ("*fp32", "ieee"), ("*fp32", "tf32")))
def test_no_register_spills_on_hopper(frames, width, dtype, precision):
    from kernels.temporal_attention import device_code, launches
    from tests.kernel_resources import resources

    tensors = dict.fromkeys(("qkv", "output", "gradient", "towards"), dtype)
    types = {**tensors, "cos": "*fp32", "sin": "*fp32", "places": "i32", "heads": "i32", "scale": "fp32"}
    tile = launches.tile(frames, width)
    bits = 16 if dtype == "*bf16" else 32
    for softmax in (False, True):
        constants = {**tile, "SOFTMAX": softmax, "CAUSAL": True, "WINDOW": frames, "PRECISION": precision}
        for name in ("forward", "backward"):
            of_kernel = launches.TUNING[name, tile["R"], bits]
            config = of_kernel.default((9, 0))
            launch = {"num_warps": config["num_warps"], "num_stages": launches.NUM_STAGES}
            constants["CHUNK"] = config["CHUNK"]
            assert resources(getattr(device_code, name), types, constants, **launch)["stack"] == 0


@needs_triton
@pytest.mark.slow
def test_offsets_of_rows_have_64_bits():
    from kernels.temporal_attention import device_code, launches
    from tests.kernel_resources import compiled, offset_types

    types = dict.fromkeys(("qkv", "output", "gradient", "towards"), "*bf16")
    types |= {"cos": "*fp32", "sin": "*fp32", "places": "i32", "heads": "i32", "scale": "fp32"}
    options = {"SOFTMAX": False, "CAUSAL": True, "WINDOW": 8, "PRECISION": "ieee"}
    for kernel, accesses in ((device_code.forward, 4), (device_code.backward, 10)):
        result = compiled(kernel, types, {**launches.tile(8, 96), **options, "CHUNK": 32}, num_warps=1)
        assert offset_types(result, "16x1", "bf16") == ["i64"] * accesses
