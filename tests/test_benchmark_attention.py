"""The benchmark of attention backends: refuses wrong numbers, names what it left out, keeps both devices' tables."""

import json

import pytest
import torch

from benchmarks import attention, measure
from benchmarks.attention import Shape, row_of
from models.attention.backends import choose_backend

CPU = torch.device("cpu")
SHAPES = [Shape(2, 2, 5, 7, 4), Shape(1, 1, 70, 9, 3, constant=True)]


@pytest.mark.parametrize("dtype", attention.DTYPES.values(), ids=attention.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_times_every_backend_and_names_what_auto_picks(shape, dtype):
    row = row_of(shape, CPU, dtype, torch.Generator().manual_seed(0), 2)
    assert list(row["seconds"]) == list(attention.BACKENDS["cpu"]) and not row["left_out"]
    query = torch.empty(shape.batch, shape.heads, shape.queries, shape.width, dtype=dtype)
    assert row["auto"] == choose_backend(query, shape.keys, constant_keys=shape.constant)
    assert row["ratio"] > 0 and row["best"] == min(row["seconds"], key=row["seconds"].get)


def test_wrong_numbers_are_not_timed(monkeypatch):
    exact = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda *a, **k: exact(*a, **k) * (1.01 if k["backend"] == "blockwise" else 1)
    )
    row = row_of(SHAPES[0], CPU, torch.float32, torch.Generator(), 1)
    assert row["left_out"]["blockwise"].startswith("wrong: error") and "blockwise" not in row["seconds"]
    assert "| - |" in attention.table([row], "cpu")


def test_tables_of_both_devices_stand_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setitem(attention.SHAPES, "cpu", SHAPES)
    measure.PAGE.write_text("<!-- attention -->\n<!-- end attention -->\n")
    output = tmp_path / "made.json"
    attention.main(["--device", "cpu", "--rounds", "1", "--dtypes", "float32", "--output", str(output)])
    found = json.loads(output.read_text())
    assert [row["shape"] for row in found["cpu"]["rows"]] == [str(shape) for shape in SHAPES]
    attention.main(["--publish", str(output)])
    page = measure.PAGE.read_text()
    assert page.count(attention.NOT_MEASURED) == len(attention.SHAPES["cuda"]) * len(attention.DTYPES)
    assert (
        str(SHAPES[1]) in page and "`python -m benchmarks attention --device cpu --rounds 1 --dtypes float32`" in page
    )
    attention.publish({"cuda": found["cpu"] | {"device": "one GPU", "rows": []}})
    page = measure.PAGE.read_text()
    assert "one GPU" in page and str(SHAPES[1]) in page and attention.NOT_MEASURED not in page
