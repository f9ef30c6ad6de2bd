"""Processes of a fork server, which must not outlive the one that asked for them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TypeVar

T = TypeVar("T")


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, however that ended.

    The system knows only the fork server as its parent, and that lives until the last of its processes ends.
    """
    threading.Thread(target=_follow_parent, daemon=True).start()


def serve_until_parent_ends(*_) -> None:
    """For a process that works for another one, which starts it within `started_to_serve`.

    Ctrl-C and a scheduler's SIGTERM reach the whole group, and it is the other one that finishes its step and saves,
    for which it needs this one.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def started_to_serve(start: Callable[[], T]) -> T:
    """What `start` returns; the processes that it starts are killed at the exit of this one.

    `multiprocessing` would ask them to end by SIGTERM, which they leave to others, and wait for them.
    """
    before = set(multiprocessing.active_children())
    started = start()
    for process in set(multiprocessing.active_children()) - before:
        multiprocessing.util.Finalize(None, _kill, args=(process,), exitpriority=1)  # before that waiting
    return started


def _kill(process: BaseProcess) -> None:
    if process.is_alive():
        process.kill()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
