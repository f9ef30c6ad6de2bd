"""Tokens from the numbers that observations come with: PyTorch's paths and Triton's, under its interpreter."""

import re
from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from data.observations import Observations
from kernels.dispatch import INTERPRETED
from kernels.film_tokenizer import LAYOUTS, features, film_tokenizer, row_bytes
from kernels.pieces import CACHE, LAUNCH, rows_at_once
from tests.interpreter import interpreted, needs_triton, run_interpreted

START = 1_700_000_000
SIZES = (3, 9, 4)  # of the tables of types, channels and platforms
ROWWISE = ("latitude", "longitude", "elapsed", "batch", "frame", "height", "pressure", "scan", "view", "sun")
MEASURED, SEEN = ("height", "pressure"), ("scan_angle", "satellite_zenith", "solar_zenith")


def _rows(count: int, **changes) -> Observations:
    """Half of them from satellites, half with a height, of two samples of three frames."""
    random = torch.Generator().manual_seed(count)

    def draw(low, high):
        return low + (high - low) * torch.rand(count, generator=random)

    def ids(size):
        return torch.randint(0, size, (count,), generator=random)

    times = START + 21_600 * torch.arange(6).view(2, 3)
    batch, frame, satellite = ids(2), ids(3), torch.rand(count, generator=random) < 0.5
    limits = {
        "height": (-100, 70_000),
        "pressure": (0, 1200),
        "scan_angle": (-50, 50),
        "satellite_zenith": (-60, 60),
        "solar_zenith": (0, 180),
    }
    columns = {name: draw(*limit) for name, limit in limits.items()}
    for name, column in columns.items():
        column[satellite if name in MEASURED else ~satellite] = torch.nan
    given = {
        "value": torch.randn(count, generator=random),
        "batch": batch,
        "frame": frame,
        "times": times,
        "time_offset": ids(21_600).int() - 10_800,
        "latitude": draw(-90, 90),
        "longitude": draw(-180, 360),
        **{name: ids(size) for name, size in zip(("type", "channel", "platform"), SIZES, strict=True)},
        **columns,
    }
    return Observations(**{**given, **changes})


def _operands(num_features: int, *, widths=(4, 16, 8), hidden=32, width=16, dtype=torch.float32) -> list:
    """Tables and weights; a width of 0 stands for no platforms."""
    random = torch.Generator().manual_seed(num_features)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=random, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    tables = [draw(size, width) if width else None for size, width in zip(SIZES, widths, strict=True)]
    expand = draw(hidden, num_features + sum(widths), scale=0.3), draw(hidden)
    return [tables, expand, (draw(hidden), draw(hidden)), (draw(2 * width, hidden, scale=0.3), draw(2 * width))]


def _leaves(operands) -> list[torch.Tensor]:
    tables, *layers = operands
    return [part for group in (tables, *layers) for part in group if part is not None]


def _outcome(rows, operands, **options) -> list[torch.Tensor]:
    tokens = film_tokenizer(vars(rows), *operands, **options)
    towards = torch.linspace(-1, 1, tokens.numel(), dtype=tokens.dtype).view_as(tokens).cos()
    return [tokens.detach(), *torch.autograd.grad((tokens * towards).sum(), _leaves(operands))]


def _compare(rows, operands, path, tolerance, **options):
    tables, *layers = operands
    wide = [[None if part is None else part.detach().double().requires_grad_() for part in tables]]
    wide += [tuple(part.detach().double().requires_grad_() for part in layer) for layer in layers]
    exact = _outcome(rows, wide, path="reference")
    for expected, found in zip(exact, _outcome(rows, operands, path=path, **options), strict=True):
        assert found.shape == expected.shape and found.isfinite().all()
        size = expected.abs().max().item() if expected.numel() else 0.0
        assert not found.numel() or (found.double() - expected).abs().max() <= tolerance * max(size, 1e-30)


