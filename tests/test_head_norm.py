"""The norm of queries and keys: PyTorch's path and Triton's, under its interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from kernels.head_norm import head_norm
from tests.interpreter import interpreted, needs_triton, run_interpreted

# (..., s, h, d): fused projections, queries alone, queries and keys; odd widths, nothing at all, more than one tile.
SHAPES = [
    (2, 3, 5, 3, 2, 8),
    (2, 7, 1, 3, 24),
    (9, 2, 1, 33),
    (3, 4, 1),
    (2, 40, 3, 4, 100),
    (2, 0, 3, 2, 8),
    (0, 3, 3, 2, 8),
    (1, 2, 3, 1, 700),
]
PATHS = ["vectorised", pytest.param("triton", marks=interpreted)]


def _draw(shape, *, dtype=torch.float64, weighted: bool) -> list[torch.Tensor]:
    """A projection that lies within a larger one, whose other numbers are NaN, and a learned scale."""
    random = torch.Generator().manual_seed(sum(shape))
    whole = torch.full((*shape[:-3], shape[-3] + 2, *shape[-2:]), torch.nan, dtype=dtype)
    packed = whole[..., 1:-1, :, :]
    packed.copy_(torch.randn(shape, generator=random, dtype=torch.float64) * 3 + 1)
    scale = torch.randn(min(shape[-3], 2), shape[-1], generator=random, dtype=torch.float64).to(dtype)
    return [packed, scale] if weighted else [packed]


def _outcome(inputs, path) -> list[torch.Tensor]:
    """Parts and gradients of inputs, whose strides are kept."""
    leaves = [part.detach().requires_grad_() for part in inputs]
    outputs = head_norm(*leaves, path=path)
    towards = [
        (torch.linspace(-1, 1, part.numel(), dtype=torch.float64) + index).view(part.shape).cos().to(part.dtype)
        for index, part in enumerate(outputs)
    ]
    return [*(part.detach() for part in outputs), *torch.autograd.grad(outputs, leaves, towards)]


def _compare(shape, dtype, path, tolerance):
    for weighted in (False, True):
        inputs = _draw(shape, dtype=dtype, weighted=weighted)
        exact = _outcome([part.double() for part in inputs], "reference")
        for expected, found in zip(exact, _outcome(inputs, path), strict=True):
            assert found.dtype == dtype and found.shape == expected.shape
            size = expected.abs().max().item() if expected.numel() else 1.0
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_vectorised_path_equals_the_formula(shape):
    _compare(shape, torch.float64, "vectorised", 1e-12)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        _compare(shape, dtype, "vectorised", tolerance)


def test_the_formula_is_that_of_a_loop_over_heads():
    packed, weight = _draw((2, 3, 2, 5), weighted=True)
    query, key, value = head_norm(packed, weight, path="reference")
    assert torch.equal(value, packed[:, 2])
    for index, part in enumerate((query, key)):
        for token in range(2):
            for head in range(2):
                row = packed[token, index, head].tolist()
                size = (sum(number**2 for number in row) / 5 + 1e-6) ** 0.5
                for d, number in enumerate(row):
                    assert part[token, head, d].item() == pytest.approx(number / size * weight[index, d].item())


@pytest.mark.parametrize("path", ["reference", *PATHS])
@pytest.mark.parametrize("weighted", [False, True])
def test_heads_keep_their_type_under_autocast(path, weighted, monkeypatch):
    """Also where PyTorch's norm is on the list of functions that autocast has computed in float32, as on CUDA."""
    plain = F.rms_norm

    def wide(x, shape, scale, eps):
        return plain(x.float(), shape, None if scale is None else scale.float(), eps)

    monkeypatch.setattr(F, "rms_norm", wide)
    for dtype in (torch.bfloat16, torch.float32):
        if path == "triton" and dtype == torch.bfloat16:  # the interpreter has none
            continue
        inputs = _draw((2, 5, 3, 2, 8), dtype=dtype, weighted=weighted)
        with torch.autocast("cpu", torch.bfloat16):
            found = _outcome(inputs, path)
        assert [part.dtype for part in found] == [dtype] * len(found)


def test_values_are_not_copied():
    (packed,) = _draw((2, 3, 3, 2, 8), weighted=False)
    for path in ("reference", "vectorised"):
        assert head_norm(packed, path=path)[2].data_ptr() == packed[..., 2, :, :].data_ptr()


@pytest.mark.parametrize("path", PATHS)
def test_parts_that_are_not_read_and_gradients_that_lie_anyhow(path):
    """Gradients in the layouts of attention kernels: heads before tokens, expanded, some none."""
    packed, weight = _draw((2, 6, 3, 2, 8), dtype=torch.float32, weighted=True)
    losses = [
        lambda q, k, v: (q.transpose(1, 2) @ k.transpose(1, 2).mT @ v.transpose(1, 2)).square().sum(),
        lambda q, k, v: q.sum() + (k * v).sum(),
        lambda q, k, v: k.cos().sum(),
        lambda q, k, v: v.sum(),
    ]
    for loss in losses:
        found, wanted = (
            torch.autograd.grad(loss(*head_norm(*leaves, path=which)), leaves, materialize_grads=True)
            for which in (path, "reference")
            for leaves in [[part.detach().requires_grad_() for part in (packed, weight)]]
        )
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(theirs.abs().max().item(), 1.0))


