"""The benchmark of kernels: needs little, refuses wrong numbers before it times anything, and says what it left out."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import kernel_cases, kernel_norms, kernel_peer, kernels, measure
from benchmarks.kernel_blocks import block_case, disk_case, floors
from benchmarks.kernel_cases import BOTH, FORWARD, OURS, Case, Setting
from benchmarks.kernel_step import STEP, TARGET, batch_of, fitting, layer_costs, layout_of, model_of, step_case
from benchmarks.roofline import Rates, largest_error, poisoned

ROOT = measure.ROOT
CPU = torch.device("cpu")
RATES = Rates(copy=1e10, matrix=1e11)
ABSENT = [
    "hydra",
    "omegaconf",
    "xarray",
    "pandas",
    "scipy",
    "yaml",
    "mlflow",
    "netCDF4",
    "zarr",
    "matplotlib",
    "sklearn",
]
ABSENT += ["safetensors", "jaxtyping", "timm", "warp", "earth2grid", "torchvision", "packaging", "requests"]
GRID = {"frames": 2, "places": 12}
BLOCK = {**GRID, "hidden": 32, "heads": 2, "queries": 32, "rows": 40}
TINY = [
    Case(
        "pixels", {"cells": 9, "rows": 60, "heads": 4, "groups": 2, "counts": "heavy-tailed"}, kernel_cases.pixel_case
    ),
    Case("film", {"rows": 60, "features": 30}, kernel_cases.film_case),
    Case("film", {"rows": 60, "features": 50}, kernel_cases.film_case),
    Case("sort", {"cells": 7, "rows": 100}, kernel_cases.sort_case),
    Case("norm", {**GRID, "hidden": 8, "kernel": "modulated_norm"}, kernel_norms.norm_case),
    Case("gated", {**GRID, "hidden": 8, "kernel": "gated"}, kernel_norms.norm_case),
    Case("gated norm", {**GRID, "hidden": 8, "kernel": "gated_norm"}, kernel_norms.norm_case),
    Case("head norm", {**GRID, "heads": 2, "width": 4}, kernel_norms.head_norm_case),
    Case("temporal", {**GRID, "heads": 2, "width": 4}, kernel_cases.temporal_case),
    Case("disk", {"frames": 2, "level": 3, "heads": 2, "width": 4}, disk_case),
    Case("block", {**BLOCK, "compiled": "eager"}, block_case),
    Case("step", {**BLOCK, "layers": 2, "variables": 3}, step_case),
]


@pytest.fixture
def setting():
    return Setting(CPU, torch.float32, torch.Generator().manual_seed(0), theirs=False, loops=True)


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.what}-{case.shape.get('features', '')}")
def test_a_case_compares_with_float64_and_times_every_mode(case, setting):
    rows = kernels.rows_of(case, setting, RATES, 1, "no peer")
    assert [row["mode"] for row in rows] == {"sort": [FORWARD], "step": [BOTH]}.get(case.what, [FORWARD, BOTH])
    for row in rows:
        assert OURS in row["seconds"]
        assert all(0 <= error <= 1e-5 for error in row["errors"].values())
        assert row["floor_s"] > 0 and row["bytes"] > 0
        shown = {"disk": "x (dense)"}.get(case.what, "computes no 50" if 50 in case.shape.values() else "no peer")
        assert shown in kernels.table([row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.what}-{case.shape.get('features', '')}")
def test_on_a_gpu_every_kernel_agrees_with_float64(case, dtype, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_AUTOTUNE", "0")
    random = torch.Generator("cuda").manual_seed(0)
    rows = kernels.rows_of(case, Setting(random.device, dtype, random, theirs=False, loops=False), RATES, 1, "no peer")
    assert rows and all("skipped" not in row and OURS in row["seconds"] for row in rows), rows


@pytest.mark.parametrize(
    "harm", [lambda result: result * 1.01, lambda result: result.masked_fill(result > 3, math.nan)]
)
def test_wrong_numbers_are_not_timed(harm, setting, monkeypatch):
    exact = kernel_norms.modulated_norm
    harmed = lambda *parts, path="auto": exact(*parts, path=path) if path == "reference" else harm(exact(*parts))  # noqa: E731
    monkeypatch.setattr(kernel_norms, "modulated_norm", harmed)
    monkeypatch.setattr(kernels, "paired_seconds", lambda *_, **__: pytest.fail("timed"))
    case = replace(TINY[4], shape={"frames": 2, "places": 400, "hidden": 8, "kernel": "modulated_norm"})
    (row,) = kernels.rows_of(case, setting, RATES, 1, "")
    assert row["skipped"].startswith("wrong: error") and "seconds" not in row
    assert row["skipped"] in kernels.table([row])


def test_a_peer_that_fails_costs_no_numbers_of_ours(setting, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(kernel_peer, "gated", refuse)
    rows = kernels.rows_of(TINY[5], replace(setting, theirs=True), RATES, 1, "")
    assert [list(row["seconds"]) for row in rows] == [[OURS, kernel_cases.LOOP]] * 2
    assert rows[0]["absent"] == "failed beside physicsnemo: RuntimeError: no such kernel"
    monkeypatch.setattr(kernel_norms, "gated", refuse)
    (row,) = kernels.rows_of(TINY[5], setting, RATES, 1, "")
    assert row["skipped"] == "failed: RuntimeError: no such kernel"


def test_wrong_rows_of_a_sort_are_seen(setting, monkeypatch):
    exact = kernel_cases.sort_and_pack

    def swapped(cell, cells, path="auto"):
        order, offsets = exact(cell, cells, path=path)
        return (order if path == "reference" else order.flip(0)), offsets

    monkeypatch.setattr(kernel_cases, "sort_and_pack", swapped)
    assert kernel_cases.sort_case(setting, cells=7, rows=100).errors[OURS] == math.inf


def test_a_case_that_does_not_fit_says_what_it_needs(setting):
    (row,) = kernels.rows_of(replace(TINY[3], needs=2.0**60), setting, RATES, 1, "")
    assert row["skipped"].startswith("needs 1073741824 GiB, ")


def test_unwritten_memory_is_poisoned(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # as after a training loop
    deterministic = torch.are_deterministic_algorithms_enabled()
    with poisoned(CPU):
        assert torch.empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert math.isnan(largest_error([torch.tensor([1.0, math.nan])], [torch.ones(2)]))


def test_production_floors_are_those_of_the_arithmetic():
    """A block in bfloat16 at an H200's 4.3 TB/s and 790 TFLOP/s: 23 ms forward, 76 ms with backward."""
    setting = Setting(CPU, torch.bfloat16, torch.Generator(), theirs=False, loops=False)
    rates = Rates(copy=4.3e12, matrix=790e12)
    parts = floors(setting, 8, 12_288, 1536, 64, 31_000_000)
    assert rates.floor(parts[FORWARD]) == pytest.approx(22.97e-3, rel=0.02)
    assert rates.floor(parts[BOTH]) == pytest.approx(72.3e-3, rel=0.02)  # 4.15 ms below 76: projections absorbed


