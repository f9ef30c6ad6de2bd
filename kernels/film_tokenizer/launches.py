"""How `film_tokenizer` is launched: padded sizes, room for the sums of programs, and how these become gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.film_tokenizer import device_code

NUM_WARPS = 8
NUM_STAGES = 1
PROGRAMS_PER_MULTIPROCESSOR = 1  # that stay: as many as fit at once
INTERPRETED_PROGRAMS = 3
COPIES = 16  # of the gradients of tables: programs rarely add to the same number at once
FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(columns, tables, weights, precision: torch.dtype, eps: float) -> Tensor:
    call = _Call(columns, tables, weights, precision, eps)
    tokens = columns[0].new_empty(call.rows, call.width, dtype=torch.float32)
    call(device_code.forward, "forward", (), (tokens,))
    return tokens


def backward(gradient: Tensor, columns, tables, weights, precision: torch.dtype, eps: float) -> list[Tensor]:
    """Gradients of the tables that there are, then of the weights."""
    call = _Call(columns, tables, weights, precision, eps)
    deterministic = torch.are_deterministic_algorithms_enabled()
    present = [table for table in tables if table is not None]
    by_row = gradient.new_empty(call.rows, call.shape["K"], dtype=torch.float32) if deterministic else None
    copies = [
        None if deterministic or table is None else table.new_zeros(COPIES, *table.shape, dtype=torch.float32)
        for table in tables
    ]
    after = (by_row, *copies, COPIES, *(0 if table is None else len(table) for table in tables))
    found = []
    for part, shapes in enumerate(call.sum_shapes()):
        sizes = [rows * columns for rows, columns in shapes]
        sums = gradient.new_zeros(call.programs("backward"), sum(sizes), dtype=torch.float32)
        call(device_code.backward, "backward", (gradient.contiguous(),), (sums, *after), PART=part)
        found += [part.view(shape) for part, shape in zip(sums.sum(dim=0).split(sizes), shapes, strict=True)]
    towards = call.from_rows(by_row) if deterministic else [part.sum(dim=0) for part in copies if part is not None]
    operands = zip([*towards, *call.unpadded(*found)], [*present, *weights], strict=True)
    return [part.to(operand.dtype) for part, operand in operands]


class _Call:
    """What both kernels are given. columns: value, features, ids, then `features.COLUMNS`."""

    def __init__(self, columns, tables, weights, precision: torch.dtype, eps: float):
        self.columns = [None if part is None else part.contiguous() for part in columns]
        self.tables = [None if part is None else part.contiguous() for part in tables]
        self.weights = [part.contiguous() for part in weights]
        self.rows, self.precision, self.eps = len(columns[0]), precision, eps
        self.hidden, self.width = len(weights[0]), len(weights[4]) // 2
        self.embedded = [0 if table is None else table.shape[1] for table in tables]
        self.layout = weights[0].shape[1] - sum(self.embedded)
        self.shape = tile(self.layout, self.embedded, self.hidden, self.width)
        # Float32 products follow PyTorch's own switch.
        self.exact = precision == torch.float32 and torch.get_float32_matmul_precision() == "highest"

    def programs(self, kind: str) -> int:
        device = self.columns[0].device
        most = INTERPRETED_PROGRAMS
        if device.type == "cuda":
            most = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR
        return max(1, min(most, triton.cdiv(self.rows, rows(kind, exact=self.exact))))

    def __call__(self, kernel, kind: str, before: tuple, after: tuple, **constants) -> None:
        if self.rows == 0:
            return
        constants |= {
            **self.shape,
            "ROWS": rows(kind, exact=self.exact),
            "FACTOR": FACTORS[self.precision],
            "PRECISION": "tf32" if self.precision == torch.float32 and not self.exact else "ieee",
        }
        times = self.columns[8]
        numbers = (self.rows, 1 if times is None else times.shape[1], self.hidden, self.width, self.eps)
        with torch.cuda.device_of(self.columns[0]):
            kernel[(self.programs(kind),)](
                *before, *self.columns, *self.tables, *self.weights, *after, *numbers, **constants,
                num_warps=NUM_WARPS, num_stages=NUM_STAGES,
            )  # fmt: skip

    def sum_shapes(self) -> tuple[list[tuple[int, int]], ...]:
        """Of the sums of a program in both parts of the backward kernel, in the order in which it writes them."""
        m, k, h, c = (self.shape[name] for name in "MKHC")
        return [(h, c), (h, c), (1, c), (1, c)], [(m, h), (k, h), (1, h), (1, h), (1, h)]

    def unpadded(self, scale, shift, scale_bias, shift_bias, features, tables, bias, norm, norm_bias) -> list[Tensor]:
        """Sums -> gradients of the weights."""
        hidden, width = self.hidden, self.width
        expand = torch.cat([features[: self.layout, :hidden], tables[: sum(self.embedded), :hidden]]).T
        project = torch.cat([scale[:hidden, :width], shift[:hidden, :width]], dim=1).T
        vectors = [part[0, :hidden] for part in (bias, norm, norm_bias)]
        ends = torch.cat([scale_bias[0, :width], shift_bias[0, :width]])
        return [part.clone(memory_format=torch.contiguous_format) for part in (expand, *vectors, project, ends)]

    def from_rows(self, by_row: Tensor) -> list[Tensor]:
        """Gradients of embeddings of rows -> those of the tables, added in the order of rows."""
        found, first = [], 0
        for ids, table, size in zip(self.columns[2:5], self.tables, self.embedded, strict=True):
            if table is not None:
                towards = torch.zeros_like(table, dtype=torch.float32)
                found.append(towards.index_put_((ids.long(),), by_row[:, first : first + size], accumulate=True))
                first += size
        return found


def rows(kind: str, *, exact: bool) -> int:
    """Of a tile: as many as registers hold. exact: whether products of float32 are float32 throughout."""
    return 16 if kind == "backward" else 32 if exact else 64


def tile(layout: int, embedded: list[int], hidden: int, width: int) -> dict[str, int]:
    """Compile-time sizes; padded ones fill products of tensor cores."""
    padded = {"M": layout, "K": sum(embedded), "H": hidden, "C": width}
    padded = {name: max(16, triton.next_power_of_2(size)) for name, size in padded.items()}
    widths = zip(("TYPE", "CHANNEL", "PLATFORM"), embedded, strict=True)
    return {"LAYOUT": layout, **dict(widths), **padded}
