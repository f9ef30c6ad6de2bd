"""Where the time of a training step goes: `debug=profile` or `trainer.profile=true`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SKIPPED, MEASURED = 3, 5  # first steps allocate and compile; a few more are enough for a table


@contextmanager
def profiled(run_dir: Path, *, enabled: bool) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every step; at the end prints a table of operators and writes `trace.json`."""
    if not enabled:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

    def report(profiler) -> None:
        profiler.export_chrome_trace(str(run_dir / "trace.json"))
        print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))
        print(f"trace of {MEASURED} steps: {run_dir / 'trace.json'} (open in chrome://tracing or ui.perfetto.dev)")

    steps = schedule(wait=SKIPPED - 1, warmup=1, active=MEASURED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=report) as profiler:
        yield profiler.step
