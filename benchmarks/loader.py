"""Samples per second of the loader from RAM, memmap, NetCDF and Zarr against xbatcher: `python -m benchmarks loader`.

A seeded series is written once as NetCDF and as Zarr; a sample is a window of frames (two in, three lead times out),
drawn at random and normalised by ours, in file order and as read by xbatcher, stacked to batches by both. The sources
take turns. Then a small model trains on each source: the share of the step time that it waits for data.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.measure import command, environment, markdown, publish
from data.datasets.forecast import ForecastDataset
from data.datasets.gridded import GriddedData
from data.loading import BatchLoader
from data.normalisation import Normalisation

SHAPE = (1460, 48, 96)  # a year of 6-hourly frames, 3.75 degrees
LEADS, INPUT_FRAMES, BATCH = (1, 4, 12), 2, 32
TRAINING_BATCH = 4  # a step decodes every cell of three lead times; loading and computing grow alike with the batch
WORKERS = {"no worker": 0, "one worker": 1}  # processes that prepare batches ahead
SPLIT = {"train": 0.8, "validation": 0.1, "test": 0.1}
INSTALL = 'pip install "xbatcher>=0.4,<0.5" dask'


def write_series(folder: Path, shape: tuple[int, int, int]) -> dict[str, Path]:
    """A seeded float32 series of (time, latitude, longitude) as one NetCDF file and one Zarr store, a frame a chunk."""
    import xarray as xr

    frames, rows, columns = shape
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    coordinates = {
        "time": np.datetime64("2001-01-01", "ns") + np.arange(frames) * np.timedelta64(6, "h"),
        "lat": np.linspace(90, -90, rows, endpoint=False) - 90 / rows,
        "lon": np.arange(columns) * 360 / columns,
    }
    series = xr.Dataset({"t2m": (("time", "lat", "lon"), values, {"units": "K"})}, coords=coordinates)
    series["lat"].attrs["units"], series["lon"].attrs["units"] = "degrees_north", "degrees_east"
    paths = {"NetCDF": folder / "series.nc", "Zarr": folder / "series.zarr"}
    series.to_netcdf(paths["NetCDF"], encoding={"t2m": {"chunksizes": (1, rows, columns)}})
    series.to_zarr(paths["Zarr"], consolidated=False, encoding={"t2m": {"chunks": (1, rows, columns)}})
    return paths


def our_loader(path: Path, cache: str) -> BatchLoader:
    data = GriddedData(str(path), split=SPLIT, cache=cache)
    normalisation = Normalisation.fit(data, lead_steps=LEADS)
    dataset = ForecastDataset(data, "train", normalisation, input_frames=INPUT_FRAMES, lead_steps=LEADS)
    return BatchLoader(dataset, batch_size=BATCH, num_workers=0)


def xbatcher_batches(path: Path) -> Iterator[torch.Tensor]:
    """Batches of the same windows by xbatcher, in file order, again and again."""
    import xarray as xr
    import xbatcher

    opened = xr.open_zarr(path, chunks=None, consolidated=False) if path.suffix == ".zarr" else xr.open_dataset(path)
    length = INPUT_FRAMES + max(LEADS)
    sizes = {"time": length, "lat": opened.sizes["lat"], "lon": opened.sizes["lon"]}
    generator = xbatcher.BatchGenerator(opened, input_dims=sizes, input_overlap={"time": length - 1})
    chosen = [*range(INPUT_FRAMES), *(INPUT_FRAMES - 1 + lead for lead in LEADS)]
    windows = (window["t2m"].isel(time=chosen).values for _ in iter(int, 1) for window in generator)
    while batch := list(islice(windows, BATCH)):
        yield torch.from_numpy(np.stack(batch))


def samples_per_second(sources: dict[str, Callable[[], Iterator]], *, batches: int, rounds: int) -> dict[str, float]:
    """Median over rounds in which the sources take turns, wall time (waiting for files counts)."""
    running = {name: iter(start()) for name, start in sources.items()}
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for batch in running.values():
        next(batch)  # opens files and fills caches
    for _ in range(rounds):
        for name, stream in running.items():
            started = time.perf_counter()
            for _ in islice(stream, batches):
                pass
            rates[name].append(batches * BATCH / (time.perf_counter() - started))
    return {name: median(values) for name, values in rates.items()}


def share_waiting(dataset: ForecastDataset, *, workers: int, steps: int) -> float:
    """Part of the time of training steps of a tiny model that it waits for batches."""
    from models import build

    loader = BatchLoader(dataset, batch_size=TRAINING_BATCH, num_workers=workers)
    model = build(["model/size=tiny"], dataset.layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches = iter(loader)
    next(batches)
    loader.waited, started = 0.0, time.perf_counter()
    for batch in islice(batches, steps):
        output = model(batch)
        loss = sum(model.head.loss(output[name], target)[0].sum() for name, target in batch.targets.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loader.waited / (time.perf_counter() - started)


def main(options: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks loader", description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", type=int, default=SHAPE[0])
    parser.add_argument("--batches", type=int, default=10, help="of 32 samples, a round and source")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="training steps a source")
    parser.add_argument("--no-store", action="store_true", help="print the table only")
    chosen = parser.parse_args(options)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYDRASPHERE_CACHE"] = folder
        paths = write_series(Path(folder), (chosen.frames, *SHAPE[1:]))
        loaders = {
            "RAM": our_loader(paths["NetCDF"], "ram"),
            "memmap": our_loader(paths["NetCDF"], "memmap"),
            "NetCDF": our_loader(paths["NetCDF"], "none"),
            "Zarr": our_loader(paths["Zarr"], "none"),
        }
        sources: dict[str, Callable[[], Iterator]] = {name: loader.__iter__ for name, loader in loaders.items()}
        try:
            import xbatcher  # noqa: F401
        except ImportError:
            print(f"xbatcher is not installed and left out; to compare with it: {INSTALL}")
        else:
            sources |= {f"xbatcher, {kind}": (lambda path=path: xbatcher_batches(path)) for kind, path in paths.items()}
        rates = samples_per_second(sources, batches=chosen.batches, rounds=chosen.rounds)
        waiting = {
            name: {label: share_waiting(loader.dataset, workers=n, steps=chosen.steps) for label, n in WORKERS.items()}
            for name, loader in loaders.items()
        }
    result = environment(("torch", "xarray", "netCDF4", "zarr", "xbatcher"))
    result |= {"command": command("loader", options), "shape": [chosen.frames, *SHAPE[1:]]}
    result |= {"samples_per_second": rates, "share_of_step_waiting": waiting}
    rows = [
        [name, f"{rate:.0f}", *(f"{waiting[name][label]:.1%}" if name in waiting else "-" for label in WORKERS)]
        for name, rate in rates.items()
    ]
    heads = ["source", "samples/s", *(f"step time spent waiting, {label}" for label in WORKERS)]
    publish("loader", result, markdown(heads, rows), store=not chosen.no_store)