@pytest.mark.parametrize("path", PATHS)
def test_gradients_of_gradients(path):
    found = []
    for which in ("reference", path):
        leaves = [part.detach().float().requires_grad_() for part in _draw((2, 3, 2, 8), weighted=True)]
        query, key, value = head_norm(*leaves, path=which)
        first = torch.autograd.grad((query * key * value).sum(), leaves, create_graph=True)
        if which == "triton":
            with pytest.raises(RuntimeError, match="no autograd formula was registered"):
                torch.autograd.grad(first[0].square().sum(), leaves)
            return
        found.append(torch.autograd.grad(sum(part.square().sum() for part in first), leaves))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("path", PATHS)
def test_compiled_whole(path):
    def mixed(packed, weight):
        query, key, value = head_norm(packed * 2, weight, path=path)
        return query * key + value

    torch._dynamo.reset()
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    outcomes = []
    for function in (mixed, compiled):
        leaves = [part.detach().requires_grad_() for part in _draw((2, 5, 3, 2, 8), dtype=torch.float32, weighted=True)]
        output = function(*leaves)
        outcomes.append([output.detach(), *torch.autograd.grad(output.sin().sum(), leaves)])
    torch.testing.assert_close(*outcomes)


def test_under_the_compiler_auto_is_the_formula(monkeypatch):
    """An operator would be a border to what the compiler makes one kernel of."""
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(head_norm, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr("kernels.head_norm.chosen_path", lambda path, *_, **__: "triton" if path == "auto" else path)
    (packed,) = _draw((2, 5, 3, 2, 8), weighted=False)
    torch.testing.assert_close(compiled(packed), head_norm(packed, path="reference"))
    assert "rsqrt" in graphs[0].code and "hydrasphere" not in graphs[0].code


def test_paths_that_cannot_be_are_refused():
    (packed,) = _draw((2, 3, 2, 8), weighted=False)
    with pytest.raises(ValueError, match=r"unknown path 'fast' of head_norm; allowed: auto, reference,"):
        head_norm(packed, path="fast")
    with pytest.raises(ValueError, match=r"path triton of head_norm does not serve .*float64 cpu"):
        head_norm(packed, path="triton")


@needs_triton
def test_under_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_equals_float64(shape):
    _compare(shape, torch.float32, "triton", 2e-5)


@interpreted
def test_every_number_is_written_and_no_other_is_read(monkeypatch):
    """Whatever `empty` returns is NaN here; programs take several tiles each."""
    from kernels.head_norm import launches

    monkeypatch.setattr(launches, "BACKWARD_PROGRAMS", 1)
    monkeypatch.setattr(launches, "tile", lambda width, _: {"R": 4, "BLOCK": max(16, 1 << (width - 1).bit_length())})
    plain, plain_new = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: plain_new(*a, **k).fill_(torch.nan))
    for shape in SHAPES:
        _compare(shape, torch.float32, "triton", 2e-5)


@interpreted
def test_operators_are_registered_completely():
    packed, weight = _draw((2, 3, 3, 2, 8), dtype=torch.float32, weighted=True)
    gradients = [torch.randn(2, 3, 2, 8) for _ in range(3)]
    for scale in (weight, None):
        opcheck(torch.ops.hydrasphere.head_norm.default, (packed, scale))
        opcheck(torch.ops.hydrasphere.head_norm_backward.default, (gradients, packed, scale))


_NUMBERS = ("rows", "steps", "inner", *(f"{of}_{name}" for of in ("gradient",) for name in ("outer", "inner", "head")))
_NUMBERS += tuple(f"{name}_stride" for name in ("outer", "inner", "head", "part"))
_TENSORS = ("packed", "normed", "towards", "towards_query", "towards_key", "towards_value")


def _types(tokens: str) -> dict[str, str]:
    types = dict.fromkeys(_NUMBERS, "i32") | dict.fromkeys(_TENSORS, tokens)
    return types | {"weight": "*fp32", "sums": "*fp32", "eps": "fp32"}


def _constants(width: int, config: dict[str, int]) -> dict[str, int]:
    from kernels.head_norm import launches

    return {"S": 3, "NORMED": 2, "H": 16, "D": width, "WEIGHTED": True, **launches.tile(width, config)}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("width", (32, 96, 128, 1024))
@pytest.mark.parametrize("tokens", ("*bf16", "*fp32"))
def test_no_register_spills_on_hopper(width, tokens):
    from kernels.head_norm import device_code, launches
    from tests.kernel_resources import resources

    for name, of_kernel in launches.TUNING.items():
        config = of_kernel.default((9, 0))
        kernel = getattr(device_code, f"norm_{name}")
        constants = {key: value for key, value in _constants(width, config).items() if key in kernel.arg_names}
        used = resources(kernel, _types(tokens), constants, num_warps=config["num_warps"])
        assert used["stack"] == 0, name


@needs_triton
@pytest.mark.slow
def test_offsets_of_heads_have_64_bits():
    from kernels.head_norm import device_code
    from tests.kernel_resources import compiled, offset_types

    for name, count in {"norm_forward": 2, "norm_backward": 3}.items():
        kernel = getattr(device_code, name)
        constants = {k: v for k, v in _constants(64, {"TILE": 4096}).items() if k in kernel.arg_names}
        result = compiled(kernel, _types("*bf16"), constants, num_warps=8)
        assert offset_types(result, "64x64", "bf16") == ["i64"] * count
