"""The Triton kernels of pixel attention under the interpreter (float32), against the float64 loop over cells."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import segments
from kernels.pixel_attention import launches, pixel_attention, plan
from kernels.segments import ITEM, Occupied, WorkList
from kernels.sort_and_pack import sort_and_pack
from models.attention.pixel import PixelCrossAttention
from models.latents import ObservationContext
from tests.interpreter import interpreted, needs_triton, run_interpreted

NAMES = ("output", "query", "tokens", "key_weight", "value_weight", "value_bias")
CROWDED = 96  # rows of an item in these tests, so that few tokens make pieces
COUNTS = [3, 0, 1, 31, 32, 33, CROWDED, CROWDED + 1, 0, 5 * CROWDED + 7, 2, 0]


@needs_triton
def test_these_under_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture
def crowded(monkeypatch):
    monkeypatch.setattr(segments, "ITEM", CROWDED)


@pytest.fixture
def poisoned():
    """Memory that nobody wrote to holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _offsets(counts) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64).cumsum(0)])


def _operands(counts, heads, kv_heads, *, width=8, token=16, bias=True, dtype=torch.float32):
    """Random numbers of float32, so that the float64 reference starts from the same."""
    random = torch.Generator().manual_seed(heads * 100 + width)

    def draw(*shape):
        return torch.randn(shape, generator=random).to(dtype).requires_grad_()

    kv = kv_heads * width
    tensors = [draw(len(counts), heads, width), draw(sum(counts), token), draw(kv, token), draw(kv, token)]
    return [*tensors, draw(kv) if bias else None]


def _outcome(operands, offsets, **options):
    query, tokens, *weights = operands
    output = pixel_attention(query, tokens, offsets, *weights, scale=0.4, **options)
    towards = torch.linspace(-3, 3, output.numel(), dtype=torch.float64, device=output.device)
    towards = towards.view_as(output).cos().to(output.dtype)
    given = [operand for operand in operands if operand is not None]
    return [output.detach(), *torch.autograd.grad((output * towards).sum(), given)]


def _compare(operands, offsets, tolerance=1e-5, **options):
    exact = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    expected = _outcome(exact, offsets, path="reference")
    found = _outcome(operands, offsets, path="triton", **options)
    for name, one, other in zip(NAMES, expected, found, strict=False):
        assert other.dtype == operands[0].dtype and other.shape == one.shape, name
        # At least 1: of cells of one token the gradient of the query is 0, the difference of equal numbers.
        size = max(one.abs().max().item() if one.numel() else 0.0, 1.0)
        assert ((other - one).abs() <= tolerance * size).all(), name  # NaN is no number
    return found


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "token", "bias"),
    [(64, 2, 32, 32, True), (8, 1, 6, 5, True), (12, 2, 16, 24, False), (20, 4, 5, 33, True)],
)
def test_results_and_gradients_are_those_of_float64(crowded, poisoned, heads, kv_heads, width, token, bias):
    operands, offsets = _operands(COUNTS, heads, kv_heads, width=width, token=token, bias=bias), _offsets(COUNTS)
    found = _compare(operands, offsets)
    for cell, count in enumerate(COUNTS):
        if count == 0:
            assert (found[0][cell] == 0).all() and (found[1][cell] == 0).all()


@interpreted
@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [0, 1700, 0], [1], [1] * 40])
def test_extreme_shares_of_tokens(crowded, poisoned, counts):
    _compare(_operands(counts, 4, 2), _offsets(counts), tolerance=1e-4)


@interpreted
@pytest.mark.parametrize("counts", [[3, 0, CROWDED + 1], [0], []])
def test_tokens_of_no_cell_come_last_and_have_no_gradient(crowded, poisoned, counts):
    """As `sort_and_pack` leaves those outside the grid."""
    *operands, offsets = *_operands(counts, 4, 2), _offsets(counts)
    expected = _outcome(operands, offsets, path="triton")
    behind = torch.full((70, 16), math.nan)
    operands[1] = torch.cat([operands[1].detach(), behind]).requires_grad_()
    found = _outcome(operands, offsets, path="triton")
    expected[2] = torch.cat([expected[2], torch.zeros_like(behind)])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@interpreted
def test_no_cells_have_no_result_and_zero_gradients(poisoned):
    output, *gradients = _outcome(_operands([], 4, 2), _offsets([]), path="triton")
    assert output.shape == (0, 32) and [len(gradient) for gradient in gradients] == [0, 0, 16, 16, 16]
    assert all((gradient == 0).all() for gradient in gradients)


