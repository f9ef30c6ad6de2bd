"""The benchmark harness runs and reports what it measured. No assertion on time."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import lead_times, measure, perceiver, perceiver_ar
from benchmarks.cases import CASES
from benchmarks.peers import installed

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"batch": 2, "tokens": 40, "channels": 6, "latents": 4, "width": 16, "self_layers": 1, "widening": 2}


def small(name):
    return replace(CASES[name], **SMALL, queries=min(CASES[name].queries, 5))


def test_help_lists_every_benchmark():
    shown = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(f"  {name} " in shown.stdout for name in ("perceiver", "loader", "startup"))


@pytest.mark.parametrize("precision", perceiver.PRECISIONS)
@pytest.mark.parametrize("name", ["image_h8", "rep_h8"])
def test_a_case_reports_times_and_weights_of_ours(name, precision):
    row = perceiver.times(small(name), precision, [], rounds=1)
    assert row["parameters"]["ours"] == sum(p.numel() for p in perceiver.Ours(small(name)).parameters())
    assert row["cpu_ms"]["ours"] >= 0
    assert row["time_ratio"] == {}


@pytest.mark.parametrize("peer", ["krasserm", "lucidrains", "transformers"])
def test_peers_have_our_weights_and_outputs(peer):
    if not installed(peer):
        pytest.skip(f"{peer} is not installed")
    case = small("long_h1")
    row = perceiver.times(case, "float32", [peer], rounds=1)
    error = row["largest_error"][peer]
    assert error is None if peer == "lucidrains" else error <= perceiver.TOLERANCE


TINY_SEQUENCES = perceiver_ar.Case(
    prompt=20, latents=3, tokens=2, length=30, max_latents=10, width=16, layers=2, heads=2, vocabulary=7
)


@pytest.mark.parametrize("peers", [[], [perceiver_ar.PEER]], ids=["alone", "beside the peer"])
def test_sequences_are_trained_on_and_generated(peers):
    if peers and not installed(perceiver_ar.PEER):
        pytest.skip(f"{perceiver_ar.PEER} is not installed")
    trained = perceiver_ar.train(TINY_SEQUENCES, peers, rounds=1)
    generated = perceiver_ar.generation(TINY_SEQUENCES, peers, rounds=2)
    assert set(trained["cpu_ms"]) == set(generated["tokens_per_second"]) == {"ours", *peers}
    if peers:
        assert generated["largest_error"] <= perceiver_ar.TOLERANCE
    table = perceiver_ar.table([{"case": "train", **trained}, {"case": "generate", **generated}])
    assert "ms" in table.splitlines()[2] and "tokens/s" in table.splitlines()[3]


def test_the_full_cases_have_the_weights_of_the_published_comparison():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in perceiver.Ours(CASES[name]).parameters()) for name in ("rep_h8",)}
    assert counts == {"rep_h8": 4_149_780}  # krasserm's with the same arguments


def test_lead_times_are_measured_and_weigh_little(capsys):
    lead_times.main(["--context", "8", "--window", "4", "--frames", "2", "--rounds", "1", "--no-store"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["model"] for row in rows] == list(lead_times.MODELS)
    for row in rows:
        assert {"forward 1", "forward 12", "training 12"} <= set(row["cpu_ms"]) and 0 < row["film"] < 0.01 * row[
            "parameters"
        ]
    assert "forward 48" in rows[0]["cpu_ms"] and "forward 48" not in rows[1]["cpu_ms"]


def test_turns_are_taken_and_every_round_is_kept():
    order = []
    seconds = measure.paired_cpu_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3  # a warm-up, then two rounds
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_a_child_process_returns_or_fails_with_a_sentence():
    assert measure.in_child(lambda: {"bytes": measure.peak_rss_bytes()})["bytes"] > 2**20
    with pytest.raises(RuntimeError, match="child process failed"):
        measure.in_child(lambda: 1 / 0)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with one table, beside which results are stored."""
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measure, "PAGE", tmp_path / "performance.md")
    measure.PAGE.write_text("before\n<!-- startup -->\nold\n<!-- end startup -->\nafter\n")
    return measure.PAGE


def result(*rows, device="CPU", date="2026-01-01 10:00 UTC"):
    made = {"date": date, "command": "python -m benchmarks startup"}
    return {"device": device, "cores": 2, "versions": {}, "threads": 1, **made, "rows": [made | row for row in rows]}


def test_a_published_table_replaces_the_one_before_and_says_how_it_was_made(page):
    measure.publish("startup", result({"case": "a"}), measure.markdown(["a"], [["1"]]), store=True)
    made = "CPU, 2 cores, 2026-01-01: `python -m benchmarks startup`"
    assert (
        page.read_text() == f"before\n<!-- startup -->\n| a |\n| --- |\n| 1 |\n\n{made}\n<!-- end startup -->\nafter\n"
    )
    assert json.loads((page.parent / "results" / "startup.json").read_text()) == result({"case": "a"})


def test_rows_of_other_cases_stay_until_the_device_changes(page):
    first, again = {"case": "a", "ms": 1}, {"case": "a", "ms": 2}
    assert measure.merged("startup", result(first), key=("case",)) == result(first)  # nothing stored yet
    measure.publish("startup", result(first, {"case": "b", "ms": 5}), "", store=True)
    rows = measure.merged("startup", result(again), key=("case",))["rows"]
    assert [(row["case"], row["ms"]) for row in rows] == [("a", 2), ("b", 5)]
    other = result(again, device="another CPU")
    assert measure.merged("startup", other, key=("case",)) == other


def test_loader_sources_deliver_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path))
    from benchmarks import loader

    paths = loader.write_series(tmp_path, (150, 8, 12))
    ours = {name: loader.our_loader(paths[name], "none") for name in ("NetCDF", "Zarr")}
    first = [next(iter(one)).inputs["prognostic"].values for one in ours.values()]
    torch.testing.assert_close(*first)  # the same windows from both formats
    rates = loader.samples_per_second({name: one.__iter__ for name, one in ours.items()}, batches=1, rounds=1)
    assert set(rates) == {"NetCDF", "Zarr"} and all(rate > 0 for rate in rates.values())
