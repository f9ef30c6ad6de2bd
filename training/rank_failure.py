"""Why the ranks of a run failed: what each writes before it leaves, and the one text that a person reads of it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from training.command_line import RankFailed, is_user_error, sentence

SETTLING = 0.5  # seconds for the other ranks to write what they saw, once one has failed
WAITED = re.compile(r"timed out|timeout", re.IGNORECASE)
LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|remote process exited", re.IGNORECASE)
RESUME = "go on from its last checkpoint with resume=<output folder>"


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank writes where it is, when it is asked by SIGUSR1 or dies."""
    return folder / f"stack_{rank}"


def record(folder: Path, rank: int, error: BaseException) -> None:
    """Called by a rank, inside `except`: what went wrong, for `explain`."""
    repairable, communication = is_user_error(error), isinstance(error, RuntimeError)
    content = {
        "rank": rank,
        "sentence": sentence(error) if repairable else None,
        "traceback": traceback.format_exc(),
        "waited": communication and bool(WAITED.search(str(error))),
        "lost": communication and bool(LOST.search(str(error))),
    }
    beside = folder / f".error_{rank}"
    beside.write_text(json.dumps(content))
    os.replace(beside, folder / f"error_{time.time_ns()}_{rank}")


def explain(ranks: Sequence, folder: Path) -> Exception:
    """The reason why processes of `ranks` ended with an exit code: ValueError where the user can repair it.

    An error of a rank's own comes first, then a kill from outside, then who waited for whom.
    """
    time.sleep(SETTLING)
    errors = [json.loads(path.read_text()) for path in sorted(folder.glob("error_*"))]
    for error in errors:
        if error["lost"] or error["waited"]:
            continue
        if error["sentence"] is not None:
            repairable = ValueError(error["sentence"])
            repairable.add_note(error["traceback"])  # where tracebacks are asked for
            return repairable
        return RankFailed(f"rank {error['rank']} of {len(ranks)} failed first:\n{error['traceback']}")
    for number, rank in enumerate(ranks):
        if (rank.exitcode or 0) < 0:
            return RankFailed(_killed(number, -rank.exitcode, len(ranks), folder))
    for error in errors:
        if error["waited"]:
            return RankFailed(_waiting(error, ranks, folder))
    for error in errors:
        return RankFailed(f"rank {error['rank']} of {len(ranks)} lost the others:\n{error['traceback']}")
    codes = ", ".join(f"rank {number}: {rank.exitcode}" for number, rank in enumerate(ranks) if rank.exitcode)
    return RankFailed(f"a rank ended without saying why (exit codes {codes}); {RESUME}")


def _killed(number: int, code: int, world: int, folder: Path) -> str:
    killed = f"rank {number} of {world} was killed by {signal.Signals(code).name}"
    if code == signal.SIGKILL:
        advice = "the machine may be out of memory: fewer ranks, or a smaller trainer.batch_size or model/size"
        return f"{killed} ({advice}); {RESUME}"
    stack = _stack(folder, number)
    return f"{killed}{f' at:{chr(10)}{stack}' if stack else f'; {RESUME}'}"


def _waiting(first: dict, ranks: Sequence, folder: Path) -> str:
    """Which rank waited where, and where those that kept it waiting are."""
    waited = f"rank {first['rank']} of {len(ranks)} waited in vain for the others (trainer.timeout) at:"
    lines = [waited, first["traceback"]]
    alive = [(number, rank) for number, rank in enumerate(ranks) if rank.exitcode is None]
    for _, rank in alive:
        os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(SETTLING)
    for number, _ in alive:
        if stack := _stack(folder, number):
            lines.append(f"rank {number} was at:\n{stack}")
    return "\n".join(lines)


def _stack(folder: Path, rank: int) -> str:
    """What a rank wrote of where it is, down to the function that it works on."""
    lines = stack_file(folder, rank).read_text().splitlines()
    ours = next((number for number, line in enumerate(lines) if line.endswith("in _run_rank")), len(lines))
    return "\n".join(lines[:ours])
