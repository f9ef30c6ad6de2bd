"""How `film_tokenizer` is launched: padded sizes, room for the sums of programs, and how these become gradients.

Where the mean of a row is 0 the norm has one sum less, forward and backward: the weights before it are given with their
mean over hidden units taken off, which is exact, and so are their gradients.
"""

from __future__ import annotations

from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.film_tokenizer import device_code
from kernels.film_tokenizer.features import COLUMNS, SECONDS_PER_DAY
from kernels.pieces import add_rows
from kernels.tuning import Config, Tuning

NUM_STAGES = 1
TIMES = 5 + COLUMNS.index("times")  # behind value, features and ids
INTERPRETED_PROGRAMS = 3
COPIES = 16  # of the gradients of tables: programs rarely add to the same number at once
FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SOURCES = [Path(__file__).with_name(name) for name in ("launches.py", "device_code.py", "device_features.py")]


def _tuning(name: str, names: tuple[str, ...], *choices: tuple[int, ...]) -> Tuning:
    return Tuning(f"film_tokenizer_{name}", [dict(zip(names, choice, strict=False)) for choice in choices], _SOURCES)


# Rows of a tile, warps, programs a multiprocessor, and of the backward pass launches; forward, where compilers differ
# (Triton 3.6 would take 225), the registers of a thread that these programs leave. At the sizes of HealDA v2 nothing
# spills but where one launch does all: up to 88 bytes a thread, against computing rows twice; a device must tell.
# A row a thread (4 warps, 128 rows) computes no feature twice. `exact`: products of float32 throughout, without tensor
# cores; `32`: tf32.
FORWARD = {
    kind: _tuning(f"forward_{kind}", ("ROWS", "num_warps", "programs", "maxnreg"), *choices)
    for kind, choices in {
        "16": ((128, 4, 2), (128, 8, 1), (64, 4, 2), (256, 8, 1)),
        "32": ((128, 8, 2, 128), (64, 8, 1), (64, 4, 2)),
        "exact": ((16, 8, 1), (32, 8, 1)),
    }.items()
}
BACKWARD = {
    kind: _tuning(f"backward_{kind}", ("ROWS", "num_warps", "programs", "launches"), *choices)
    for kind, choices in {
        "16": ((128, 8, 1, 2), (128, 8, 1, 1), (64, 4, 2, 1), (64, 4, 2, 2)),
        "32": ((64, 8, 1, 2), (64, 8, 1, 1), (32, 4, 1, 2)),
        "exact": ((16, 8, 1, 2), (32, 8, 1, 2)),
    }.items()
}
INTERPRETED = {"ROWS": 16, "num_warps": 4, "programs": 1}  # a small tile, so that small tests have several


def forward(columns, tables, weights, precision: torch.dtype, eps: float) -> Tensor:
    call = _Call(columns, tables, weights, precision, eps)
    tokens = columns[0].new_empty(call.rows, call.width, dtype=torch.float32)

    def launch(config: Config) -> None:
        call(device_code.forward, config, (), (tokens,))

    if call.rows:
        launch(call.config(FORWARD, launch))
    return tokens


def backward(gradient: Tensor, columns, tables, weights, precision: torch.dtype, eps: float) -> list[Tensor]:
    """Gradients of the tables that there are, then of the weights."""
    call = _Call(columns, tables, weights, precision, eps)
    gradient, present = gradient.contiguous(), [table for table in tables if table is not None]
    operands = (*present, *weights)
    if not call.rows:
        return [torch.zeros_like(operand) for operand in operands]
    deterministic = torch.are_deterministic_algorithms_enabled()
    found: list[Tensor] = []

    def launch(config: Config) -> None:
        by_row = gradient.new_empty(call.rows, call.shape["K"], dtype=torch.float32) if deterministic else None
        copies = [
            None if deterministic or table is None else table.new_zeros(COPIES, *table.shape, dtype=torch.float32)
            for table in tables
        ]
        after = (by_row, *copies, COPIES, *(0 if table is None else len(table) for table in tables))
        sums = []
        for part in passes(config):
            shapes = call.sum_shapes(**part)
            sizes = [height * width for height, width in shapes]
            of_programs = gradient.new_empty(call.programs(config), sum(sizes), dtype=torch.float32)
            call(device_code.backward, config, (gradient,), (of_programs, *after), **part)
            sums += [part.view(size) for part, size in zip(of_programs.sum(dim=0).split(sizes), shapes, strict=True)]
        towards = call.from_rows(by_row) if deterministic else [part.sum(dim=0) for part in copies if part is not None]
        found[:] = [*towards, *call.unpadded(*sums)]

    launch(call.config(BACKWARD, launch))
    return [part.to(operand.dtype) for part, operand in zip(found, operands, strict=True)]


def passes(config: Config) -> list[dict[str, bool]]:
    """What the launches of the backward pass compute."""
    if config["launches"] == 1:
        return [{"PROJECTS": True, "EXPANDS": True}]
    return [{"PROJECTS": True, "EXPANDS": False}, {"PROJECTS": False, "EXPANDS": True}]


