"""Processes of a fork server, which must not outlive the one that asked for them."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent(*_) -> None:
    """Ends this process as soon as the one that started it is gone, however that ended.

    The system knows only the fork server as its parent, and that lives until the last of its processes ends.
    """
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
