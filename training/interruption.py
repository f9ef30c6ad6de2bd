"""Ctrl-C, SIGTERM and a scheduler's warning: what is under way is finished and saved before the run ends."""

from __future__ import annotations

import signal
import threading
import time
from typing import NoReturn

TOLD_TWICE = 1.0  # seconds: torchrun passes on a Ctrl-C that its processes have got already
WARNING = signal.SIGUSR2  # of a time limit or preemption; submitit listens and puts the job into the queue again


class Interruption:
    """Context in which the first signal is only noted; a second one, a second or more later, ends at once.

    asked: the signal's number, or None. Signals that the process ignores stay ignored, a warning that nobody listens to
    stays what it is, and outside the main thread, where Python lets nobody listen, nothing changes.
    """

    def __init__(self):
        self.asked: int | None = None
        self._when = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, WARNING):
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN and (number != WARNING or callable(before)):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.asked is None:
            self.asked, self._when = number, time.monotonic()
        elif number == WARNING:  # Slurm may send SIGTERM before it
            self.asked = number
        elif time.monotonic() - self._when > TOLD_TWICE:
            self.end()

    def end(self) -> NoReturn:
        """Ends the run: exit codes 130 and 143; after a warning whoever listened to it before decides."""
        if self.asked == WARNING:
            self._before[WARNING](WARNING, None)
            raise SystemExit(0)  # no failure, for which Slurm would end the task that talks to the queue
        raise KeyboardInterrupt if self.asked == signal.SIGINT else SystemExit(128 + signal.SIGTERM)
