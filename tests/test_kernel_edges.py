"""What kernels meet at the edges, on PyTorch's paths and on Triton's under its interpreter: nothing at all, everything
in one cell, odd widths, columns that lie apart in memory, numbers of rows that a compiled graph has not seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.film_tokenizer import film_tokenizer
from kernels.modulated_norm import gated, modulated_norm
from kernels.sort_and_pack import sort_and_pack
from tests.interpreter import interpreted, needs_triton, run_interpreted
from tests.test_film_tokenizer import _leaves, _operands, _rows

PATHS = ["vectorised", pytest.param("triton", marks=interpreted)]


@needs_triton
def test_under_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize("path", PATHS)
def test_all_rows_in_one_cell_keep_their_order(path):
    order, offsets = sort_and_pack(torch.full((700,), 3), 5, path=path)
    assert torch.equal(order, torch.arange(700))
    assert offsets.tolist() == [0, 0, 0, 0, 700, 700]


@pytest.mark.parametrize("path", PATHS)
def test_sorting_is_one_graph_for_any_number_of_rows(path):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda cell: sort_and_pack(cell, 7, path=path), fullgraph=True, dynamic=True, backend=backend
    )
    for count in (40, 9, 111):
        cell = torch.randint(0, 8, (count,), generator=torch.Generator().manual_seed(count))
        for found, expected in zip(compiled(cell), sort_and_pack(cell, 7, path="reference"), strict=True):
            assert torch.equal(found, expected)
    assert len(compilations) == 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [1, 7, 33])
def test_norms_and_residuals_of_odd_widths(path, width):
    random = torch.Generator().manual_seed(width)
    x, branch = (torch.randn(2, 3, 5, width, generator=random) for _ in range(2))
    shift, scale = (torch.randn(2, width, generator=random) for _ in range(2))
    for function, inputs in ((modulated_norm, (x, shift, scale)), (gated, (x, scale, branch))):
        outcomes = []
        for dtype, which in ((torch.float64, "reference"), (torch.float32, path)):
            leaves = [part.to(dtype, copy=True).requires_grad_() for part in inputs]
            output = function(*leaves, path=which)
            towards = torch.linspace(-1, 1, output.numel()).view_as(output).to(dtype)
            outcomes.append([output.detach(), *torch.autograd.grad(output, leaves, towards)])
        for index, (expected, found) in enumerate(zip(*outcomes, strict=True)):
            # One number is its own mean: gradients are the rounding of what the norm's rate, 1000, multiplies.
            cancelled = function is modulated_norm and width == 1 and index in (1, 3)
            size = max(expected.abs().max().item(), 1000.0 if cancelled else 1.0)
            torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5 * size)


def test_no_observations_have_no_tokens_and_zero_gradients():
    operands = _operands(30)
    tokens = film_tokenizer(vars(_rows(0)), *operands, path="vectorised")
    assert tokens.shape == (0, 16)
    for gradient in torch.autograd.grad(tokens.sum(), _leaves(operands)):
        assert not gradient.any()


def test_columns_that_lie_apart_give_the_same_tokens():
    rows, operands = _rows(70), _operands(50)
    apart = {name: torch.stack([column, column], dim=1)[:, 0] for name, column in rows.rows().items()}
    assert not any(column.is_contiguous() for column in apart.values())
    outcomes = []
    for given in (rows, replace(rows, **apart)):
        tokens = film_tokenizer(vars(given), *operands, path="vectorised")
        outcomes.append([tokens.detach(), *torch.autograd.grad(tokens.cos().sum(), _leaves(operands))])
    torch.testing.assert_close(*outcomes, rtol=1e-6, atol=1e-6)
