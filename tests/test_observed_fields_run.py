"""`python train.py data=observations` as a person uses it, tiny, with every format that can be written here."""

import json
import os
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.example_data import dataset
from tests.observation_files import WRITERS, Sites

START = int(np.datetime64("2001-01-01", "s").astype(np.int64))
PAGE = (Path(__file__).parents[1] / "docs/your_observations.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
FIELDS = "data.fields=fields.nc"
CHOICE = ["data=observations", "model=healda_v2"]
SMALL = [
    "model/size=tiny",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.observation_heads=2",
    "model.num_latents=6",
    "trainer.max_steps=2",
    "trainer.progress=false",
    "task.frames=2",
    "tracking=none",
    "report=false",
]


@pytest.fixture
def train(command, tmp_path, monkeypatch):
    """Runs train.py in this process on fields of its own; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("HYDRASPHERE_CACHE", str(tmp_path / "cache"))
    fields = dataset(frames=40, latitude=np.arange(-75.0, 76, 30), longitude=np.arange(0.0, 360, 30))
    fields["orography"] = (("lat", "lon"), np.zeros((6, 12)))
    fields.to_netcdf("fields.nc")
    return partial(command, "train", *SMALL)


def observed(folder, name: str, days: int = 10) -> str:
    """A file of the format in the folder: its setting."""
    kind = WRITERS[name]
    kind.writer(folder / kind.file, Sites.random(START, START + days * 86_400, rows=400))
    return f"data.observations={kind.file}"


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_trains(train, tmp_path, name):
    code, _, err = train(*CHOICE, FIELDS, observed(tmp_path, name), "data.level=1", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 0, err
    scores = json.loads((tmp_path / "run/scores.json").read_text())["t2m"]["rmse"]
    assert list(scores) == ["-6", "0"] and np.isfinite(scores["0"]["ours"])
    config = json.loads((tmp_path / "run/checkpoints/last/config.json").read_text())
    assert config["layout"]["observations"]["channels"] == [WRITERS[name].channel]


@pytest.mark.parametrize(
    "swap",
    [
        ["model/encoder=perceiver", "data.grid=latlon"],
        ["model/decoder=perceiver_io", "data.level=1"],
        ["model/encoder=perceiver", "model/decoder=perceiver_io", "data.level=1"],
    ],
)
def test_other_parts_train_where_most_windows_are_empty(train, tmp_path, swap):
    both = [observed(tmp_path, name, days=2).split("=")[1] for name in ("metar_csv", "dart_text")]
    code, out, err = train(
        *CHOICE, FIELDS, f"data.observations=[{','.join(both)}]", *swap, f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert code == 0, err
    assert "RMSE of t2m" in out


def test_it_is_described_before_anything_is_trained(train, tmp_path):
    code, out, err = train(*CHOICE, FIELDS, observed(tmp_path, "madis"), "data.inspect=true")
    assert code == 0, err
    assert "400 in files: 1 of madis" in out and "rejected by source" in out and "healpix level 1" in out
    code, out, err = train(*CHOICE, FIELDS, observed(tmp_path, "madis"), "dry_run=true")
    assert code == 0 and "decoder.analysis" in out, err


def test_a_mistake_is_one_sentence(train, tmp_path):
    code, _, err = train(*CHOICE, FIELDS, "data.observations=nothing.csv")
    assert code == 1 and err.count("\n") == 1 and "data.observations=nothing.csv does not exist" in err
    (tmp_path / "notes.txt").write_text("hello")
    code, _, err = train(*CHOICE, FIELDS, "data.observations=notes.txt")
    assert code == 1 and err.count("\n") == 1 and "no observation file that can be recognised" in err
    code, _, err = train(*CHOICE, FIELDS, observed(tmp_path, "metar_csv"), "data.variables=[t3m]")
    assert code == 1 and err.count("\n") == 1 and "did you mean t2m?" in err


@pytest.mark.parametrize("line", [line for line in COMMANDS if "bufr" not in line])  # nothing here writes BUFR
def test_the_commands_of_the_page_run(train, tmp_path, line):
    import xarray as xr

    for name in WRITERS:
        observed(tmp_path, name)
    for number in (1, 2):
        shutil.copy(tmp_path / "metars.csv", tmp_path / f"metars_{number}.csv")
    hours = ("time", np.arange(40) * 6, {"units": "hours since 2001-01-01"})
    cells = np.random.default_rng(0).normal(280, 5, (40, 48))
    xr.Dataset({"t2m": (("time", "cell"), cells)}, {"time": hours}).to_netcdf("cells.nc")
    program, script, *arguments = shlex.split(line, comments=True)
    assert (program, script) == ("python", "train.py")
    code, out, err = train(*arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 0, err
    assert "RMSE of t2m" in out or "data.inspect=true" in arguments


def test_the_page_names_every_format():
    from data.sources.observations import FORMATS

    assert all(f"| `{name}` |" in PAGE for name in FORMATS) and len(COMMANDS) == 17


HOUR = "2020100106_metars.csv"


@pytest.mark.real_data
@pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR is not set")
def test_a_history_encoder_trains_on_real_metars(train, tmp_path):
    """8,361 METARs of one hour, as users have them; truth are means of their temperatures over cells of 5 degrees."""
    reports = Path(os.environ["DATA_DIR"]) / HOUR
    if not reports.is_file():
        pytest.skip(f"{HOUR} is not in DATA_DIR")
    _means_of_cells(reports).to_netcdf("hour.nc")
    code, _, err = train(
        "model=hip_metnet",
        "task=assimilation",
        "data=observations",
        "data.fields=hour.nc",
        f"data.observations={reports}",
        'data.split={train: ["2020-10-01T05:30","2020-10-01T06:00"], validation: "2020-10-01T06:10", '
        'test: ["2020-10-01T06:20","2020-10-01T06:30"]}',
        "data.annual_harmonics=0",
        "data.diurnal_harmonics=0",
        "task.frames=1",
        "task.stride=1",
        "task.window=[-300,300]",
        "task.stacking=null",
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert code == 0, err
    scores = json.loads((tmp_path / "run/scores.json").read_text())["t2m"]["rmse"]["0"]
    assert scores["optimal_interpolation"] < scores["climatology"] and scores["ours"] < 1.5 * scores["climatology"]
    config = json.loads((tmp_path / "run/checkpoints/last/config.json").read_text())
    assert config["layout"]["observations"]["channels"] == ["altimeter", "dewpoint", "temperature", "u", "v"]


def _means_of_cells(reports: Path):
    """Temperatures of a METAR file over North America, every 10 minutes of its hour; NaN where none reported."""
    import pandas as pd
    import xarray as xr

    rows = pd.read_csv(reports, usecols=["Unix_time", "Latitude", "Longitude", "Temp"]).dropna()
    first = int(np.datetime64("2020-10-01T05:30", "s").astype(np.int64))
    latitude, longitude = np.arange(60.0, 19, -5), np.arange(230.0, 301, 5)
    frame = np.rint((rows.Unix_time - first) / 600).astype(int)
    row, column = np.rint((60 - rows.Latitude) / 5).astype(int), np.rint((rows.Longitude % 360 - 230) / 5).astype(int)
    shape = (7, latitude.size, longitude.size)
    places = np.stack([frame, row, column])
    inside = ((places >= 0) & (places < np.array(shape)[:, None])).all(axis=0)
    cells = np.ravel_multi_index(places[:, inside], shape)
    total, count = (np.bincount(cells, weights, np.prod(shape)) for weights in (rows.Temp[inside] + 273.15, None))
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(shape).astype(np.float32)
    axes = {
        "time": np.datetime64(first, "s").astype("datetime64[ns]") + 600 * np.arange(7) * np.timedelta64(1, "s"),
        "latitude": ("latitude", latitude, {"units": "degrees_north"}),
        "longitude": ("longitude", longitude, {"units": "degrees_east"}),
    }
    return xr.Dataset({"t2m": (("time", "latitude", "longitude"), means, {"units": "K"})}, coords=axes)
