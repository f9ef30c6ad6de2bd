"""Norms and residuals with modulation: PyTorch's path and Triton's, under its interpreter, against float64."""

import pytest
import torch
from torch.library import opcheck

from kernels.modulated_norm import WIDEST_OF_BOTH, gated, gated_norm, modulated_norm
from models.conditioning.adaptive_norm import AdaptiveNorm
from tests.interpreter import interpreted, needs_triton, run_interpreted

SHAPES = [(2, 3, 5, 24), (3, 7, 16), (1, 2, 70, 8), (2, 4, 100), (2, 0, 8), (0, 3, 8), (2, 9, 3000), (1, 2, 4100)]


def _draw(shape, *, seed=0, dtype=torch.float64) -> list[torch.Tensor]:
    """Tokens, three parts of a modulation whose rows lie apart, and a branch."""
    random = torch.Generator().manual_seed(seed)
    parts = torch.randn(shape[0], 3 * shape[-1], generator=random, dtype=torch.float64)
    x, branch = (torch.randn(shape, generator=random, dtype=torch.float64) * 3 + 1 for _ in range(2))
    return [part.to(dtype) for part in (x, *parts.chunk(3, dim=1), branch)]


def _outcome(function, *inputs, path) -> list[torch.Tensor]:
    """Results and gradients of inputs, whose strides are kept."""
    leaves = [part.detach().requires_grad_() for part in inputs]
    outputs = function(*leaves, path=path)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    towards = [
        (torch.linspace(-1, 1, part.numel(), dtype=torch.float64) + index).view_as(part).cos().to(part.dtype)
        for index, part in enumerate(outputs)
    ]
    return [*(part.detach() for part in outputs), *torch.autograd.grad(outputs, leaves, towards)]


def _cases(dtype, shape):
    x, shift, scale, gate, branch = _draw(shape, dtype=dtype)
    return [
        (modulated_norm, (x, shift, scale)),
        (gated, (x, gate, branch)),
        (gated_norm, (x, gate, branch, shift, scale)),
    ]


def _compare(dtype, shape, path, tolerance):
    for function, inputs in _cases(dtype, shape):
        exact = _outcome(function, *(part.double() for part in inputs), path="reference")
        for expected, found in zip(exact, _outcome(function, *inputs, path=path), strict=True):
            assert found.dtype == dtype and found.shape == expected.shape
            size = expected.abs().max().item() if expected.numel() else 1.0
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_vectorised_path_equals_the_formula(shape):
    _compare(torch.float64, shape, "vectorised", 1e-12)
    _compare(torch.bfloat16, shape, "vectorised", 2e-2)


@pytest.mark.parametrize("rows", (1, 4, 25))
def test_pieces_of_rows_and_of_samples_add_up(rows, monkeypatch):
    monkeypatch.setattr("kernels.pieces.CACHE", rows * 4 * 24 * 8)
    monkeypatch.setattr("kernels.modulated_norm.vectorised.FEW", 0)
    _compare(torch.float64, (3, 2, 5, 24), "vectorised", 1e-12)
    _compare(torch.bfloat16, (3, 2, 5, 24), "vectorised", 2e-2)


def test_the_formula_is_that_of_a_loop_over_rows():
    x, shift, scale, gate, branch = _draw((2, 3, 5))
    normed, opened = (
        modulated_norm(x, shift, scale, path="reference"),
        gated(x, gate, branch, path="reference"),
    )
    for b in range(2):
        for t in range(3):
            row = x[b, t].tolist()
            mean = sum(row) / 5
            spread = (sum((number - mean) ** 2 for number in row) / 5 + 1e-6) ** 0.5
            for d, number in enumerate(row):
                assert normed[b, t, d].item() == pytest.approx(
                    (number - mean) / spread * (1 + scale[b, d]) + shift[b, d]
                )
                assert opened[b, t, d].item() == pytest.approx(number + gate[b, d] * branch[b, t, d])


def test_autocast_yields_what_the_next_product_reads():
    x, shift, scale, _, _ = _draw((2, 3, 8), dtype=torch.float32)
    expected = modulated_norm(x, shift, scale)
    with torch.autocast("cpu", torch.bfloat16):
        found = modulated_norm(x, shift, scale)
    assert (expected.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=2e-2)


def test_paths_that_cannot_be_are_refused():
    x, shift, scale, _, _ = _draw((2, 3, 8))
    with pytest.raises(ValueError, match=r"unknown path 'fast' of modulated_norm; allowed: auto, reference,"):
        modulated_norm(x, shift, scale, path="fast")
    with pytest.raises(ValueError, match=r"path triton of modulated_norm does not serve .*float64 cpu"):
        modulated_norm(x, shift, scale, path="triton")


@needs_triton
def test_under_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_float64(shape):
    _compare(torch.float32, shape, "triton", 2e-5)


@interpreted
def test_triton_reads_layouts_as_they_are():
    x, _, scale, gate, branch = _draw((2, 6, 8), dtype=torch.float32)
    x, branch = x.transpose(0, 1).contiguous().transpose(0, 1), branch[..., ::2].repeat_interleave(2, dim=-1)
    shift = torch.randn(8).expand(2, -1)  # a constant, for all samples
    cases = [(modulated_norm, (x, shift, scale)), (gated, (x, gate, branch))]
    for function, inputs in (*cases, (gated_norm, (x, gate, branch, shift, scale))):
        wanted, found = (_outcome(function, *inputs, path=path) for path in ("vectorised", "triton"))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@interpreted
