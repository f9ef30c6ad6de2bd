"""Ragged pixel attention: the vectorised path against the loop over cells, in float64 and as modules use it."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.pixel_attention import pixel_attention
from kernels.segments import PIECE, Occupied
from models.attention.pixel import PixelCrossAttention
from models.latents import ObservationContext

# Empty, single, unpadded, padded, at the limit of a piece, cut in two and in three.
COUNTS = [3, 0, 1, 1, 20, 0, PIECE, 9, PIECE + 1, 33, 2, 2 * PIECE + 300, 0]
NAMES = ("query", "tokens", "key_weight", "value_weight", "value_bias")


def _offsets(counts) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(counts).cumsum(0)])


def _operands(counts, heads, kv_heads, *, width=6, token=5, dtype=torch.float64, bias=True):
    random = torch.Generator().manual_seed(len(counts) + heads)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    kv = kv_heads * width
    tensors = [draw(len(counts), heads, width), draw(sum(counts), token), draw(kv, token), draw(kv, token)]
    return [*tensors, draw(kv) if bias else None]


def _outcome(operands, offsets, **options):
    query, tokens, *weights = operands
    output = pixel_attention(query, tokens, offsets, *weights, scale=0.4, **options)
    target = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    given = [operand for operand in operands if operand is not None]
    return [output.detach(), *torch.autograd.grad((output * target).sum(), given)]


def _independent(operands, offsets):
    """One cell at a time through PyTorch's own attention: the sharing of heads and the bias are spelled out."""
    query, tokens, key_weight, value_weight, value_bias = operands
    rows = []
    for cell in range(len(query)):
        z = tokens[offsets[cell] : offsets[cell + 1]]
        if len(z) == 0:
            rows.append(torch.zeros_like(query[cell]).flatten())
            continue
        keys, values = (F.linear(z, *pair) for pair in ((key_weight, None), (value_weight, value_bias)))
        keys, values = (part.unflatten(1, (-1, query.shape[2])).transpose(0, 1) for part in (keys, values))
        repeat = query.shape[1] // len(keys)
        keys, values = (part.repeat_interleave(repeat, dim=0) for part in (keys, values))
        rows.append(F.scaled_dot_product_attention(query[cell][:, None], keys, values, scale=0.4).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (40, 1), (8, 2), (24, 2), (8, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_paths_agree_in_float64(heads, kv_heads, bias):
    operands, offsets = _operands(COUNTS, heads, kv_heads, bias=bias), _offsets(COUNTS)
    reference, fast = (_outcome(operands, offsets, path=path) for path in ("reference", "vectorised"))
    torch.testing.assert_close(reference[0], _independent(operands, offsets), rtol=1e-12, atol=1e-12)
    for name, expected, actual in zip(("output", *NAMES), reference, fast, strict=False):
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 1e-12, f"{name}: {error}"
    assert all((fast[0][cell] == 0).all() for cell, count in enumerate(COUNTS) if count == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_exact_as_its_inputs(dtype):
    offsets = _offsets(COUNTS)
    operands = _operands(COUNTS, 24, 2, dtype=dtype)
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for expected, actual in zip(
        _outcome(exact, offsets, path="reference"), _outcome(operands, offsets, path="auto"), strict=True
    ):
        assert actual.dtype == dtype
        assert (actual - expected).abs().max() < tolerance * expected.abs().max()


def test_occupied_cells_alone_give_the_same_rows():
    operands, offsets = _operands(COUNTS, 8, 2), _offsets(COUNTS)
    occupied = Occupied.of(offsets)
    whole = pixel_attention(operands[0], operands[1], offsets, *operands[2:], scale=1.0)
    for path in ("reference", "vectorised"):
        some = pixel_attention(
            operands[0][occupied.cells], operands[1], offsets, *operands[2:], scale=1.0, path=path, occupied=occupied
        )
        torch.testing.assert_close(some, whole[occupied.cells], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [[2, 0, 1, 3], [0, 10, 1]])
def test_gradcheck(counts):
    operands, offsets = _operands(counts, 4, 2, width=2, token=3), _offsets(counts)
    assert torch.autograd.gradcheck(
        lambda query, tokens, *weights: pixel_attention(query, tokens, offsets, *weights, scale=0.7), operands
    )


@pytest.mark.parametrize("size", [1, 200])
def test_a_crowded_cell_is_exact_and_large_scores_stay_finite(size):
    counts = [0, 100_000, 3]
    operands, offsets = _operands(counts, 4, 2, dtype=torch.float32), _offsets(counts)
    operands[0] = (operands[0].detach() * size).requires_grad_()  # 200: scores of several hundreds
    exact = [operand.detach().double().requires_grad_() for operand in operands]
    expected, actual = (
        _outcome(given, offsets, path=path) for given, path in ((exact, "reference"), (operands, "auto"))
    )
    assert all(part.isfinite().all() for part in actual)
    compared = len(expected) if size == 1 else 1  # the gradients of a hard choice are differences of equal numbers
    for one, other in zip(expected[:compared], actual, strict=False):
        assert (other - one).abs().max() < 1e-4 * one.abs().max()


def test_a_broken_token_stays_in_its_cell():
    operands, offsets = _operands([12, 5, 0, 9], 4, 2), _offsets([12, 5, 0, 9])
    with torch.no_grad():
        operands[1][13] = math.nan
    output = pixel_attention(operands[0], operands[1], offsets, *operands[2:], scale=1.0)
    assert output.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_results_repeat_bit_by_bit():
    operands, offsets = _operands(COUNTS, 24, 2, dtype=torch.float32), _offsets(COUNTS)
    for first, second in zip(_outcome(operands, offsets), _outcome(operands, offsets), strict=True):
        assert torch.equal(first, second)


def test_operators_describe_themselves_truly():
    offsets = _offsets([2, 0, 11])
    plan = Occupied.of(offsets)
    query, tokens, *weights = _operands([2, 11], 4, 2)
    arguments = (query, tokens, *weights, plan.place, plan.start, plan.length, plan.blocks, 0.5)
    torch.library.opcheck(torch.ops.hydrasphere.pixel_attention.default, arguments)
    torch.library.opcheck(torch.ops.hydrasphere.occupied.default, (offsets,), test_utils="test_schema")


def _layer_and_inputs(counts, **options):
    torch.manual_seed(0)
    layer = PixelCrossAttention(12, 5, num_heads=8, num_kv_heads=2, head_dim=6, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    offsets = _offsets(counts)
    x = torch.randn(1, 2, len(counts) // 2, 12, requires_grad=True)
    tokens = torch.randn(sum(counts), 5, requires_grad=True)
    return layer, x, ObservationContext(tokens, offsets, Occupied.of(offsets))


def test_an_empty_cell_yields_the_bias_of_the_output():
    layer, x, context = _layer_and_inputs([3, 0, 0, 12])
    output = layer(x, context)
    assert output.shape == x.shape
    assert torch.equal(output.flatten(0, 2)[1:3], layer.output.bias.expand(2, -1))
    without = ObservationContext(context.tokens, context.offsets)
    torch.testing.assert_close(layer(x, without), output)
    assert (
        PixelCrossAttention(12, 5, num_heads=8, num_kv_heads=2, head_dim=6, bias=False)(x, context)[0, 0, 1] == 0
    ).all()


def test_without_observations_every_gradient_is_zero_but_not_missing():
    layer, x, context = _layer_and_inputs([0, 0, 0, 0])
    layer(x, context).sum().backward()
    named = {**dict(layer.named_parameters()), "x": x, "tokens": context.tokens}
    for name, tensor in named.items():
        expected = 4.0 if name == "output.bias" else 0.0  # four cells are that bias
        assert tensor.grad is not None and (tensor.grad == expected).all(), name


def test_the_module_compiles_whole_and_for_any_number_of_observations():
    layer, _, _ = _layer_and_inputs([3, 0, 0, 12])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for counts in ([3, 0, 0, 12], [1, 20, 0, 2], [0, 0, 0, 0]):
        _, x, context = _layer_and_inputs(counts)
        outcomes = []
        for module in (layer, compiled):
            output = module(x, context)
            gradients = torch.autograd.grad(output.square().sum(), (x, context.tokens, *layer.parameters()))
            outcomes.append((output, *gradients))
        torch.testing.assert_close(*outcomes)


def test_autocast_computes_in_float32_and_trains():
    layer, x, context = _layer_and_inputs([3, 0, 0, 12])
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x, context)
    assert output.dtype == torch.bfloat16
    expected = layer(x, context)
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match=r"6 query heads .* 4 key/value heads"):
        PixelCrossAttention(12, 5, num_heads=6, num_kv_heads=4, head_dim=6)
    with pytest.raises(ValueError, match="fastest"):
        PixelCrossAttention(12, 5, num_heads=8, num_kv_heads=4, head_dim=6, path="fastest")
