"""FiLM tokens (`kernels/film_tokenizer`) as PyTorch computes them: by pieces of rows that stay in the cache.

What an id adds to the hidden units (embedding times weight) is computed once an id and added up a row; gradients are
added up by id before they meet weights and embeddings. The backward pass computes hidden units again, so that of a row
its features are all that is kept. Letters: n rows, M features, H hidden, c token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.pieces import add_rows, pieces

NORM_EPS = 1e-5


class _Call:
    """What the pieces of one call share. precision: of the factors of products."""

    def __init__(self, features, ids, tables, weights, precision: torch.dtype):
        expand, bias, *norm, project, project_bias = weights
        self.features, self.ids, self.precision = features, ids, precision
        self.wide = torch.promote_types(precision, torch.float32)
        self.tables = [table.to(self.wide) for table in tables]
        widths = [features.shape[1], *(table.shape[1] for table in tables)]
        of_features, *self.of_tables = expand.to(self.wide).split(widths, dim=1)
        added = [table @ weight.T for table, weight in zip(self.tables, self.of_tables, strict=True)]
        added[0] += bias
        self.sizes = [len(part) for part in added]
        if features.device.type == "cpu":  # elsewhere asking would wait for the device
            _check(ids, self.sizes)
        self.starts = [0, *accumulate(self.sizes[:-1])]
        self.added, self.of_features = torch.cat(added).to(precision), of_features.to(precision)
        self.norm = [part.to(self.wide) for part in norm]
        self.project, self.project_bias = project.to(precision), project_bias.to(precision)

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their features (rows, M), and their ids (rows, tables), counted through all tables."""
        row_bytes = 2 * self.added.itemsize * self.added.shape[1]
        for rows in pieces(len(self.features), row_bytes, self.features.device):
            ids = [column[rows].long() + first for column, first in zip(self.ids, self.starts, strict=True)]
            yield rows, self.features[rows].to(self.precision), torch.stack(ids, dim=1)

    def hidden(self, features: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """(rows, H) before and after the norm, and the norm's mean and rate."""
        hidden = F.embedding_bag(ids, self.added, mode="sum")
        hidden = torch.addmm(hidden, features, self.of_features.T, out=hidden).to(self.wide)
        return hidden, *torch.native_layer_norm(hidden, hidden.shape[1:], *self.norm, NORM_EPS)

    def modulation(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift (rows, c)."""
        modulation = torch.addmm(self.project_bias, active.to(self.precision), self.project.T)
        return modulation.to(self.wide).chunk(2, dim=1)


def _check(ids: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Raises IndexError for an id that its table does not have: in the joined table it would be another's."""
    for column, size in zip(ids, sizes, strict=True):
        if len(column):
            least, most = (int(value) for value in column.aminmax())
            if least < 0 or most >= size:
                raise IndexError(f"ids from {least} to {most} in a table of {size}")


@torch.library.custom_op("hydrasphere::film_tokens", mutates_args=())
def _forward(
    value: Tensor,
    features: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    expand: Tensor,
    expand_bias: Tensor,
    norm: Tensor,
    norm_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    precision: torch.dtype,
) -> Tensor:
    weights = expand, expand_bias, norm, norm_bias, project, project_bias
    with torch.autocast(value.device.type, enabled=False):
        call = _Call(features, ids, tables, weights, precision)
        tokens = value.new_empty(len(value), len(project) // 2, dtype=torch.promote_types(value.dtype, precision))
        for rows, *described in call.pieces():
            _, normed, *_ = call.hidden(*described)
            scale, shift = call.modulation(F.silu(normed, inplace=True))
            torch.addcmul(shift, scale, value[rows, None], out=tokens[rows])
    return tokens


@_forward.register_fake
def _(value, features, ids, tables, expand, expand_bias, norm, norm_bias, project, project_bias, precision):
    dtype = torch.promote_types(value.dtype, precision)
    return value.new_empty(value.shape[0], project.shape[0] // 2, dtype=dtype)


@torch.library.custom_op("hydrasphere::film_tokens_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    value: Tensor,
    features: Tensor,
    ids: Sequence[Tensor],
    tables: Sequence[Tensor],
    expand: Tensor,
    expand_bias: Tensor,
    norm: Tensor,
    norm_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    precision: torch.dtype,
    of_value: bool,
    of_features: bool,
) -> list[Tensor]:
    """Gradients of tables and weights, then of value and features where they are wanted."""
    weights = expand, expand_bias, norm, norm_bias, project, project_bias
    call = _Call(features, ids, tables, weights, precision)
    by_id = torch.zeros_like(call.added, dtype=call.wide)
    factors, *found = (torch.zeros_like(part, dtype=call.wide) for part in (call.of_features, *weights[2:]))
    found_norm, found_norm_bias, found_project, found_project_bias = found
    asked = [part.new_empty(part.shape) for part, wanted in ((value, of_value), (features, of_features)) if wanted]
    for rows, some, some_ids in call.pieces():
        hidden, normed, mean, rate = call.hidden(some, some_ids)
        active = F.silu(normed)
        towards_shift = gradient[rows].to(call.wide)
        if of_value:
            asked[0][rows] = (call.modulation(active)[0] * towards_shift).sum(dim=1)
        towards = torch.cat([towards_shift * value[rows, None], towards_shift], dim=1)
        found_project_bias += towards.sum(dim=0)
        towards = towards.to(precision)
        _add_product(found_project, towards.T, active.to(precision))
        towards = torch.ops.aten.silu_backward((towards @ call.project).to(call.wide), normed)
        towards, *of_norm = torch.ops.aten.native_layer_norm_backward(
            towards, hidden, hidden.shape[1:], mean, rate, *call.norm, [True] * 3
        )
        found_norm += of_norm[0]
        found_norm_bias += of_norm[1]
        for column in some_ids.unbind(1):
            add_rows(by_id, column, towards)
        towards = towards.to(precision)
        _add_product(factors, towards.T, some)
        if of_features:
            asked[-1][rows] = towards @ call.of_features
    by_table = by_id.split(call.sizes)
    found_tables = [part @ weight for part, weight in zip(by_table, call.of_tables, strict=True)]
    factors = [factors, *(part.T @ table for part, table in zip(by_table, call.tables, strict=True))]
    parts = [*found_tables, torch.cat(factors, dim=1), by_table[0].sum(dim=0), *found]
    return [*(part.to(of.dtype) for part, of in zip(parts, (*tables, *weights), strict=True)), *asked]


@_backward.register_fake
def _(gradient, value, features, ids, tables, *rest):
    *weights, _, of_value, of_features = rest
    parts = [*tables, *weights, *([value] if of_value else []), *([features] if of_features else [])]
    return [part.new_empty(part.shape) for part in parts]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _setup(ctx, inputs, output):
    value, features, ids, tables, *weights, ctx.precision = inputs
    ctx.count = len(ids)
    ctx.save_for_backward(value, features, *ids, *tables, *weights)


def _gradients(ctx, gradient):
    value, features, *rest = ctx.saved_tensors
    ids, tables, weights = rest[: ctx.count], rest[ctx.count : 2 * ctx.count], rest[2 * ctx.count :]
    wanted = ctx.needs_input_grad[:2]
    with torch.autocast(value.device.type, enabled=False):
        found = torch.ops.hydrasphere.film_tokens_backward(
            gradient, value, features, ids, tables, *weights, ctx.precision, *wanted
        )
    count = len(tables) + len(weights)
    asked = iter(found[count:])
    of_value, of_features = (next(asked) if one else None for one in wanted)
    return of_value, of_features, [None] * len(ids), found[: len(tables)], *found[len(tables) : count], None


_forward.register_autograd(_gradients, setup_context=_setup)
