"""A whole block of the video transformer as one graph: its outputs and gradients are those of the block itself, and
another number of observations compiles nothing again. Under Triton's interpreter its kernels are Triton's."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.latents import LatentLayout, ObservationContext
from models.processors.video_dit import VideoDiT, VideoDiTBlock
from tests.interpreter import needs_triton, run_interpreted

B, T, X, D, TOKEN, CONDITION = 1, 2, 5, 16, 8, 6
COUNTS = (12, 35, 23)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def _block() -> VideoDiTBlock:
    """With attention within frames, to observations and among frames, and all gates open."""
    described = LatentLayout(num_tokens=X, hidden_size=D, frames=T, observation_size=TOKEN, condition_size=CONDITION)
    torch.manual_seed(0)
    heads = {"observation_heads": 4, "observation_kv_heads": 2, "observation_head_dim": 3}
    block = VideoDiT(None, described, depth=1, num_heads=2, **heads).blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block


def _outcome(function, block: VideoDiTBlock, count: int, *, marked: bool) -> list[torch.Tensor]:
    """Output and all gradients for a random batch with `count` observations."""
    torch.manual_seed(count)
    cells = B * T * X
    offsets = torch.bincount(torch.randint(1, cells, (count,)), minlength=cells).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), offsets])
    x, condition, tokens = (
        torch.randn(shape, requires_grad=True) for shape in ((B, T, X, D), (B, CONDITION), (count, TOKEN))
    )
    context = block.observations.planned(ObservationContext(tokens, offsets))
    if marked:
        for part in (tokens, *(part for name, part in vars(context.occupied).items() if name != "count")):
            torch._dynamo.mark_dynamic(part, 0)
    output = function(x, condition, None, context, None)
    inputs = [x, condition, tokens, *block.parameters()]
    return [output.detach(), *torch.autograd.grad(output.cos().sum(), inputs)]


def _compare(block: VideoDiTBlock, compiled, count: int, *, marked: bool) -> None:
    wanted, found = (_outcome(one, block, count, marked=marked) for one in (block, compiled))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * max(theirs.abs().max(), 1e-3)


@pytest.mark.parametrize("backend, marked", [("aot_eager", True), ("eager", False)])
def test_a_block_is_one_graph_for_any_number_of_observations(backend, marked):
    """Sizes that are not marked as dynamic are found out at the second number, and never again."""
    block, counter = _block(), CompileCounterWithBackend(backend)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    compilations = []
    for count in COUNTS:
        _compare(block, compiled, count, marked=marked)
        compilations.append(counter.frame_count)
    assert compilations == ([1, 1, 1] if marked else [1, 2, 2])


@pytest.mark.slow
def test_a_block_in_generated_code_computes_the_same():
    block, counter = _block(), CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for count in COUNTS:
        _compare(block, compiled, count, marked=True)
    assert counter.frame_count == 1


@needs_triton
def test_under_the_interpreter():
    run_interpreted(__file__)
