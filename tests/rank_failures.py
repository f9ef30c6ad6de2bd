"""What tests let ranks do to fail: functions of an importable module, since ranks are other processes."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from training.ranks import Ranks


def described(ranks: Ranks) -> list[dict]:
    """What every rank knows of itself."""
    known = {
        "rank": ranks.rank,
        "parts": (ranks.sample_part, ranks.frame_part),
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "variable": os.environ.get("OF_THE_LAUNCHER"),
        "folder": os.getcwd(),
    }
    everyone = [None] * ranks.world
    dist.all_gather_object(everyone, known)
    return everyone


def unpicklable_bug(ranks: Ranks) -> None:
    """A bug on rank 1, whose error cannot travel; the others wait for that rank."""
    if ranks.rank == 1:
        raise type("Local", (Exception,), {})("the bug itself")
    ranks.wait_for_all()


def wrong_setting(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("x=3 is too large;\nuse x=2")
    ranks.wait_for_all()


def missing_file(ranks: Ranks) -> None:
    if ranks.rank == 1:
        Path("/nowhere/at-all").read_text()
    ranks.wait_for_all()


def killed(ranks: Ranks, number: int) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), number)
    ranks.wait_for_all()


def silent_exit(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(7)
    ranks.wait_for_all()


def left_waiting(ranks: Ranks) -> None:
    """Rank 1 never comes to the exchange that the others wait in."""
    if ranks.rank == 1:
        stay_away()
    dist.all_to_all_single(torch.empty(2), torch.ones(2), group=ranks.devices["cp"].get_group())


def stay_away() -> None:
    time.sleep(1000)


def warn(ranks: Ranks) -> str:
    """Says whether the fork server had imported what training needs: this module does not."""
    warnings.warn("said by a library", stacklevel=1)
    ranks.wait_for_all()
    return f"imported before: {'training.run' in sys.modules}"


def wait_long(ranks: Ranks, message: str) -> None:
    """Says on the first rank that all have joined, then waits."""
    ranks.wait_for_all()
    if ranks.is_first:
        print(message, file=sys.stderr, flush=True)
    signal.pause()
