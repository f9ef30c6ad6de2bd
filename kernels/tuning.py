"""Launch configurations of Triton kernels: measured once a device, kept in a file, never waited for.

A configuration is a dict of integers: tile sizes, `num_warps`, `num_stages`. The one for a call is, in this order, what
this process knows; what the file of this device, kernel source and Triton version says; what measuring the candidates
says. Only the first rank writes the file (whole, then renamed into place); other ranks read what is there and measure
for themselves where it is not, so that no rank waits for another. Switched off (`trainer.autotune=false`; without a
configuration HYDRASPHERE_AUTOTUNE=0), nothing is measured and no file of measurements read: the default shipped for the
architecture holds (`kernels/defaults/*.json`), else the first candidate.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

Config = dict[str, int]
DEFAULTS = Path(__file__).parent / "defaults"
REPETITIONS = 5  # the fastest counts: disturbances only add time
_log = logging.getLogger(__name__)
_switched_on = True


class Tuning:
    """Configurations of one kernel.

    name: of the kernel in the files. candidates: the first is the default where nothing else is known. sources: files
    that hold the kernel; measurements of another text of them do not count.
    """

    def __init__(self, name: str, candidates: Sequence[Config], sources: Sequence[str | Path]):
        self.name, self.candidates = name, [dict(candidate) for candidate in candidates]
        self.sources = tuple(Path(source) for source in sources)
        self.known: dict[tuple[str, str], Config] = {}

    def config(self, key: Sequence[object], device: torch.device, launch: Callable[[Config], object]) -> Config:
        """The configuration for calls alike in `key` (dtypes, padded sizes, buckets of counts; no exact counts).

        launch: runs the kernel once with a configuration; may be called often, so it must not add to its outputs.
        """
        if device.type != "cuda":
            return self.candidates[0]
        name = device_name(device)
        entry = (name, ",".join(map(str, key)))
        if entry not in self.known:
            self.known[entry] = self._found(name, entry[1], device, launch)
        return self.known[entry]

    def default(self, capability: tuple[int, int], key: str = "any") -> Config:
        """What holds where nothing is measured, on devices of a compute capability."""
        of_kernel = shipped(capability).get(self.name, {})
        return of_kernel.get(key, of_kernel.get("any", self.candidates[0]))

    def _found(self, device_name: str, key: str, device: torch.device, launch: Callable[[Config], object]) -> Config:
        # A graph under capture cannot be measured; an unmeasured choice is not kept in any file.
        if not enabled() or torch.cuda.is_current_stream_capturing():
            return self.default(torch.cuda.get_device_capability(device), key)
        path = self.path(device_name)
        stored = _read(path).get(key)
        if stored is not None and stored["config"] in self.candidates:
            return stored["config"]
        times = [(_milliseconds(launch, candidate, device), index) for index, candidate in enumerate(self.candidates)]
        best, index = min(times)
        if best == float("inf"):
            raise RuntimeError(f"no configuration of kernel {self.name} runs on {device_name} for {key}")
        chosen = self.candidates[index]
        if is_first_rank():
            _store(path, key, {"config": chosen, "milliseconds": best})
        return chosen

    def path(self, device_name: str) -> Path:
        """One file a device and kernel source."""
        return cache_folder() / "kernels" / device_name / f"{self.name}-{self.version()}.json"

    @cache  # noqa: B019 - a handful of kernels live as long as the process
    def version(self) -> str:
        """Hash of the kernel's source and of Triton's version."""
        import triton

        text = hashlib.sha256(triton.__version__.encode())
        for source in self.sources:
            text.update(source.read_bytes())
        return text.hexdigest()[:12]


def switch(measuring: bool) -> None:
    """Whether this process measures configurations from here on, where HYDRASPHERE_AUTOTUNE does not forbid it."""
    global _switched_on
    _switched_on = measuring


def enabled() -> bool:
    """Whether configurations are measured: unless `switch`ed off or HYDRASPHERE_AUTOTUNE is 0."""
    value = os.environ.get("HYDRASPHERE_AUTOTUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"HYDRASPHERE_AUTOTUNE={value!r} is neither 0 nor 1; set it to 0 to measure nothing")
    return _switched_on and value == "1"


def is_first_rank() -> bool:
    """Asked before process groups may exist, so launchers' variables count too."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID"))


def cache_folder() -> Path:
    return Path(os.environ.get("HYDRASPHERE_CACHE") or Path.home() / ".cache" / "hydrasphere").expanduser()


def device_name(device: torch.device) -> str:
    """`NVIDIA H200` -> nvidia_h200."""
    return _slug(torch.cuda.get_device_name(device))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@cache
def shipped(capability: tuple[int, int]) -> dict[str, dict[str, Config]]:
    """Kernel -> key, or `any` -> configuration, where it is not the kernel's first candidate."""
    for path in sorted(DEFAULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if tuple(content["capability"]) == capability:
            return content["configurations"]
    return {}


def _read(path: Path) -> dict[str, dict]:
    """A file that is missing or damaged is as good as none: it is measured and written again."""
    try:
        content = json.loads(path.read_text())
        return {key: entry for key, entry in content.items() if isinstance(entry, dict) and "config" in entry}
    except (OSError, ValueError, AttributeError):
        return {}


def _store(path: Path, key: str, entry: dict) -> None:
    content = {**_read(path), key: entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(file.name, path)  # a reader sees the old file or the new one
    except OSError as error:
        _log.warning("configurations of kernels are not kept: %s", error)


def _milliseconds(launch: Callable[[Config], object], config: Config, device: torch.device) -> float:
    """Fastest of some runs; infinite where the configuration needs more than the device has."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        launch(config)  # compiles
    except (OutOfResources, PTXASError):
        return float("inf")
    with torch.cuda.device(device):
        times = []
        for _ in range(REPETITIONS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launch(config)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return min(times)
