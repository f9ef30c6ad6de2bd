"""The order of batches: seeded, resumable, the same with and without worker processes and split over ranks."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_data import write

from data.datasets.forecast import ForecastDataset
from data.datasets.gridded import GriddedData
from data.loading import BatchLoader, SampleOrder
from data.normalisation import Normalisation


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("loading") / "a.nc")
    data = GriddedData(str(path), split={"train": 0.6, "validation": 0.2, "test": 0.2}, cache="none")
    normalisation = Normalisation.fit(data, lead_steps=(1, 2))
    return ForecastDataset(data, "train", normalisation, input_frames=2, lead_steps=(1, 2))


def take(loader, count=None):
    """Base times of the next batches: (B,) lists."""
    return [batch.base_time.tolist() for batch in itertools.islice(loader, count)]


def tensors_of(batch):
    found = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def test_every_epoch_is_a_new_permutation_drawn_from_the_seed():
    order = SampleOrder(10, seed=3)
    stream = order.draw(0, 40)
    epochs = stream.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    np.testing.assert_array_equal(order.draw(7, 33), stream[7:33])
    assert (SampleOrder(10, seed=4).draw(0, 40) != stream).any()


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_resumed_loader_continues_exactly(dataset, cut):
    options = {"batch_size": 8, "seed": 5}
    whole = take(BatchLoader(dataset, **options), 12)
    first = BatchLoader(dataset, **options)
    assert take(first, cut) == whole[:cut]
    state = first.state_dict()
    assert state == {"position": cut * 8}
    again = BatchLoader(dataset, **options)
    again.load_state_dict(state)
    assert take(again, 12 - cut) == whole[cut:]
    assert take(BatchLoader(dataset, **options, position=cut * 8), 12 - cut) == whole[cut:]


def test_worker_processes_change_nothing(dataset):
    options = {"batch_size": 8, "seed": 5, "position": 16}
    generator = torch.get_rng_state()
    with_workers = BatchLoader(dataset, **options, num_workers=2)
    plain = BatchLoader(dataset, **options)
    for ours, expected in itertools.islice(zip(with_workers, plain, strict=False), 6):
        for a, b in zip(tensors_of(ours), tensors_of(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert ours.layout is expected.layout
    assert with_workers.position == plain.position == 16 + 6 * 8
    assert torch.equal(torch.get_rng_state(), generator)
    # Batches prepared ahead do not count: a resumed loader draws them again.
    resumed = BatchLoader(dataset, **(options | with_workers.state_dict()), num_workers=1)
    assert take(resumed, 1) == take(plain, 1)


def test_workers_do_one_pass_as_often_as_asked(dataset):
    loader = BatchLoader(dataset, batch_size=9, shuffle=False, num_workers=1)
    expected = take(BatchLoader(dataset, batch_size=9, shuffle=False))
    assert take(loader) == expected and take(loader) == expected


class Broken(ForecastDataset):
    def __getitems__(self, indices):
        if len(indices) > 1:
            raise OSError("cannot read 't2m' from a.nc; copy it again")
        return super().__getitems__(indices)


def test_an_error_in_a_worker_is_the_same_sentence(dataset):
    broken = Broken(dataset.data, "train", dataset.normalisation, input_frames=2, lead_steps=(1, 2))
    with pytest.raises(OSError) as error:
        take(BatchLoader(broken, batch_size=4, num_workers=1), 1)
    assert str(error.value) == "cannot read 't2m' from a.nc; copy it again"


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_one_pass_sees_every_sample_once_in_order(dataset, batch_size):
    loader = BatchLoader(dataset, batch_size=batch_size, shuffle=False)
    for _ in range(2):
        batches = take(loader)
        assert len(batches) == len(loader)
        assert list(itertools.chain.from_iterable(batches)) == dataset.data.times[dataset.base_indices].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_what_one_process_would_read(dataset, shuffle):
    whole = take(BatchLoader(dataset, batch_size=8, seed=2, shuffle=shuffle), 6)
    parts = [
        take(BatchLoader(dataset, batch_size=4, seed=2, shuffle=shuffle, rank=rank, world=2), 6) for rank in (0, 1)
    ]
    joined = [a + b for a, b in itertools.zip_longest(*parts, fillvalue=[])]
    assert joined == whole


def test_fake_repeats_the_first_batch_and_still_counts(dataset):
    loader = BatchLoader(dataset, batch_size=8, seed=1, fake=True)
    first, *others = itertools.islice(loader, 4)
    assert all(batch is first for batch in others) and loader.position == 32
    passes = BatchLoader(dataset, batch_size=8, shuffle=False, fake=True)
    assert len(list(passes)) == len(passes)


def test_the_time_spent_waiting_is_measured(dataset, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("data.loading.time.perf_counter", lambda: float(next(ticks)))
    loader = BatchLoader(dataset, batch_size=8)
    take(loader, 5)
    assert loader.waited == 5.0


def test_an_empty_batch_is_refused(dataset):
    with pytest.raises(ValueError, match=r"trainer\.batch_size=0 must be at least 1"):
        BatchLoader(dataset, batch_size=0)


HELD = """
import os, sys
from torch.utils.data import DataLoader
from data.started_processes import serve_until_parent_ends, started_to_serve


class Numbers:
    def __setstate__(self, state):  # threads of libraries that come with the data, before any setting of signals
        import threading, time

        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()

    def __getstate__(self):
        return {"size": 8}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


if __name__ == "__main__":
    loader = DataLoader(
        Numbers(), num_workers=1, persistent_workers=True, multiprocessing_context="forkserver",
        worker_init_fn=serve_until_parent_ends,
    )
    sys.held = started_to_serve(lambda: iter(loader))
    next(sys.held)
    (worker,) = sys.held._workers
    os.system(f"kill -TERM {worker.pid}; kill -INT {worker.pid}")
    next(sys.held)
    worker.join(timeout=1)
    print("alive" if worker.is_alive() else "gone")
"""


def test_workers_of_a_loader_still_held_at_exit_end_with_it(tmp_path):
    """Signals of others leave them be; without a sound end the process would wait for them forever."""
    (tmp_path / "held.py").write_text(HELD)
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, tmp_path / "held.py"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.split() == ["alive"], run.stderr
    assert run.returncode == 0
