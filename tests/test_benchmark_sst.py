"""The benchmark of the monthly model: ours computes what its formula does, and the table says by how much faster."""

from benchmarks import sst


def test_ours_equals_the_formula_in_training(monkeypatch):
    monkeypatch.setattr(sst, "SIDE", 16)
    monkeypatch.setattr(sst, "DAYS", 5)
    assert sst.largest_error(months=2) < 1e-5


def test_table_compares_time_and_memory():
    row = {"months": 12, "mode": sst.MODES[1], "cpu_s": {"ours": 2.0, "formula": 3.0}, "ratio": 1.5}
    text = sst.table([row | {"peak_mb": {"ours": 50, "formula": 100}}, row])
    assert "| 12 | forward+backward | 2.00 | 3.00 | 1.50x | 50 | 100 | 50% |" in text
    assert "| 1.50x | - | - | - |" in text
