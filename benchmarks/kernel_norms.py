"""Cases of `python -m benchmarks kernels`: norms and gated residuals with modulation, and the norm of queries and keys.

Letters: B batch, C hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import kernel_peer as peer
from benchmarks.kernel_cases import BOTH, FORWARD, LOOP, OURS, Prepared, Setting, checked, differentiable, several
from kernels.head_norm import head_norm
from kernels.modulated_norm import gated, gated_norm, modulated_norm


@dataclass(frozen=True)
class _Norm:
    """A function of states (letter x) and vectors of C numbers (v), and how often it reads or writes a state."""

    ours: Callable
    theirs: Callable
    arguments: str
    forward: int
    backward: int


def _norms() -> dict[str, _Norm]:
    return {
        "modulated_norm": _Norm(modulated_norm, peer.modulated_norm, "xvv", 2, 3),
        "gated": _Norm(gated, peer.gated, "xvx", 3, 3),
        "gated_norm": _Norm(gated_norm, peer.gated_norm, "xvxvv", 4, 6),
    }


def norm_case(setting: Setting, *, frames: int, places: int, hidden: int, kernel: str) -> Prepared:
    norm = _norms()[kernel]
    shapes = {"x": (1, frames, places, hidden), "v": (1, hidden)}
    leaves = [setting.normal(*shapes[kind]) for kind in norm.arguments]
    return _case(setting, norm.ours, norm.theirs, leaves, passes=(norm.forward, norm.backward), state=shapes["x"])


def head_norm_case(setting: Setting, *, frames: int, places: int, heads: int, width: int) -> Prepared:
    """Of a fused projection; values, which are not normalised, have a gradient to join with those of the rest."""
    packed = setting.normal(1, frames, places, 3, heads, width)
    state = (1, frames, places, heads, width)
    return _case(setting, head_norm, peer.head_norm, [packed], passes=(4, 8), state=state)


def _case(
    setting: Setting,
    ours: Callable,
    theirs: Callable,
    leaves: list[Tensor],
    *,
    passes: tuple[int, int],
    state: tuple[int, ...],
) -> Prepared:
    """passes: readings and writings of a state, forward and backward. Results are one tensor or several, all (B, T, X,
    ...)."""
    leaves = [part.requires_grad_() for part in leaves]
    runs = {OURS: lambda: ours(*leaves)}
    if setting.loops:
        runs[LOOP] = lambda: ours(*leaves, path="reference")
    if setting.theirs:
        runs[peer.NAME] = lambda: theirs(*leaves)
    frames, places = state[1:3]
    some = (slice(None), slice(None, None, max(frames - 1, 1)), slice(None, None, max(places // 16, 1)))

    def cut(parts: Sequence[Tensor]) -> list[Tensor]:
        return [part[some] if part.ndim > 2 else part for part in parts]

    few = [part.detach().double().requires_grad_() for part in cut(leaves)]
    outputs = several(ours(*few, path="reference"))
    gradients = [torch.zeros(state, device=setting.device, dtype=setting.dtype) for _ in outputs]
    for gradient in gradients:
        gradient[some] = setting.normal(*gradient[some].shape)
    expected = torch.autograd.grad(outputs, few, [part[some].double() for part in gradients])
    expected = [*(part.detach() for part in outputs), *expected]
    errors = checked(setting, runs, leaves, gradients, lambda out, g: cut([*several(out), *g]), expected)
    one = setting.size * torch.Size(state).numel()
    vectors = [(count * one, 0.0) for count in passes]  # not the matrix units' work
    steps = differentiable(runs, leaves, [setting.normal(*state) for _ in outputs])
    return Prepared(errors, steps, {FORWARD: vectors[:1], BOTH: vectors})