@pytest.mark.parametrize("num_features", LAYOUTS)
@pytest.mark.parametrize("missing", ((), MEASURED, SEEN))
def test_features_in_pieces_equal_their_definition(num_features, missing):
    for count in (0, 5, features.FEW + 1, CACHE // features.ROW_BYTES + 3):
        columns = vars(_rows(count, **dict.fromkeys(missing)))
        found = features.vectorised(columns, num_features)
        assert found.dtype == torch.float32 and found.shape == (count, num_features)
        torch.testing.assert_close(found, features.reference(columns, num_features), rtol=0, atol=1e-7)


@pytest.mark.parametrize("num_features", LAYOUTS)
def test_the_vectorised_path_equals_the_reference(num_features, monkeypatch):
    _compare(_rows(70), _operands(num_features), "vectorised", 2e-5)
    monkeypatch.setattr("kernels.pieces.CACHE", 2 * 4 * 32 * 9)
    _compare(_rows(70), _operands(num_features, widths=(3, 5, 0)), "vectorised", 2e-5)
    _compare(_rows(70), _operands(num_features, dtype=torch.float64), "vectorised", 1e-6)


def test_the_vectorised_path_in_16_bits():
    rows, operands = _rows(300), _operands(30)
    with torch.autocast("cpu", torch.bfloat16):
        assert film_tokenizer(vars(rows), *operands, path="vectorised").dtype == torch.float32
        _compare(rows, operands, "vectorised", 2e-2)
    _compare(rows, _operands(30, dtype=torch.bfloat16), "vectorised", 2e-2)


def test_gradients_of_values_and_features(monkeypatch):
    monkeypatch.setattr("kernels.pieces.CACHE", 2 * 4 * 32 * 9)
    rows, operands, found = _rows(20), _operands(37), []
    for path in ("reference", "vectorised"):
        value, given = (
            rows.value.clone().requires_grad_(),
            torch.randn(20, 37, generator=torch.Generator().manual_seed(1)),
        )
        given.requires_grad_()
        tokens = film_tokenizer(vars(replace(rows, value=value, features=given)), *operands, path=path)
        found.append(torch.autograd.grad(tokens.square().sum(), (value, given, operands[0][2])))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_narrow_ids_and_given_features_are_read():
    rows = _rows(70)
    operands = _operands(30)
    expected = film_tokenizer(vars(rows), *operands, path="vectorised")
    narrow = {name: getattr(rows, name).to(torch.uint8) for name in ("type", "channel", "platform", "batch", "frame")}
    assert torch.equal(film_tokenizer(vars(replace(rows, **narrow)), *operands, path="vectorised"), expected)
    given = replace(rows, features=features.vectorised(vars(rows), 30), latitude=None, time_offset=None)
    assert torch.equal(film_tokenizer(vars(given), *operands, path="vectorised"), expected)


def test_operators_take_any_number_of_rows():
    columns = [getattr(_rows(9, scan_angle=None), name) for name in features.COLUMNS]
    opcheck(torch.ops.hydrasphere.observation_features.default, (columns, 30))
    rows, (tables, *layers) = _rows(9), _operands(28)
    value, given = rows.value.requires_grad_(), torch.randn(9, 28, requires_grad=True)
    described = value, given, [rows.type, rows.channel, rows.platform], tables
    arguments = (*described, *(part for layer in layers for part in layer), torch.float32)
    opcheck(torch.ops.hydrasphere.film_tokens.default, arguments)
    plain = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    opcheck(torch.ops.hydrasphere.film_tokens_backward.default, (torch.randn(9, 16), *plain, True, True))


@needs_triton
def test_under_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("num_features", LAYOUTS)
def test_triton_equals_float64(num_features):
    _compare(_rows(210), _operands(num_features), "triton", 2e-5)


@interpreted
@pytest.mark.parametrize("number", (1, 2))
def test_one_launch_or_two_compute_all_gradients(number, monkeypatch):
    """Of rows alike, which add their sum to a table, and of rows that differ."""
    from kernels.film_tokenizer import launches

    monkeypatch.setattr(launches, "INTERPRETED", {**launches.INTERPRETED, "launches": number})
    rows = _rows(70)
    alike = {"type": torch.full((70,), 2), "platform": torch.full((70,), 1, dtype=torch.int16)}
    for changes in ({}, alike):
        _compare(replace(rows, **changes), _operands(30), "triton", 2e-5)


@interpreted
def test_triton_with_few_rows_odd_widths_and_missing_columns():
    _compare(_rows(1), _operands(50), "triton", 2e-5)
    odd = {"widths": (3, 5, 0), "hidden": 20, "width": 6}
    for missing in (MEASURED, SEEN):
        _compare(_rows(70, **dict.fromkeys(missing)), _operands(28, **odd), "triton", 2e-5)
    tokens, *gradients = _outcome(_rows(0), _operands(50), path="triton")
    assert tokens.shape == (0, 16) and not any(part.any() for part in gradients)


@interpreted
def test_triton_reads_given_features_narrow_ids_and_strided_columns():
    rows = _rows(70)
    narrow = {name: getattr(rows, name).to(torch.int16) for name in ("type", "channel", "platform", "batch", "frame")}
    strided = {name: torch.stack([getattr(rows, name)] * 2, dim=1)[:, 0] for name in ("value", "height", "time_offset")}
    operands = _operands(50)
    expected = _outcome(rows, operands, path="triton")
    for found, wanted in zip(
        _outcome(replace(rows, **narrow, **strided), operands, path="triton"), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    appended = replace(rows, features=torch.randn(70, 37), latitude=None, time_offset=None)
    _compare(appended, _operands(37), "triton", 2e-5)


def test_rows_at_once_are_bounded_on_any_device():
    few, many = (rows_at_once(rows, 2048, torch.device("cuda")) for rows in (1000, 31_000_000))
    assert few == 1000 and many * 2048 == LAUNCH
    assert rows_at_once(1000, 2 * LAUNCH, torch.device("cuda")) == 1


@pytest.mark.parametrize("name, number", [("channel", SIZES[1]), ("channel", -1), ("type", SIZES[0])])
def test_an_id_that_a_table_does_not_have_is_no_row_of_another_table(name, number):
    rows = _rows(70)
    ids = getattr(rows, name).clone()
    ids[3] = number
    for path in ("reference", "vectorised"):
        with pytest.raises(IndexError):
            film_tokenizer(vars(replace(rows, **{name: ids})), *_operands(30), path=path)


if INTERPRETED:
    import triton
    import triton.language as tl

    from kernels.film_tokenizer.device_code import _ids

    @triton.jit
    def _read_ids(start, found, rows):
        row = tl.arange(0, 8)
        tl.store(found + row, _ids(start, tl.program_id(0).to(tl.int64) * 8, row, row < rows, -1))


@interpreted
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_rows_behind_the_last_have_ids_below_zero_whatever_the_type(dtype):
    """Or they would add to a row of a table."""
    found = torch.zeros(8, dtype=torch.int32)
    _read_ids[(1,)](torch.tensor([3, 100, 0, 9, 9, 9, 9, 9], dtype=dtype), found, 3)
    assert found.tolist() == [3, 100, 0, -1, -1, -1, -1, -1]


@interpreted
@pytest.mark.parametrize(("num_features", "count"), ((28, 40), (30, 44), (50, 44)))
def test_bytes_read_are_those_of_the_columns_that_kernels_get(num_features, count, monkeypatch):
    """Of rows as datasets make them."""
    from kernels.film_tokenizer import launches

    handed = []

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                handed.append([part for part in arguments if getattr(part, "shape", ()) == (70,)])
                return self.kernel[grid](*arguments, **options)

            return launch

    for name in ("forward", "backward"):
        monkeypatch.setattr(launches.device_code, name, Watched(getattr(launches.device_code, name)))
    rows = _rows(70)
    narrow = {name: getattr(rows, name).to(torch.int16) for name in ("type", "channel", "platform")}
    rows = replace(rows, **narrow, **{name: getattr(rows, name).to(torch.int8) for name in ("batch", "frame")})
    _outcome(rows, _operands(num_features), path="triton")
    assert len(handed) >= 2
    assert {sum(part.itemsize for part in columns) for columns in handed} == {count}
    assert row_bytes(vars(rows), num_features) == count


@interpreted
def test_gradients_of_tables_without_atomics_are_the_same():
    rows, operands = _rows(70), _operands(50)
    usual = _outcome(rows, operands, path="triton")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [_outcome(rows, operands, path="triton") for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for wanted, found, again in zip(usual, *runs, strict=True):
        assert torch.equal(found, again)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@interpreted
def test_every_number_is_written_and_no_other_is_read(monkeypatch):
    plain = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        empty = plain(*arguments, **options)
        return empty.fill_(torch.nan) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    _compare(_rows(70), _operands(50), "triton", 2e-5)


@interpreted
def test_gradients_of_values_take_the_path_that_has_them():
    rows = _rows(10)
    value = rows.value.clone().requires_grad_()
    film_tokenizer(vars(replace(rows, value=value)), *_operands(28)).sum().backward()
    assert value.grad.abs().sum() > 0


@interpreted
def test_operators_are_registered_completely():
    rows, operands = vars(_rows(9)), _operands(28)
    columns = [rows[name] for name in ("value", "features", "type", "channel", "platform", *features.COLUMNS)]
    tables, *layers = operands
    arguments = (columns, *tables, *(part for layer in layers for part in layer), torch.float32)
    opcheck(torch.ops.hydrasphere.film_tokenizer.default, arguments)
    plain = [part.detach() if isinstance(part, torch.Tensor) else part for part in arguments]
    opcheck(torch.ops.hydrasphere.film_tokenizer_backward.default, (torch.randn(9, 16), *plain))


@pytest.mark.parametrize("path", ["vectorised", pytest.param("triton", marks=interpreted)])
def test_compiled_whole_for_any_number_of_rows(path):
    operands, compilations = _operands(28), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    names = ["value", "type", "channel", "platform", *features.COLUMNS]

    def tokens(*columns):
        return film_tokenizer({"features": None, **dict(zip(names, columns, strict=True))}, *operands, path=path)

    compiled = torch.compile(tokens, fullgraph=True, dynamic=True, backend=backend)
    for count in (70, 9, 33):
        columns = [getattr(_rows(count), name) for name in names]
        torch.testing.assert_close(compiled(*columns), tokens(*columns))
    assert len(compilations) == 1


def _compilation(num_features: int, factor: str) -> tuple[dict[str, str], dict]:
    """Types of run-time arguments and values of compile-time ones, for the widths of HealDA."""
    import triton.language as tl

    from kernels.film_tokenizer import device_code, launches

    names = {*device_code.forward.arg_names, *device_code.backward.arg_names}
    types = dict.fromkeys(names, "*fp32")
    types |= dict.fromkeys(("type", "channel", "platform"), "*i16") | dict.fromkeys(("batch", "frame"), "*i8")
    types |= dict.fromkeys(("elapsed", "seconds"), "*i32")
    types |= dict.fromkeys(("copies", "num_types", "num_channels", "num_platforms"), "i32")
    types |= {"rows": "i32", "num_frames": "i32", "eps": "fp32"}
    shape = {**launches.tile(num_features, [4, 16, 8], 64, 32), "FACTOR": getattr(tl, factor), "given": None}
    return types, {**shape, "PRECISION": "ieee" if factor == "bfloat16" else "tf32"}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "num_features"), [*((kind, count) for kind in ("16", "32") for count in LAYOUTS), ("exact", 50)]
)
def test_shipped_configurations_spill_no_registers(kind, num_features):
    from kernels.film_tokenizer import device_code, launches
    from tests.kernel_resources import resources

    types, shape = _compilation(num_features, "bfloat16" if kind == "16" else "float32")
    shape |= {"PRECISION": "ieee"} if kind == "exact" else {}
    calls = [(device_code.forward, launches.FORWARD[kind], {})]
    shipped = launches.BACKWARD[kind].default((9, 0))
    calls += [(device_code.backward, launches.BACKWARD[kind], part) for part in launches.passes(shipped)]
    for kernel, of_kernel, part in calls:
        config = of_kernel.default((9, 0))
        warps, programs = config["num_warps"], config["programs"]
        options = {"maxnreg": config["maxnreg"]} if "maxnreg" in config else {}
        constants = {**shape, **part, "ROWS": config["ROWS"], "towards_rows": None}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        needs = resources(kernel, types, constants, num_warps=warps, num_stages=launches.NUM_STAGES, **options)
        assert needs["stack"] == 0
        # All programs that the configuration asks of a multiprocessor run at once.
        assert programs * 32 * warps * needs["registers"] <= 65_536 and programs * needs["shared"] <= 227 * 1024


@needs_triton
@pytest.mark.slow
def test_rows_beyond_two_to_the_31_are_reached():
    """Every address in what grows with rows starts from an offset of 64 bits."""
    from kernels.film_tokenizer import device_code, launches
    from tests.kernel_resources import compiled

    types, shape = _compilation(50, "bfloat16")
    parts = {"PROJECTS": True, "EXPANDS": True, "ROWS": 16}
    for kernel, constants in ((device_code.forward, {"ROWS": 16}), (device_code.backward, parts)):
        code = compiled(kernel, types, {**shape, **constants}, num_warps=4, num_stages=launches.NUM_STAGES).asm["ttir"]
        names = ("gradient", "value", "tokens", "towards_rows", "type", "channel", "platform", *ROWWISE)
        for argument in set(names) & set(kernel.arg_names):
            uses = re.findall(rf"[^\n]*%{argument}[,) ][^\n]*", code[code.index("{", code.index("tt.func")) :])
            assert uses, argument
            assert all(re.search(rf"tt\.addptr %{argument}, %\w+ : !tt\.ptr<\w+>, i64", use) for use in uses), uses
