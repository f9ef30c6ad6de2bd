"""The progress bar of a run: loss, samples a second and the time left."""

from __future__ import annotations

import sys
import threading
import time


class ProgressBar:
    """A tqdm bar over steps. samples: windows a step. Off a terminal it draws only now and then."""

    def __init__(self, first: int, total: int, *, samples: int, shown: bool):
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own spans processes, and a killed one would leave a semaphore behind
        self._samples, self._steps, self._started = samples, 0, time.perf_counter()
        self._validation = ""
        self._bar = tqdm(
            initial=first,
            total=total,
            disable=not shown,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
            bar_format="{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, left {remaining}]{postfix}",
        )

    def update(self, metrics: dict[str, float]) -> None:
        if "val/loss" in metrics:
            self._validation = f"validation {metrics['val/loss']:.4f}, "
        self._steps += 1
        rate = self._steps * self._samples / max(time.perf_counter() - self._started, 1e-9)
        text = f"loss {metrics['train/loss']:.4f}, {self._validation}{rate:.0f} samples/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