def test_the_stream_that_is_not_read_again_needs_no_gradient():
    inputs = _draw((2, 6, 8), dtype=torch.float32)
    x, shift, scale, gate, branch = (part.detach().requires_grad_() for part in inputs)
    for index in range(2):
        found, wanted = (
            torch.autograd.grad(
                gated_norm(x, gate, branch, shift, scale, path=path)[index].sin().sum(), (x, gate, branch)
            )
            for path in ("triton", "vectorised")
        )
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


@interpreted
def test_constants_get_the_gradients_of_all_samples():
    x = torch.randn(3, 4, 8)
    gradients = []
    for path in ("vectorised", "triton"):
        norm = AdaptiveNorm(0, 8, parts=2)
        torch.nn.init.normal_(norm.constant, generator=torch.Generator().manual_seed(1))
        modulated_norm(x, *norm(None, 3), path=path).square().sum().backward()
        gradients.append(norm.constant.grad)
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)


@interpreted
def test_every_number_is_written_and_no_other_is_read(monkeypatch):
    """Whatever `empty` returns is NaN here; programs take several tiles each."""
    from kernels.modulated_norm import launches

    monkeypatch.setattr(launches, "BACKWARD_PROGRAMS", 4)
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: plain(*a, **k).fill_(torch.nan))
    plain_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: plain_new(*a, **k).fill_(torch.nan))
    for shape in SHAPES:
        _compare(torch.float32, shape, "triton", 2e-5)


@interpreted
def test_operators_are_registered_completely():
    x, shift, scale, gate, branch = _draw((2, 3, 8), dtype=torch.float32)
    x, shift, scale, gate, branch = (part.detach().requires_grad_() for part in (x, shift, scale, gate, branch))
    opcheck(torch.ops.hydrasphere.modulated_norm.default, (x, shift, scale, torch.float32))
    opcheck(torch.ops.hydrasphere.gated.default, (x, gate, branch))
    opcheck(torch.ops.hydrasphere.gated_norm.default, (x, gate, branch, shift, scale, torch.float32))
    given = [part.detach() for part in (branch, x, scale)]
    opcheck(torch.ops.hydrasphere.modulated_norm_backward.default, given)
    opcheck(torch.ops.hydrasphere.gated_backward.default, (given[0], gate.detach(), given[1]))
    opcheck(torch.ops.hydrasphere.gated_norm_backward.default, (given[0], *given, gate.detach(), given[0]))


@interpreted
def test_compiled_whole():
    def branch(x, shift, scale, gate):
        stream, normed = gated_norm(x, gate, modulated_norm(x, shift, scale).sin(), shift, scale)
        return gated(stream, gate, normed)

    x, shift, scale, gate, _ = _draw((2, 3, 8), dtype=torch.float32)
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    outcomes = [_outcome(lambda *a, path, f=f: f(*a), x, shift, scale, gate, path=None) for f in (branch, compiled)]
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("width", (64, 1024, 1536, 8192))
@pytest.mark.parametrize("stream, branch", (("*bf16", "*bf16"), ("*fp32", "*bf16"), ("*fp32", "*fp32")))
def test_no_register_spills_on_hopper(width, stream, branch):
    from kernels.modulated_norm import device_code, launches
    from tests.kernel_resources import resources

    numbers = dict.fromkeys(("rows", "programs", "steps", "shift_stride", "scale_stride", "gate_stride"), "i32")
    tensors = dict.fromkeys(("shift", "scale", "gate", "branch", "towards_branch", "gradient"), branch)
    tensors |= dict.fromkeys(("x", "y", "stream", "towards_x", "towards_stream"), stream)
    types = {**numbers, **tensors, "sums": "*fp32", "eps": "fp32"}
    for name, of_kernel in launches.TUNING.items():
        config = of_kernel.default((9, 0))
        served = min(width, WIDEST_OF_BOTH) if name.startswith("gated_norm") else width
        constants = {"D": served, **launches.tile(served, config)}
        kernel = getattr(device_code, name)
        assert resources(kernel, types, constants, num_warps=config["num_warps"])["stack"] == 0, name


@needs_triton
@pytest.mark.slow
def test_offsets_of_rows_have_64_bits():
    from kernels.modulated_norm import device_code, launches
    from tests.kernel_resources import compiled, offset_types

    types = dict.fromkeys(("rows", "programs", "steps", "shift_stride", "scale_stride", "gate_stride"), "i32")
    tokens = ("x", "y", "branch", "gradient", "towards_x", "towards_branch", "stream", "towards_stream")
    types |= dict.fromkeys(tokens, "*bf16")
    types |= {**dict.fromkeys(("shift", "scale", "gate", "sums"), "*fp32"), "eps": "fp32"}
    accesses = {"norm_forward": 2, "norm_backward": 3, "gated_forward": 3, "gated_backward": 3}
    accesses |= {"gated_norm_forward": 4, "gated_norm_backward": 6}
    for name, count in accesses.items():
        result = compiled(
            getattr(device_code, name), types, {"D": 64, **launches.tile(64, {"TILE": 4096})}, num_warps=8
        )
        assert offset_types(result, "64x64", "bf16") == ["i64"] * count
