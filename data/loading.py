"""Batches in a reproducible order, prepared ahead in worker processes, resumable at any sample."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.batch import Batch
from data.started_processes import serve_until_parent_ends, started_to_serve


@dataclass(frozen=True)
class SampleOrder:
    """An endless stream of sample numbers: one permutation of `size` an epoch, drawn from (seed, epoch).

    Sample n of the stream depends on nothing but n, so a position is all that resuming needs.
    """

    size: int
    seed: int

    def draw(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: samples number start to stop - 1 of the stream."""
        epochs = range(start // self.size, (stop - 1) // self.size + 1)
        stream = np.concatenate([np.random.default_rng((self.seed, epoch)).permutation(self.size) for epoch in epochs])
        first = epochs[0] * self.size
        return stream[start - first : stop - first]


class _Plan:
    """Which samples go into which batch, from a position on; one pass (shuffle off) or endless."""

    def __init__(self, size: int, batch_size: int, shuffle: bool, seed: int, rank: int, world: int):
        self.size, self.batch_size, self.shuffle, self.rank, self.world = size, batch_size, shuffle, rank, world
        self.order = SampleOrder(size, seed)
        self.position = 0

    @property
    def stride(self) -> int:
        """Samples that one batch of all ranks takes."""
        return self.batch_size * self.world

    def __iter__(self) -> Iterator[np.ndarray]:
        start = self.position
        while self.shuffle or start < self.size:
            first = start + self.rank * self.batch_size
            stop = first + self.batch_size
            if self.shuffle:
                yield self.order.draw(first, stop)
            elif first < self.size:
                yield np.arange(first, min(stop, self.size))
            start += self.stride


class _Worker:
    """What runs in a worker process: a dataset whose batches travel as a plain list of tensors.

    Grids, variables and the layout are the same in every batch: the consumer has them already.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, indices: np.ndarray) -> list[Tensor] | Exception:
        try:
            tensors: list[Tensor] = []
            self.dataset.__getitems__(indices).map(lambda tensor: tensors.append(tensor) or tensor)
            return tensors
        except (ValueError, OSError) as error:
            return error  # raised in the training process, as the one sentence it is


def _unchanged(item):
    return item


class SharedFrames:
    """A dataset whose batches hold frames first .. first + count - 1 of each window only.

    dataset: of analyses, with `frames_of(indices, first, count) -> Batch`, which reads no others where it can.
    """

    def __init__(self, dataset, first: int, count: int):
        self.dataset, self.first, self.count = dataset, first, count
        self.data, self.layout = dataset.data, dataset.layout

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: np.ndarray) -> Batch:
        return self.dataset.frames_of(indices, self.first, self.count)


class BatchLoader:
    """Iterates over the batches of a dataset (`__len__`, `__getitems__(indices) -> Batch`).

    batch_size: samples a batch on this rank. shuffle: True for training (endless, a new permutation every epoch,
    batches run across epochs), False for one pass in order (the last batch may be smaller); every `iter` of a pass
    starts anew.
    position: samples drawn so far by all ranks; a training loader continues from it exactly, with any num_workers.
    num_workers: processes (forkserver) that prepare batches ahead; None takes the data's, 0 prepares in this process.
    pin: batches in page-locked memory, for copies to a GPU beside its work.
    fake: repeat the first batch, which shows what loading costs. rank, world: this rank reads its own part of each
    global batch. `waited` counts the seconds the consumer spent waiting for batches.
    """

    def __init__(
        self,
        dataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        position: int = 0,
        num_workers: int | None = None,
        fake: bool | None = None,
        pin: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"trainer.batch_size={batch_size} must be at least 1")
        assert 0 <= rank < world
        self.dataset, self.shuffle = dataset, shuffle
        self.num_workers = dataset.data.num_workers if num_workers is None else num_workers
        self.fake = dataset.data.fake if fake is None else fake
        self.pin, self.waited = pin, 0.0
        self._plan = _Plan(len(dataset), batch_size, shuffle, seed, rank, world)
        self._position = position
        self._template: Batch | None = None
        self._loader: DataLoader | None = None

    @property
    def position(self) -> int:
        """Samples drawn by the consumer, over all ranks (batches prepared ahead do not count)."""
        return self._position

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a recorded position from the next `iter` on."""
        self._position = int(state["position"])

    def __len__(self) -> int:
        """Batches of one pass (of one epoch, rounded up, when shuffled)."""
        return -(-len(self.dataset) // self._plan.stride)

    def __iter__(self) -> Iterator[Batch]:
        if not self.shuffle:
            self._position = 0
        self._plan.position = self._position
        batches = self._prepared() if self.num_workers else map(self._read, self._plan)
        if self.fake:
            first = next(batches)
            batches = (first for _ in self._plan)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            self._position += self._plan.stride
            yield batch

    def _read(self, indices: np.ndarray) -> Batch:
        batch = self.dataset.__getitems__(indices)
        return batch.pin_memory() if self.pin else batch

    def _prepared(self) -> Iterator[Batch]:
        """Batches from worker processes, in order."""
        if self._template is None:
            self._template = self.dataset.__getitems__([0])
        if self._loader is None:
            # A forked process inherits locks of HDF5 and of thread pools; forkserver starts clean. The server imports
            # torch once, and every worker starts from it.
            processes = multiprocessing.get_context("forkserver")
            processes.set_forkserver_preload(["data.loading", type(self.dataset).__module__])
            self._loader = DataLoader(
                _Worker(self.dataset),
                batch_sampler=self._plan,
                collate_fn=_unchanged,
                num_workers=self.num_workers,
                multiprocessing_context=processes,
                worker_init_fn=serve_until_parent_ends,
                persistent_workers=True,
                pin_memory=self.pin,
                # Its own generator: drawing worker seeds must not disturb the model's random numbers.
                generator=torch.Generator(),
            )
        for tensors in started_to_serve(lambda: iter(self._loader)):
            if isinstance(tensors, Exception):
                raise tensors
            remaining = iter(tensors)
            yield self._template.map(lambda _, remaining=remaining: next(remaining))