class _Call:
    """What both kernels are given. columns: value, features, ids, then `features.COLUMNS`, of which the times of frames
    become seconds of the day."""

    def __init__(self, columns, tables, weights, precision: torch.dtype, eps: float):
        self.columns = [None if column is None else column.contiguous() for column in columns]
        times, self.num_frames = self.columns[TIMES], 1
        if times is not None:
            self.columns[TIMES], self.num_frames = times.remainder(SECONDS_PER_DAY).int(), times.shape[1]
        self.tables = [None if table is None else table.contiguous() for table in tables]
        expand, bias, *rest = weights
        centred = (expand.float() - expand.float().mean(dim=0), bias.float() - bias.float().mean())
        self.weights = [*centred, *(part.contiguous() for part in rest)]
        self.rows, self.precision, self.eps = len(columns[0]), precision, eps
        self.embedded = [0 if table is None else table.shape[1] for table in tables]
        self.layout = expand.shape[1] - sum(self.embedded)
        self.hidden, self.width = len(expand), len(weights[4]) // 2
        self.shape = tile(self.layout, self.embedded, self.hidden, self.width)
        # Float32 products follow PyTorch's own switch.
        self.exact = precision == torch.float32 and torch.get_float32_matmul_precision() == "highest"

    def config(self, tunings: dict[str, Tuning], launch) -> Config:
        kind = "exact" if self.exact else "32" if self.precision == torch.float32 else "16"
        device, tuning = self.columns[0].device, tunings[kind]
        if device.type != "cuda":
            return tuning.candidates[0] | INTERPRETED
        sizes = (*(self.shape[name] for name in "MKHC"), self.columns[1] is None, self.precision)
        with torch.cuda.device_of(self.columns[0]):
            return tuning.config(sizes, device, launch)

    def programs(self, config: Config) -> int:
        """That stay: as many as fit at once."""
        device = self.columns[0].device
        most = INTERPRETED_PROGRAMS
        if device.type == "cuda":
            most = torch.cuda.get_device_properties(device).multi_processor_count * config["programs"]
        return min(most, triton.cdiv(self.rows, config["ROWS"]))

    def __call__(self, kernel, config: Config, before: tuple, after: tuple, **constants) -> None:
        constants |= {
            **self.shape,
            "ROWS": config["ROWS"],
            "FACTOR": FACTORS[self.precision],
            "PRECISION": "tf32" if self.precision == torch.float32 and not self.exact else "ieee",
        }
        options = {name: config[name] for name in ("num_warps", "maxnreg") if name in config}
        numbers = (self.rows, self.num_frames, self.eps)
        with torch.cuda.device_of(self.columns[0]):
            kernel[(self.programs(config),)](
                *before, *self.columns, *self.tables, *self.weights, *after, *numbers, **constants,
                **options, num_stages=NUM_STAGES,
            )  # fmt: skip

    def sum_shapes(self, *, PROJECTS: bool, EXPANDS: bool) -> list[tuple[int, int]]:
        """Of the sums of a program, in the order in which it writes them."""
        m, k, h, c = (self.shape[name] for name in "MKHC")
        projection, rest = [(2 * c, h), (2 * c, 16)], [(h, m), (h, k), (h, 16), (h, 16)]
        return [*(projection if PROJECTS else []), *(rest if EXPANDS else [])]

    def unpadded(self, tokens, ends, features, tables, norm, norm_bias) -> list[Tensor]:
        """Sums -> gradients of the weights."""
        hidden, width, size = self.hidden, self.width, sum(self.embedded)
        expand = torch.cat([features[:hidden, : self.layout], tables[:hidden, : size + 1]], dim=1)
        expand = expand - expand.mean(dim=0)
        tokens, ends = (part.view(2, -1, part.shape[1])[:, :width].flatten(0, 1) for part in (tokens, ends))
        vectors = [part[:hidden, 0] for part in (norm, norm_bias)]
        parts = [expand[:, :-1], expand[:, -1], *vectors, tokens[:, :hidden], ends[:, 0]]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]

    def from_rows(self, by_row: Tensor) -> list[Tensor]:
        """Gradients of embeddings of rows -> those of the tables, added in the order of rows."""
        found, first = [], 0
        for ids, table, size in zip(self.columns[2:5], self.tables, self.embedded, strict=True):
            if table is not None:
                towards = torch.zeros_like(table, dtype=torch.float32)
                found.append(add_rows(towards, ids.long(), by_row[:, first : first + size]))
                first += size
        return found


def tile(layout: int, embedded: list[int], hidden: int, width: int) -> dict[str, int]:
    """Compile-time sizes; padded ones fill products of tensor cores. A column of ones follows the embeddings."""
    padded = {"M": layout, "K": sum(embedded) + 1, "H": hidden, "C": width}
    padded = {name: max(16, triton.next_power_of_2(size)) for name, size in padded.items()}
    widths = zip(("TYPE", "CHANNEL", "PLATFORM"), embedded, strict=True)
    return {"LAYOUT": layout, "hidden": hidden, "width": width, **dict(widths), **padded}
