"""The HealDA benchmark runs, compares outputs and reports what it measured. No assertion on time."""

from dataclasses import replace

import torch

from benchmarks import healda_cpu
from models import build
from models.convert import SOURCES

TINY = replace(healda_cpu.CASES["A"], level=0, observations=(0, 30), theirs=(0,))


def test_a_case_compares_outputs_and_times_both(monkeypatch):
    monkeypatch.setattr(healda_cpu, "installed", lambda: False)
    rows = healda_cpu.rows_of(TINY, rounds=1)
    assert [(row["observations"], row["mode"]) for row in rows] == [(n, m) for n in (0, 30) for m in healda_cpu.MODES]
    assert [sorted(row["cpu_s"]) for row in rows] == [["loop", "ours"]] * 3 + [["ours"]]
    assert all(0 <= row["error"] <= healda_cpu.TOLERANCE for row in rows)
    shown = healda_cpu.table(rows).splitlines()
    assert len(shown) == 6 and shown[0].startswith("| case | observations | mode | ours, CPU s | loop, CPU s |")


def test_cases_have_the_published_weights():
    counts = {}
    for name, case in healda_cpu.CASES.items():
        with torch.device("meta"):
            model = build(SOURCES["physicsnemo"].overrides(case.config, {}), healda_cpu.layout_of(case))
        counts[name] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)
    assert counts == {"A": 3.09, "B": 3.16}


def test_a_slow_step_runs_once(monkeypatch):
    calls = {"slow": 0, "fast": 0}
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(healda_cpu.time, "process_time", lambda: next(clock))

    def step(name):
        def run():
            calls[name] += 1
            if name == "slow":
                next(clock)

        return run

    monkeypatch.setattr(healda_cpu, "SECONDS", 40.0)
    healda_cpu.cpu_seconds({name: step(name) for name in calls}, rounds=3)
    assert calls == {"slow": 1, "fast": 3}