def test_the_step_is_that_of_the_preset(setting):
    """The model of the training step has the parameters of model=healda_v2 and its outputs under the same weights."""
    from models import build

    layout = layout_of(2, 1, 3)
    sizes = {"hidden": 32, "heads": 2, "queries": 4, "layers": 2}
    ours = model_of(layout, **sizes).eval()
    named = {"hidden": "hidden_size", "heads": "num_heads", "queries": "observation_heads", "layers": "depth"}
    overrides = [f"model.{named[name]}={size}" for name, size in sizes.items()]
    preset = build(["model=healda_v2", "model/size=production", "task.frames=2", *overrides], layout).eval()
    preset.load_state_dict(ours.state_dict())
    batch = batch_of(setting, layout, 50)
    torch.testing.assert_close(preset(batch)[TARGET], ours(batch)[TARGET])


def test_as_many_layers_are_measured_as_fit():
    case = Case(STEP, {"layers": 8}, step_case, needs=10.0, layer_needs=4.0)
    for free, layers in ((100, 8), (30, 5), (11, 1)):
        fits = fitting(case, free)
        assert fits.shape["layers"] == layers and fits.needs == 10 + 4 * layers
    rows = [{"what": STEP, "layers": n, "seconds": {OURS: 0.1 + 0.02 * n, "peer": 0.05 * n}} for n in (8, 3)]
    assert layer_costs(rows) == "One layer more adds to a training step: ours 20 ms, peer 50 ms."
    assert layer_costs(rows[:1]) == ""


def test_it_needs_torch_triton_einops_and_numpy_only(tmp_path):
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from benchmarks.__main__ import main\n"
    output = tmp_path / "found.json"
    options = ["kernels", "--only", "head_norm", "healda", "--rounds", "1", "--device", "cpu", "--output", str(output)]
    code += f"sys.exit(main({options!r}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(output.read_text())["cpu"]
    rows = found["rows"]
    assert found["command"] == "python -m benchmarks kernels --only head_norm healda --rounds 1 --device cpu"
    assert [row["mode"] for row in rows] == [FORWARD, BOTH, BOTH, BOTH] and all("seconds" in row for row in rows)


def test_what_another_machine_measured_is_published_beside_the_rest(tmp_path, monkeypatch):
    page, results = tmp_path / "page.md", tmp_path / "results"
    page.write_text("before\n<!-- kernels -->\n<!-- end kernels -->\nafter\n")
    monkeypatch.setattr(measure, "PAGE", page)
    monkeypatch.setattr(measure, "RESULTS", results)
    row = {
        "what": "gated",
        "shape": "1 row",
        "mode": FORWARD,
        "skipped": "needs 9 GiB, 1 GiB are free",
        "command": "made",
        "date": "2026-11-22 10:00 UTC",
    }
    result = {"device": "one CPU", "date": "2026-11-22", "command": "made", "threads": 1, "copy_rate": 1e9}
    result |= {"matrix_rate": 1e12, "versions": {}, "rows": [row]}
    kernels.publish({"cpu": result})
    assert page.read_text().count(kernels.NOT_MEASURED) == len(kernels.production())
    assert "needs 9 GiB" in page.read_text() and page.read_text().endswith("after\n")
    kernels.publish({"cpu": result | {"rows": [row | {"what": "no case any more"}]}})
    kernels.publish({"cpu": result | {"rows": [row | {"what": "sort_and_pack", "command": "made again"}]}})
    assert "no case any more" not in page.read_text()
    assert page.read_text().count("needs 9 GiB") == 2 and "`made`, `made again`" in page.read_text()
    kernels.publish({"cpu": result | {"rows": [row | {"shape": "2 rows"}]}})  # as of a case with fewer layers
    assert "| gated | 2 rows |" in page.read_text() and "| gated | 1 row |" not in page.read_text()
    assert "| sort_and_pack | 1 row |" in page.read_text()
    kernels.publish({"cuda": result | {"device": "one GPU"}})
    assert "one GPU" in page.read_text() and "one CPU" in page.read_text()
    assert kernels.NOT_MEASURED not in page.read_text()
    assert sorted(json.loads((results / "kernels.json").read_text())) == ["cpu", "cuda"]


def test_a_missing_peer_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(kernel_peer.VARIABLE, str(tmp_path))
    assert kernel_peer.VARIABLE in kernel_peer.absent()
