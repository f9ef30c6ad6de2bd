"""Processes of a fork server, which must not outlive the one that asked for them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, however that ended.

    The system knows only the fork server as its parent, and that lives until the last of its processes ends.
    """
    threading.Thread(target=_follow_parent, daemon=True).start()


def serve_until_parent_ends(*_) -> None:
    """For a process that works for another one. Ctrl-C and a scheduler's SIGTERM reach the whole group, and it is the
    other one that finishes its step and saves, for which it needs this one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