@interpreted
def test_grouped_cells_give_the_same_bits_as_single_ones(crowded, monkeypatch):
    operands, offsets = _operands(COUNTS, 8, 2), _offsets(COUNTS)
    outcomes = []
    for programs in (1, 3, 1000):  # all items in one program; some in each; every item alone
        monkeypatch.setattr(launches, "INTERPRETED_PROGRAMS", programs)
        outcomes.append(_outcome(operands, offsets, path="triton"))
    for other in outcomes[1:]:
        for name, one, two in zip(NAMES[:3], outcomes[0], other, strict=False):
            assert torch.equal(one, two), name
        torch.testing.assert_close(outcomes[0], other)  # sums over cells, in another order
    # A cell knows nothing of the others.
    first, last = offsets[5:7].tolist()
    alone = [operands[0][5:6], operands[1][first:last], *operands[2:]]
    output = pixel_attention(alone[0], alone[1], torch.tensor([0, last - first]), *alone[2:], scale=0.4, path="triton")
    assert torch.equal(output[0], outcomes[0][0][5])


@interpreted
def test_results_repeat_bit_by_bit(crowded):
    operands, offsets = _operands(COUNTS, 8, 2), _offsets(COUNTS)
    for one, two in zip(*(_outcome(operands, offsets, path="triton") for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@interpreted
def test_strides_do_not_matter():
    counts = [4, 0, 9]
    operands = _operands(counts, 4, 2)
    strided = [x.detach().T.contiguous().T if x.ndim == 2 else x.detach() for x in operands]
    strided[0] = operands[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
    strided[4] = operands[4].detach().repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in strided)
    expected = _outcome(operands, _offsets(counts), path="triton")
    found = _outcome([x.requires_grad_() for x in strided], _offsets(counts), path="triton")
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))


@interpreted
def test_large_scores_stay_finite_and_a_broken_token_stays_in_its_cell(crowded):
    counts = [12, 5, 0, 3 * CROWDED]
    operands, offsets = _operands(counts, 4, 2), _offsets(counts)
    with torch.no_grad():
        operands[0] *= 100
    exact = [x.detach().double() for x in operands]
    expected = pixel_attention(exact[0], exact[1], offsets, *exact[2:], scale=0.4, path="reference")
    found = _outcome(operands, offsets, path="triton")
    assert all(part.isfinite().all() for part in found)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        operands[1][13] = math.nan
    output = pixel_attention(operands[0], operands[1], offsets, *operands[2:], scale=0.4, path="triton")
    assert output.isnan().any(dim=1).tolist() == [False, True, False, False]


@interpreted
def test_half_precision_products_and_tokens_of_another_type():
    counts = [4, 0, 40]
    operands, offsets = _operands(counts, 4, 2), _offsets(counts)
    _compare(operands, offsets, tolerance=5e-3, precision="fp16")
    halves = [x.detach().half().requires_grad_() for x in operands]
    halves[1] = operands[1]
    expected, found = (_outcome(given, offsets, path="triton") for given in (operands, halves))
    assert [x.dtype for x in found] == [torch.float16, torch.float16, torch.float32, *[torch.float16] * 3]
    for one, two in zip(expected, found, strict=True):
        assert (one - two).abs().max() < 1e-2 * one.abs().max()


@interpreted
def test_operators_describe_themselves_truly():
    offsets = _offsets([2, 0, 11])
    work = WorkList.of(offsets, 13)
    operands = _operands([2, 0, 11], 4, 2)
    arguments = (*operands, work.items, work.count, 0.5, "fp32")
    torch.library.opcheck(torch.ops.hydrasphere.pixel_attention_triton.default, arguments)
    torch.library.opcheck(torch.ops.hydrasphere.work_list.default, (offsets, 13))
    output, logsum = torch.ops.hydrasphere.pixel_attention_triton(*arguments)
    backward = (torch.ones_like(output), output.detach(), logsum.detach(), *(x.detach() for x in operands))
    torch.library.opcheck(
        torch.ops.hydrasphere.pixel_attention_triton_backward.default, (*backward, work.items, work.count, 0.5, "fp32")
    )


