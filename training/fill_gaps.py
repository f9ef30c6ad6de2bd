"""Fills the gaps of files with a trained model: frames and means of months, in a NetCDF file or a Zarr store.

python -m training.fill_gaps outputs/<day>/<run> filled.zarr
python -m training.fill_gaps outputs/<day>/<run> filled.nc --path 'sst_*.nc'
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.datasets.gridded import GriddedData
from evaluation.fill_gaps import Filler, fill_gaps
from evaluation.gap_file import check_ending
from evaluation.run_folder import RunFolder
from evaluation.stacking import Stacking
from training.checkpoints import read_normalisation
from training.command_line import TRACEBACKS, fail, is_user_error, sentence
from training.tasks.reconstruct import ReconstructTask


def filler_of(run: RunFolder, *, checkpoint: str = "best", path: str | None = None) -> Filler:
    """The model of a run with the series of its data, or of other files of the same variables on the same grid.

    Raises ValueError where the run is of another task, and where the files are not what its model reads.
    """
    task, data, folder = run.task(), run.data(), run.checkpoint(checkpoint)
    if not isinstance(task, ReconstructTask):
        raise ValueError(f"{run.path} was not trained to fill gaps; give a run of task=reconstruct")
    given = data if path is None else data.with_files(path)
    check_alike(given, data)
    task.window().positions(given, None)  # refuses what holds no window, before anything is fitted
    normalisation = read_normalisation(folder)
    (training, *_), stacking = task.series(data, "train", normalisation), Stacking.read(folder)
    analyst = task.analysis_of(training, task.analysis) if task.reference == "analysis" else None
    mixed = (task.analysis_of(training, stacking.baseline), stacking) if stacking else None
    return Filler(run.model(checkpoint), given, normalisation, task.window(), task.overlap, analyst, mixed)


def check_alike(given: GriddedData, data: GriddedData) -> None:
    """Raises ValueError, which says what differs, where files are not like the data that a model was trained on."""
    if given.grid != data.grid:
        raise ValueError(
            f"{given.path} lies on a grid of {given.grid.shape[0]} x {given.grid.shape[1]} cells, the model knows "
            f"{data.grid.shape[0]} x {data.grid.shape[1]} at other places; regrid it to those of {data.path}"
        )
    if given.calendar != data.calendar:
        raise ValueError(
            f"{given.path} counts its times in the calendar {given.calendar}, the model in {data.calendar}; write "
            "them in that one"
        )
    found, known = (
        {variable.label: variable.units for variable in (*each.variables, *each.static_variables)}
        for each in (given, data)
    )
    if list(found) != list(known):
        raise ValueError(
            f"{given.path} has {', '.join(found)}, the model reads {', '.join(known)}; give files of these"
        )
    for label, units in known.items():
        if found[label] != units:
            raise ValueError(
                f"{given.path} has {label} in the units {found[label]!r}, the model in {units!r}; convert its values, "
                "or correct its attribute units where they are the same"
            )
    apart = np.diff(given.times)
    if apart.size > 1 and apart.min() > 1.5 * data.step:  # two frames may have others between them
        raise ValueError(
            f"{given.path} has frames at least {apart.min()} seconds apart, the model reads steps of {data.step} "
            "seconds; give files of that step"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.fill_gaps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", help="folder of a run of task=reconstruct")
    parser.add_argument("file", type=Path, help="the file to write, ending in .nc or .zarr")
    parser.add_argument("--path", help="other files than those of the run, on the same grid")
    parser.add_argument("--checkpoint", default="best", help="best, last or step_00000100")
    options = parser.parse_args(arguments)
    try:
        check_ending(options.file)
        filler = filler_of(RunFolder.open(options.run), checkpoint=options.checkpoint, path=options.path)
        notes = fill_gaps(filler, options.file)
    except Exception as error:
        if TRACEBACKS or not is_user_error(error):
            raise
        fail(sentence(error))
    print("\n".join([*notes, f"{options.file}: {len(filler.one.frames)} windows"]))


if __name__ == "__main__":
    main()
