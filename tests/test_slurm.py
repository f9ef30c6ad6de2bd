"""Sweeps on Slurm: the script that is handed in, and jobs that save, wait in the queue again and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import HEALDA

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = [*HEALDA, "tracking.enabled=false"]
submitit = pytest.importorskip("submitit", reason="pip install -e '.[sweep]'")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of commands, first on PATH, that stand in for Slurm's."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {REPOSITORY}/tests/slurm_stand_in.py {name} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(tmp_path))
    for name in list(os.environ):
        if name.startswith(("SLURM_JOB", "SLURM_STEP", "SLURM_ARRAY", "SLURM_PROC", "SUBMITIT_")):
            monkeypatch.delenv(name)
    return tmp_path


def test_the_script_asks_for_what_is_configured(slurm, tmp_path):
    from hydra import compose, initialize_config_dir
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    from conf import schema

    schema.register()
    asked = ["partition=gpu", "nodes=2", "tasks_per_node=8", "gpus_per_node=8", "cpus_per_task=12", "timeout_min=90"]
    asked += ["mem_gb=900", "constraint=h200"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose(
            "train",
            ["hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}", *(f"hydra.launcher.{a}" for a in asked)],
            return_hydra_config=True,
        )
    launcher = Plugins.instance()._instantiate(config.hydra.launcher)
    executor = submitit.AutoExecutor(folder=launcher.params["submitit_folder"], cluster="slurm")
    shared = ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min", "name")
    named = (*shared, "stderr_to_stdout")
    left_out = ("submitit_folder", "max_num_timeout")
    params = {key: value for key, value in launcher.params.items() if key not in left_out}
    executor.update_parameters(**{key if key in named else f"slurm_{key}": value for key, value in params.items()})
    text = executor._executor._make_submission_file_text("python work", "uid")
    for option in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=12",
        "mem=900GB",
        "time=90",
        "partition=gpu",
        "signal=USR2@300",
        "requeue",
        "job-name=hydrasphere",
        "open-mode=append",
    ):
        assert f"#SBATCH --{option}\n" in text, option
    assert "\nexport SLURM_KILL_BAD_EXIT=1\n" in text and "partition=gpu" in text
    assert "srun --unbuffered" in text and "_%t_log.err python work" in text
    assert OmegaConf.select(config, "hydra.launcher.max_num_timeout") == 100


def tasks_of(folder: Path) -> list[int]:
    """The processes of submitit in jobs that were started from here."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_STAND_IN={folder}".encode() in environment and arguments[2:4] == [b"-m", b"submitit.core._submit"]:
            found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2], ids=["one task that starts its ranks", "a task a rank"])
def test_a_preempted_job_saves_waits_in_the_queue_and_goes_on(slurm, tasks):
    sweep = slurm / "sweep"
    command = [sys.executable, REPOSITORY / "train.py", "-m", "hydra/launcher=slurm", *TINY, "+cp=2"]
    command += ["trainer.max_steps=40", f"hydra.launcher.tasks_per_node={tasks}", f"hydra.sweep.dir={sweep}"]
    process = subprocess.Popen(command, cwd=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = sweep / "0" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    started = tasks_of(slurm)
    assert len(started) == tasks, process.communicate(timeout=60)[0]
    for task in started:
        os.kill(task, signal.SIGUSR2)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    printed = "".join(path.read_text() for path in sorted(sweep.glob(".submitit/*/*_log.*")))
    assert printed.count("go on with: python train.py resume=") == 1 and "Requeued job" in printed, printed
    assert printed.count("40 steps, best at step") == 1
    assert sorted(path.name for path in sweep.iterdir()) == [".submitit", "0", "multirun.yaml"]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
