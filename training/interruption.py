"""Ctrl-C and SIGTERM during training: the step is finished and saved before the run ends."""

from __future__ import annotations

import signal
import threading


class Interruption:
    """Context in which the first of the two signals is only noted; the second one acts as it would without.

    asked: the signal's number, or None. Signals that the process ignores stay ignored; outside the main thread, where
    Python lets nobody listen, nothing changes.
    """

    def __init__(self):
        self.asked: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame) -> None:
        self.asked = number
        self.__exit__()

    def error(self) -> BaseException:
        """What ends the run: exit codes 130 and 143."""
        return SystemExit(143) if self.asked == signal.SIGTERM else KeyboardInterrupt()
