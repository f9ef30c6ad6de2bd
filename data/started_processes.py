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
    """For a process that works for another one.

    Ctrl-C and a scheduler's SIGTERM reach the whole group, and it is the other one that finishes its step and saves,
    for which it needs this one. Only the other one's own SIGTERM ends this one: at its exit `multiprocessing` sends it
    to the workers that a loader still holds, and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any thread, which inherits it
    end_with_parent()
    threading.Thread(target=_end_when_parent_says_so, daemon=True).start()


def _end_when_parent_says_so() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
