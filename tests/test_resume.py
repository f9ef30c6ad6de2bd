"""Killed at any step and resumed, a run is bit for bit the run that was never interrupted (CPU)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import SPLIT, tiny_data, tiny_loop, write_weather

from data.datasets.gridded import GriddedData
from models.composition import build_from_config, compose
from training.arguments import rewrite
from training.run import build_task
from training.run_folder import last_checkpoint
from training.tracking import NoTracker

TESTS = Path(__file__).resolve().parent
SETTINGS = dict(max_steps=40, validate_every=4, checkpoint_every=3, accumulate=2, early_stopping=6, keep=2)

SLOW_RUN = """
import sys, time
from pathlib import Path
from tiny_run import tiny_data, tiny_loop, write_weather
from training.tracking import NoTracker

class Paced(NoTracker):  # slow enough to be killed between, before and inside steps
    def log(self, step, values):
        time.sleep(0.02)

folder = Path(sys.argv[1])
tiny_loop(folder / "run", tiny_data(folder), **{settings}).run(Paced())
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny_loop(folder / "run", tiny_data(folder), **SETTINGS).run(NoTracker())
    return folder / "run"


def files(run: Path) -> dict[str, bytes]:
    """Losses, weights, averages and every checkpoint that is kept, as bytes."""
    kept = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}
    return kept | {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}


def test_sigkill_and_resume_repeat_the_uninterrupted_run(uninterrupted, tmp_path):
    step = random.randrange(4, 38)
    script = SLOW_RUN.replace("{settings}", repr(SETTINGS))
    environment = {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < step):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    reached = metrics.read_bytes().count(b"\n")
    assert step <= reached < SETTINGS["max_steps"]

    resumed = tiny_loop(tmp_path / "run", tiny_data(tmp_path), **SETTINGS)
    resumed.resume(last_checkpoint(tmp_path / "run"))
    assert 0 < resumed.progress.step <= reached
    resumed.run(NoTracker())
    assert files(tmp_path / "run") == files(uninterrupted), f"killed after step {reached}"


@pytest.mark.parametrize("stop", [1, 2, 7, 23])
def test_stopping_anywhere_changes_nothing(uninterrupted, tmp_path, stop):
    """Interrupted by an exception right after a step was logged, with the model left in any state."""

    class Stop(NoTracker):
        def log(self, step, values):
            if step == stop:
                raise KeyboardInterrupt

    data = tiny_data(tmp_path)
    loop = tiny_loop(tmp_path / "run", data, **(SETTINGS | {"checkpoint_every": 1}))
    with pytest.raises(KeyboardInterrupt):
        loop.run(Stop())
    if stop > 1:
        loop = tiny_loop(tmp_path / "run", data, **SETTINGS)
        loop.resume(last_checkpoint(tmp_path / "run"))
        assert loop.progress.step == stop - 1
        loop.run(NoTracker())
        assert files(tmp_path / "run") == files(uninterrupted)
    else:
        with pytest.raises(ValueError, match="holds no checkpoint"):
            last_checkpoint(tmp_path / "run")


