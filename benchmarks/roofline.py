"""What a device can do, measured, and how long steps take on it: copy bandwidth, matrix rate, paired times.

On a GPU, times are those of CUDA events; on a CPU, process CPU seconds (`benchmarks/measure.py` says why). Steps take
turns within a round, and the median counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

BURST = 0.02  # seconds of calls in a row that one time is taken of
POISON_SHARE = 0.25  # of a GPU's free memory


@dataclass(frozen=True)
class Rates:
    """copy: bytes/s, read and written, of a large copy. matrix: operations/s of a square product in the dtype."""

    copy: float
    matrix: float

    def floor(self, parts: list[tuple[float, float]]) -> float:
        """Seconds of (bytes, operations) that follow each other, each part overlapping its own traffic."""
        return sum(max(moved / self.copy, operations / self.matrix) for moved, operations in parts)


def timed(step: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one of several calls in a row: a GPU then works while the next call is prepared."""
    if device.type != "cuda":
        start = time.process_time()
        for _ in range(repeats):
            step()
        return (time.process_time() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000 / repeats


def paired_rounds(
    steps: dict[str, Callable[[], object]], device: torch.device, *, rounds: int, longest: float
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after a warm-up of each, in as many rounds as take about `longest` seconds.

    A step that alone takes longer than that runs once: on a CPU its warm-up counts, which compiles nothing there.
    """
    first, seconds = {}, {}
    for name, step in steps.items():
        first[name] = timed(step, device)
        if device.type == "cuda":
            first[name] = timed(step, device)
        seconds[name] = [first[name]] if first[name] > longest else []
    again = {name: step for name, step in steps.items() if not seconds[name]}
    repeats = {name: max(1, min(50, int(BURST / max(first[name], 1e-6)))) for name in again}
    one_round = sum(first[name] * repeats[name] for name in again)
    for _ in range(max(1, min(rounds, int(longest / one_round))) if again else 0):
        for name, step in again.items():
            seconds[name].append(timed(step, device, repeats[name]))
    return seconds


def paired_seconds(
    steps: dict[str, Callable[[], object]], device: torch.device, *, rounds: int, longest: float
) -> dict[str, float]:
    """Medians of `paired_rounds`."""
    seconds = paired_rounds(steps, device, rounds=rounds, longest=longest)
    return {name: median(values) for name, values in seconds.items()}


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Of this device, now."""
    numbers, side = (2**28, 8192) if device.type == "cuda" else (2**25, 1024)
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    steps = {"copy": lambda: target.copy_(source), "matrix": lambda: left @ right}
    seconds = paired_seconds(steps, device, rounds=9, longest=60.0)
    return Rates(copy=2 * 4 * numbers / seconds["copy"], matrix=2 * side**3 / seconds["matrix"])


@contextlib.contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Memory that is allocated inside and never written holds NaN.

    On a GPU because blocks full of NaN were handed back to the allocator, so that the kernels run as they always do; on
    a CPU because PyTorch fills what it allocates while deterministic algorithms are asked for.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        large = torch.full((int(free * POISON_SHARE) // 4,), torch.nan, device=device)
        small = [torch.full((2**18,), torch.nan, device=device) for _ in range(64)]  # the pool of small blocks
        del large, small
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a training loop of this process turns it off
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest number of each expected tensor; NaN where a found number is."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        error = ((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)).item()
        worst = error if not error <= worst else worst
    return worst


def free_bytes(device: torch.device) -> int:
    """Memory that a case may take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
