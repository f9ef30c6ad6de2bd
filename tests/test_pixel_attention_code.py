"""The code that Triton makes of pixel attention and of sorting for Hopper: addresses of 64 bits, registers not spilled.

Sizes are those of HealDA v2: 64 query heads of width 32, 2 key/value heads, tokens of width 32.
"""

import math
import re

import pytest
import torch

from kernels.dispatch import INTERPRETED
from tests.interpreter import needs_triton
from tests.kernel_resources import compiled, resources

pytestmark = [needs_triton, pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")]
SUMS = ("logsum", "piece_mixed", "piece_logsum", "piece_gradient", "weight_gradient", "bias_gradient")
OF_ALL_CELLS = ("query", "tokens", "output", "gradient", "query_gradient", "token_gradient", "items", *SUMS)


def _arguments(kernel, precision: str, heads: int = 64, groups: int = 2, **constants) -> tuple[dict[str, str], dict]:
    from kernels.pixel_attention import launches

    of_call = launches.constants(heads, 32, torch.empty(32 * groups, 32, device="meta"), precision, bias=True)
    constants = {name: value for name, value in {**of_call, **constants}.items() if name in kernel.arg_names}
    number = {"bf16": "*bf16", "fp16": "*fp16"}.get(precision, "*fp32")
    types = {name: "*fp32" if name in SUMS else number for name in kernel.arg_names}
    return {**types, "items": "*i64", "count": "*i64", "num_tokens": "i32", "scale": "fp32"}, constants


@pytest.mark.parametrize("name", ["attend", "attend_backward", "join", "add_pieces"])
def test_rows_beyond_two_to_the_31_are_reached(name):
    """Every address in what grows with cells or tokens starts from an offset of 64 bits."""
    from kernels.pixel_attention import device_code

    kernel = getattr(device_code, name)
    types, constants = _arguments(kernel, "bf16", TILE=32, ROWS=16, NUMBERS=2048, BLOCK=512, PIECES=8)
    code = compiled(kernel, types, constants, num_warps=4).asm["ttir"]
    for argument in set(OF_ALL_CELLS) & set(kernel.arg_names):
        uses = re.findall(rf"[^\n]*%{argument}[,) ][^\n]*", code[code.index("{", code.index("tt.func")) :])
        assert uses, argument
        assert all(re.search(rf"tt\.addptr %{argument}, %\w+ : !tt\.ptr<\w+>, i64", use) for use in uses), uses


def _of_sorting(kernel, key: str, begins: str, numbers: str, tile: int) -> tuple[dict[str, str], dict]:
    import triton.language as tl

    types = {"cell": f"*{key}", "counts": "*i32", "begins": f"*{begins}", "order": "*i64"}
    types |= dict.fromkeys(("count", "length", "segments", "cells"), numbers)
    constants = {"TILE": tile, "KEY": getattr(tl, "int" + key[1:])}
    return types, {name: value for name, value in constants.items() if name in kernel.arg_names}


@pytest.mark.parametrize("name", ["count_rows", "place_rows"])
@pytest.mark.parametrize("key", ["i32", "i64"])
def test_more_than_two_to_the_31_rows_are_sorted(name, key):
    """However few bits cells and the numbers of a call have."""
    from kernels.sort_and_pack import device_code

    kernel = getattr(device_code, name)
    types, constants = _of_sorting(kernel, key, "i64", "i32", 1024)
    code = compiled(kernel, types, constants, num_warps=4).asm["ttir"]
    offsets = re.findall(r"tt\.addptr [^\n]*, (tensor<\d+xi\d+>|i\d+) ", code)
    assert offsets and all(offset.endswith(("xi64>", "i64")) for offset in offsets), offsets


def test_all_threads_know_where_rows_go_before_any_counts_on():
    """What one program after the other cannot show under the interpreter: barriers stand where they were written."""
    from kernels.sort_and_pack import device_code

    types, constants = _of_sorting(device_code.place_rows, "i32", "i64", "i32", 1024)
    code = compiled(device_code.place_rows, types, constants, num_warps=4).asm["ptx"]
    steps = re.findall(r"ld\.global\.cg|st\.global|bar\.sync|bra[ \t]+\$", code)
    names = {"ld.global.cg": "read ", "st.global": "write ", "bar.sync": "wait "}
    last_tile = "".join(names.get(step, "again ") for step in steps).split("again ")[-2]
    assert re.search(r"(?<!read )(read )+(write )+wait (write )+wait $", last_tile), last_tile


@pytest.mark.slow
@pytest.mark.parametrize("name", ["count_rows", "place_rows"])
@pytest.mark.parametrize("key", ["i32", "i64"])
def test_sorting_spills_no_registers(name, key):
    """31 M rows in 98,304 cells, and in too many for 32 bits, in every configuration that is measured."""
    from kernels.sort_and_pack import TUNING, device_code

    kernel = getattr(device_code, name)
    for config in TUNING.candidates:
        types, constants = _of_sorting(kernel, key, "i32", "i32", config["TILE"])
        options = {name: config[name] for name in ("num_warps", "maxnreg") if name in config}
        needs = resources(kernel, types, constants, **options)
        assert needs["stack"] == 0 and needs["shared"] <= 48 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "heads", "groups"),
    [
        *((precision, 64, 2) for precision in ("bf16", "fp16", "tf32")),
        *((precision, *sizes) for precision in ("bf16", "tf32") for sizes in ((64, 4), (128, 2))),
    ],
)
@pytest.mark.parametrize("name", ["attend", "attend_backward"])
def test_shipped_configurations_spill_no_registers(name, precision, heads, groups):
    from kernels.pixel_attention import device_code, launches

    of_kind = launches.FORWARD if name == "attend" else launches.BACKWARD
    kernel = getattr(device_code, name)
    of_call = launches.constants(heads, 32, torch.empty(32 * groups, 32, device="meta"), precision, bias=True)
    config = of_kind[launches.kind(precision, of_call)].default((9, 0))
    types, constants = _arguments(kernel, precision, heads, groups, TILE=config["TILE"])
    needs = resources(kernel, types, constants, num_warps=config["num_warps"], num_stages=config["num_stages"])
    assert needs["stack"] == 0
    # All programs that the configuration asks of a multiprocessor run at once.
    of_warp = 32 * 8 * math.ceil(needs["registers"] / 8)
    assert config["programs"] * config["num_warps"] * of_warp <= 65_536
    assert config["programs"] * needs["shared"] <= 227 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_joining_pieces_spills_no_registers(precision, columns):
    """However wide tokens are."""
    from kernels.pixel_attention import device_code, launches

    of_call = launches.constants(64, 32, torch.empty(64, columns, device="meta"), precision, bias=True)
    joined = {"C": of_call["C"], "COLUMNS": columns, "PIECES": launches.joined_pieces(of_call)}
    for kernel, sizes in (
        (device_code.join, joined | {"ROWS": launches.JOINED_ROWS}),
        (
            device_code.add_pieces,
            {"NUMBERS": 2048, "BLOCK": launches.ADDED_NUMBERS, "PIECES": launches.ADDED_PIECES},
        ),
    ):
        types, constants = _arguments(kernel, precision, **sizes)
        assert resources(kernel, types, constants, num_warps=4)["stack"] == 0