@pytest.mark.slow
def test_windows_with_gaps_are_analysed_alike_after_a_stop_and_in_worker_processes(tmp_path):
    """What the interpolations of `task=reconstruct` have analysed is in no checkpoint, and each process has its own."""

    class Stop(NoTracker):
        def log(self, step, values):
            if step == 5:
                raise KeyboardInterrupt

    weather = str(write_weather(tmp_path / "weather.nc", times=240))

    def loop(name: str, workers: int = 0):
        data = GriddedData(weather, split=SPLIT, cache="ram", num_workers=workers)
        overrides = ["task=reconstruct", "task.months=null", "task.targets=[filled]", "model=perceiver_io"]
        config = compose([*overrides, "model/size=tiny", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"])
        task = build_task(config)
        torch.manual_seed(0)
        model = build_from_config(config, task.layout(data))
        changes = dict(max_steps=12, batch_size=2, validate_every=6, checkpoint_every=2)
        return tiny_loop(tmp_path / name, data, task=task, model=model, **changes)

    loop("straight").run(NoTracker())
    with pytest.raises(KeyboardInterrupt):
        loop("stopped").run(Stop())
    resumed = loop("stopped")
    resumed.resume(last_checkpoint(tmp_path / "stopped"))
    assert resumed.progress.step == 4
    resumed.run(NoTracker())
    loop("workers", workers=2).run(NoTracker())
    straight = files(tmp_path / "straight")
    assert files(tmp_path / "stopped") == straight and files(tmp_path / "workers") == straight


def test_validating_more_often_does_not_change_training(uninterrupted, tmp_path):
    """Everything random follows from (seed, step), so looking does not disturb."""
    loop = tiny_loop(
        tmp_path / "run", tiny_data(tmp_path), **(SETTINGS | {"validate_every": 1, "early_stopping": None})
    )
    loop.run(NoTracker())
    model = "checkpoints/last/model.safetensors"
    assert (tmp_path / "run" / model).read_bytes() == (uninterrupted / model).read_bytes()


def test_a_longer_budget_goes_on(tmp_path):
    data = tiny_data(tmp_path)
    tiny_loop(tmp_path / "run", data, max_steps=4).run(NoTracker())
    longer = tiny_loop(tmp_path / "run", data, max_steps=9)
    longer.resume(last_checkpoint(tmp_path / "run"))
    assert longer.run(NoTracker()).progress.step == 9
    assert last_checkpoint(tmp_path / "run").name == "step_00000009"


def run_folder(folder: Path, *overrides: str) -> Path:
    (folder / "checkpoints" / "last").mkdir(parents=True)
    (folder / "overrides.txt").write_text("".join(f"{item}\n" for item in overrides))
    return folder


def test_arguments_are_the_recorded_ones_then_the_new_ones(tmp_path):
    folder = run_folder(tmp_path / "a run=1", "data=netcdf", "data.path='x y.nc'", "trainer.max_steps=4")
    assert rewrite([f"resume={folder}", "trainer.max_steps=9"]) == [
        "data=netcdf",
        "data.path='x y.nc'",
        "trainer.max_steps=9",
        f"resume='{folder}'",
        f"hydra.run.dir='{folder}'",
    ]
    assert rewrite([f"resume='{folder}/checkpoints/last'"])[-1] == f"hydra.run.dir='{folder}'"
    assert rewrite(["resume=null", "seed=1"]) == ["resume=null", "seed=1"]
    assert rewrite(["--help"]) == ["--help"]
    assert rewrite(["seed=1", "-m", "model=a,b"]) == ["-m", "seed=1", "model=a,b"]


def test_folders_that_cannot_be_resumed_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        rewrite([f"resume={tmp_path / 'none'}"])
    with pytest.raises(ValueError, match="is not the folder of a run"):
        rewrite([f"resume={tmp_path}"])
    (tmp_path / "overrides.txt").write_text("")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        rewrite([f"resume={tmp_path}"])
    with pytest.raises(ValueError, match="one by one"):
        rewrite(["-m", f"resume={run_folder(tmp_path / 'run')}"])


@pytest.mark.parametrize("line", ["hydra.callbacks.x._target_=os.system", "hydra/launcher=joblib", "--config-dir=/x"])
def test_a_strangers_overrides_start_nothing(tmp_path, line):
    folder = run_folder(tmp_path / "run", "seed=1", line)
    with pytest.raises(ValueError, match="no setting of a run"):
        rewrite([f"resume={folder}"])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["perceiver_io", "perceiver"])
def test_train_py_killed_and_resumed_is_the_uninterrupted_run(tmp_path, model):
    """The whole command with the real model: dropout, input noise, a loader process."""
    weather = write_weather(tmp_path / "weather.nc")
    command = [sys.executable, str(TESTS.parent / "train.py")]
    overrides = [
        *("data=netcdf", f"data.path={weather}", f"model={model}", "model/size=tiny", "seed=5", "data.num_workers=1"),
        *("trainer.max_steps=20", "trainer.checkpoint_every=4", "trainer.validate_every=7", "trainer.num_threads=1"),
        *("trainer.batch_size=16", "tracking.enabled=false", "task.input_noise=0.1", "model.dropout=0.1"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, *overrides, f"hydra.run.dir={straight}"], check=True, env=environment)
    process = subprocess.Popen([*command, *overrides, f"hydra.run.dir={killed}"], env=environment)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 6):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, f"resume={killed}"], check=True, env=environment)
    assert files(killed) == files(straight)
    assert (killed / "scores.json").read_bytes() == (straight / "scores.json").read_bytes()
