"""FiLM tokens of scalar observations: what a row is (its description) scales and shifts what it says (its value).

As in Feature-wise Linear Modulation (Perez et al. 2018, arXiv:1709.07871): a description is the features of a row
(`data/observation_features.py`) beside learned embeddings of its ids,

    hidden = silu(norm(expand description)),    token = scale * value + shift with (scale, shift) = project hidden

On a GPU a row is read as the numbers it came with: its features, embeddings and hidden units exist in registers only,
forward and backward. Letters: n rows, M features, K width of the description, H hidden, c token width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import autocast_dtype, chosen_path
from kernels.film_tokenizer import features, vectorised  # noqa: F401 - registers an operator
from kernels.film_tokenizer.vectorised import NORM_EPS

TABLES = ("type", "channel", "platform")
LAYOUTS = (28, 30, 50)  # numbers of features that can be computed
WIDEST = {"features": 64, "tables": 32, "hidden": 64, "tokens": 32}  # that registers hold in the backward pass


def film_tokenizer(
    rows: Mapping[str, Tensor | None],
    tables: Sequence[Tensor | None],
    expand: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor],
    project: tuple[Tensor, Tensor],
    *,
    path: str = "auto",
) -> Tensor:
    """n rows -> tokens (n, c).

    rows: columns named as in `data.observations.Observations`: value, ids, and either features (n, M) or what they are
    computed from (`features.COLUMNS`); integers of any width, ids below the sizes of their tables. tables: embeddings
    of type, channel and platform, (ids, width) each; the last may be None. expand, norm, project: weight and bias of
    K -> H, of the layer norm over H, and of H -> 2 c (scale first).

    A value keeps its precision on every device: tokens are float32 also where autocast computes scale and shift in 16
    bits. Gradients: of tables and weights; of value and features on the paths vectorised and reference only, which auto
    takes where they are wanted. Those of tables add up by atomics on the path triton, in no fixed order, unless
    `torch.use_deterministic_algorithms` is on; all others are deterministic.
    """
    given = rows["features"]
    wanted = [rows["value"], *(() if given is None else (given,))]
    width = sum(table.shape[1] for table in tables if table is not None)
    sizes = {
        "features": expand[0].shape[1] - width,
        "tables": width,
        "hidden": len(expand[0]),
        "tokens": len(project[0]) // 2,
    }
    suits = all(sizes[name] <= widest for name, widest in WIDEST.items()) and expand[0].dtype != torch.float64
    suits = suits and not any(part.requires_grad for part in wanted)
    path = chosen_path(path, "film_tokenizer", rows["value"], suits=suits)
    precision = _precision(rows["value"], expand[0])
    if path == "triton":
        operands = (*tables, *expand, *norm, *project)
        columns = list(columns_read(rows, sizes["features"]).values())
        return torch.ops.hydrasphere.film_tokenizer(columns, *operands, precision)
    if given is None:
        computed = features.reference if path == "reference" else features.vectorised
        given = computed(rows, sizes["features"])
    pairs = [(rows[name], table) for name, table in zip(TABLES, tables, strict=True) if table is not None]
    if path == "vectorised":
        operands = (*map(list, zip(*pairs, strict=True)), *expand, *norm, *project)
        return torch.ops.hydrasphere.film_tokens(rows["value"], given, *operands, precision)
    embedded = [F.embedding(ids.long(), table) for ids, table in pairs]
    description = torch.cat([given, *embedded], dim=-1).to(expand[0].dtype)
    hidden = F.linear(description, *expand)
    hidden = F.silu(F.layer_norm(hidden, hidden.shape[-1:], *norm, eps=NORM_EPS))
    scale, shift = F.linear(hidden, *project).chunk(2, dim=-1)
    return torch.addcmul(shift, scale, rows["value"][:, None])


def columns_read(rows: Mapping[str, Tensor | None], num_features: int) -> dict[str, Tensor | None]:
    """What the kernel is given of the rows, in its order; None for what it has no use for."""
    used = set(features.COLUMNS) if rows["features"] is None else set()
    if num_features == 28:
        used -= {"latitude"}
    columns = {name: rows[name] for name in ("value", "features", *TABLES)}
    return columns | {name: rows[name] if name in used else None for name in features.COLUMNS}


def row_bytes(rows: Mapping[str, Tensor | None], num_features: int) -> int:
    """Bytes that the kernel reads a row; what belongs to frames is read from the cache."""
    columns = columns_read(rows, num_features)
    return sum(column[:1].nbytes for name, column in columns.items() if column is not None and name != "times")


def _precision(value: Tensor, weight: Tensor) -> torch.dtype:
    """Of the factors of products."""
    return autocast_dtype(value.device, weight.dtype)


@torch.library.custom_op("hydrasphere::film_tokenizer", mutates_args=())
def _forward(
    columns: Sequence[Tensor | None],
    type_table: Tensor,
    channel_table: Tensor,
    platform_table: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    norm: Tensor,
    norm_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    precision: torch.dtype,
) -> Tensor:
    from kernels.film_tokenizer import launches

    tables, weights = (type_table, channel_table, platform_table), (expand, expand_bias, norm, norm_bias)
    return launches.forward(columns, tables, (*weights, project, project_bias), precision, NORM_EPS)


@_forward.register_fake
def _(columns, type_table, channel_table, platform_table, expand, expand_bias, norm, norm_bias, project, *rest):
    return columns[0].new_empty(columns[0].shape[0], project.shape[0] // 2, dtype=torch.float32)


@torch.library.custom_op("hydrasphere::film_tokenizer_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    columns: Sequence[Tensor | None],
    type_table: Tensor,
    channel_table: Tensor,
    platform_table: Tensor | None,
    expand: Tensor,
    expand_bias: Tensor,
    norm: Tensor,
    norm_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    precision: torch.dtype,
) -> list[Tensor]:
    """Gradients of the tables that there are and of the weights, in their order."""
    from kernels.film_tokenizer import launches

    tables, weights = (type_table, channel_table, platform_table), (expand, expand_bias, norm, norm_bias)
    return launches.backward(gradient, columns, tables, (*weights, project, project_bias), precision, NORM_EPS)


@_backward.register_fake
def _(gradient, columns, *operands):
    return [operand.new_empty(operand.shape) for operand in operands[:-1] if operand is not None]


def _setup(ctx, inputs, output):
    columns, *operands, ctx.precision = inputs
    ctx.num_columns = len(columns)
    ctx.save_for_backward(*columns, *operands)


def _gradients(ctx, gradient):
    columns, operands = ctx.saved_tensors[: ctx.num_columns], ctx.saved_tensors[ctx.num_columns :]
    found = iter(torch.ops.hydrasphere.film_tokenizer_backward(gradient, list(columns), *operands, ctx.precision))
    towards = [None if operand is None else next(found) for operand in operands]
    return None, *towards, None  # a list with missing columns counts as one operand


_forward.register_autograd(_gradients, setup_context=_setup)