def _layer(path):
    torch.manual_seed(0)
    layer = PixelCrossAttention(12, 5, num_heads=8, num_kv_heads=2, head_dim=6, path=path)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def _context(counts):
    random = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(1, 2, len(counts) // 2, 12, generator=random, requires_grad=True)
    tokens = torch.randn(sum(counts), 5, generator=random, requires_grad=True)
    return x, ObservationContext(tokens, _offsets(counts))


@interpreted
def test_the_module_compiles_whole_and_once_for_any_number_of_observations():
    counter = CompileCounterWithBackend("aot_eager")
    kernels, products = _layer("triton"), _layer("vectorised")
    compiled = torch.compile(kernels, fullgraph=True, backend=counter)
    for counts in ([3, 0, 0, 12], [1, 20, 0, 2], [0, 0, 0, 2], [9, 9, 9, 9]):
        x, context = _context(counts)
        torch._dynamo.mark_dynamic(context.tokens, 0)
        expected = products(x, context)
        found = compiled(x, context)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for one, two in zip(
            torch.autograd.grad(expected.square().sum(), (x, context.tokens, *products.parameters())),
            torch.autograd.grad(found.square().sum(), (x, context.tokens, *kernels.parameters())),
            strict=True,
        ):
            assert (two - one).abs().max() <= 1e-4 * max(one.abs().max(), 1) if one.numel() else two.shape == one.shape
    assert counter.frame_count == 1


@interpreted
def test_without_observations_every_gradient_is_zero_but_not_missing():
    layer, (x, context) = _layer("triton"), _context([0, 0, 0, 0])
    output = layer(x, context)
    assert torch.equal(output, layer.output.bias.expand_as(output))
    output.sum().backward()
    named = {**dict(layer.named_parameters()), "x": x, "tokens": context.tokens}
    for name, tensor in named.items():
        expected = 4.0 if name == "output.bias" else 0.0  # four cells are that bias
        assert tensor.grad is not None and (tensor.grad == expected).all(), name


@interpreted
def test_the_type_of_products_follows_the_query_unless_it_is_chosen():
    query = torch.zeros(1, 1, 1)
    assert launches.resolved("auto", query) == "fp32" and launches.resolved("tf32", query) == "tf32"
    assert launches.resolved("auto", query.bfloat16()) == "bf16" and launches.resolved("auto", query.half()) == "fp16"


def test_what_the_kernels_do_not_serve_is_refused():
    operands, offsets = _operands([2], 4, 2, dtype=torch.float64), _offsets([2])
    with pytest.raises(ValueError, match=r"unknown precision 'fp8' .* fp32, tf32, bf16, fp16"):
        _outcome(operands, offsets, precision="fp8")
    with pytest.raises(ValueError, match=r"path triton of pixel_attention does not serve .* torch.float64"):
        _outcome(operands, offsets, path="triton")


@interpreted
@pytest.mark.parametrize("sizes", [(65, 64, 64), (64, 128, 33)])
def test_what_is_too_wide_without_tensor_cores_is_computed_by_pytorch(sizes):
    heads, width, token = sizes
    operands, offsets = _operands([3, 0, 2], heads, 1, width=width, token=token), _offsets([3, 0, 2])
    with pytest.raises(ValueError, match="path triton of pixel_attention does not serve this call"):
        _outcome(operands, offsets, path="triton", precision="fp32")
    exact = [x.detach().double().requires_grad_() for x in operands]
    work = WorkList.of(offsets, 5)
    for expected, found in zip(
        _outcome(exact, offsets, path="reference"), _outcome(operands, offsets, occupied=work), strict=True
    ):
        assert (found - expected).abs().max() < 1e-4 * max(expected.abs().max().item(), 1.0)
    query, key_weight = operands[0], operands[2]
    assert launches.suits(query, key_weight, "tf32") and not launches.suits(query, key_weight, "auto")
    assert isinstance(plan(offsets, 5, query, key_weight), Occupied)
    assert isinstance(plan(offsets, 5, query, key_weight, precision="tf32"), WorkList)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("tf32", 5e-3), ("fp16", 5e-3), ("bf16", 3e-2)])
def test_on_a_device_nothing_waits_and_results_are_those_of_float64(precision, tolerance, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_AUTOTUNE", "0")
    counts = [300, 0, 1, 17, 3 * ITEM + 5, 64, 0, ITEM, 1000]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    operands = [x.detach() / 4 for x in _operands(counts, 64, 2, width=32, token=32)]
    operands = [x.to(dtype) for x in operands]
    rows = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    cells = torch.repeat_interleave(torch.tensor(counts))[rows]
    exact = [x.double().requires_grad_() for x in operands]
    exact[1] = exact[1].detach()[rows[sort_and_pack(cells, len(counts))[0]]].requires_grad_()
    expected = _outcome(exact, _offsets(counts), path="reference")
    given = [x.cuda() for x in operands]
    cells, rows = cells.cuda(), rows.cuda()

    def run():
        order, offsets = sort_and_pack(cells, len(counts))
        leaves = [x.detach() for x in given]
        leaves[1] = leaves[1][rows[order]]
        leaves = [x.requires_grad_() for x in leaves]
        work = WorkList.of(offsets, sum(counts))
        return _outcome(leaves, offsets, path="auto", occupied=work, precision=precision)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = run(), run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, one, found, again in zip(NAMES, expected, first, second, strict=True):
        assert found.dtype == dtype and torch.equal(found, again), name
        size = max(one.abs().max().item(), 1.0)
        assert ((found.cpu() - one).abs() <= tolerance * size).all(), name
