"""Fills the gaps of files with a trained model: frames and means of months, in a NetCDF file or a Zarr store.

python -m training.fill_gaps outputs/<day>/<run> filled.zarr
python -m training.fill_gaps outputs/<day>/<run> filled.nc --path 'sst_*.nc'
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.datasets.gridded import GriddedData
from evaluation.fill_gaps import Filler, fill_gaps
from evaluation.run_folder import RunFolder
from evaluation.stacking import Stacking
from training.checkpoints import read_normalisation
from training.command_line import TRACEBACKS, fail, is_user_error, sentence
from training.tasks.reconstruct import ReconstructTask


def filler_of(run: RunFolder, *, checkpoint: str = "best", path: str | None = None) -> Filler:
    """The model of a run with the series of its data, or of other files on the same grid.

    Raises ValueError where the run is of another task or the grids differ.
    """
    task, data, folder = run.task(), run.data(), run.checkpoint(checkpoint)
    if not isinstance(task, ReconstructTask):
        raise ValueError(f"{run.path} was not trained to fill gaps; give a run of task=reconstruct")
    normalisation = read_normalisation(folder)
    (training, *_), stacking = task.series(data, "train", normalisation), Stacking.read(folder)
    analyst = task.analysis_of(training, task.analysis) if task.reference == "analysis" else None
    mixed = (task.analysis_of(training, stacking.baseline), stacking) if stacking else None
    model, given = run.model(checkpoint), data
    if path is not None:
        names = dict.fromkeys(variable.name for variable in (*data.variables, *data.static_variables))
        options = {"variables": list(names), **{name: run.config.data.get(name) for name in ("levels", "region")}}
        daily = bool(run.config.data.get("daily_means", False))
        given = GriddedData(path, split={"train": 0.4, "validation": 0.3, "test": 0.3}, daily_means=daily, **options)
        if given.grid != data.grid:
            raise ValueError(
                f"{path} lies on a grid of {given.grid.shape[0]} x {given.grid.shape[1]} cells, the model knows "
                f"{data.grid.shape[0]} x {data.grid.shape[1]} at other places; regrid it to those of {data.path}"
            )
    return Filler(model, given, normalisation, task.window(), task.overlap, analyst, mixed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.fill_gaps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", help="folder of a run of task=reconstruct")
    parser.add_argument("file", type=Path, help="the file to write, ending in .nc or .zarr")
    parser.add_argument("--path", help="other files than those of the run, on the same grid")
    parser.add_argument("--checkpoint", default="best", help="best, last or step_00000100")
    options = parser.parse_args(arguments)
    try:
        filler = filler_of(RunFolder.open(options.run), checkpoint=options.checkpoint, path=options.path)
        notes = fill_gaps(filler, options.file)
    except Exception as error:
        if TRACEBACKS or not is_user_error(error):
            raise
        fail(sentence(error))
    print("\n".join([*notes, f"{options.file}: {len(filler.one.frames)} windows"]))


if __name__ == "__main__":
    main()
