"""Ranks under torchrun and in the jobs of sweeps: one output folder, one report, one MLflow run a job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from tests.tiny_run import HEALDA
from training import arguments, command_line
from training.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = REPOSITORY / "train.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
TINY = [*HEALDA, "trainer.max_steps=2"]


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    settings = dict(cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, timeout=400)
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **settings)


def test_other_processes_get_no_folder_and_no_sweep(monkeypatch):
    given = ["model=healda_v2", "+cp=4"]
    for rank in (0, 3):
        monkeypatch.setattr(Cluster, "found", lambda rank=rank: Cluster(rank, rank, 4, 4, "env://"))
        assert arguments.rewrite(given) == [*given, *(arguments.NO_FOLDER if rank else ())]
        with pytest.raises(ValueError, match=r"-m under torchrun or srun .* in each of 4 processes"):
            arguments.rewrite(["-m", *given])
    monkeypatch.setattr(Cluster, "found", lambda: None)
    assert arguments.rewrite([*given, "-m"]) == ["-m", *given]


def test_slurm_without_submitit_says_what_to_install():
    error = ConfigCompositionException("In 'hydra/launcher/slurm': Could not load 'hydra/launcher/submitit_slurm'.")
    assert command_line.sentence(error) == "hydra/launcher=slurm builds on submitit_slurm: pip install -e '.[sweep]'"


FAILING = """
from types import SimpleNamespace
from tests import rank_failures
from training import command_line
from training.launch import launch
from training.ranks import Mesh

trainer = SimpleNamespace(device="cpu", timeout=60)
command_line.run(lambda: launch(rank_failures.{work}, mesh=Mesh(cp=3), trainer=trainer))
"""


@pytest.mark.parametrize(
    ("work", "said"), [("wrong_setting", "error: x=3 is too large; use x=2\n"), ("unpicklable_bug", "the bug itself\n")]
)
def test_under_torchrun_too_the_first_failure_is_reported_once(tmp_path, work, said):
    (tmp_path / "script.py").write_text(FAILING.format(work=work))
    done = run([*TORCHRUN, 3, "script.py"], tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    ours = done.stderr.partition("closing signal")[0]
    assert done.stderr.count(said) == 1, done.stderr
    assert "Connection" not in ours and "rendezvous" not in ours, done.stderr


def test_an_error_of_all_processes_is_printed_by_one(tmp_path):
    done = run([*TORCHRUN, 2, TRAIN, *TINY, "tracking.enabled=false", "+cp=2", "model.nope=1"], tmp_path)
    assert done.returncode == 1 and done.stderr.count("error: there is no option model.nope") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torchrun_writes_one_folder(tmp_path):
    done = run([*TORCHRUN, 4, TRAIN, *TINY, "tracking.enabled=false", "+cp=4", "hydra.run.dir=run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, best at step") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    wrong = run([*TORCHRUN, 4, TRAIN, *TINY, "tracking.enabled=false", "+cp=3", "hydra.run.dir=run2"], tmp_path)
    assert wrong.returncode == 1 and not (tmp_path / "run2").exists()
    assert wrong.stderr.count("error: cp=3 does not divide the 4 processes that were started") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_sweep_over_ranks_goes_on_after_a_failing_job(tmp_path, launcher):
    if launcher != "basic":
        pytest.importorskip(
            f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher", reason="pip install -e '.[sweep]'"
        )
    uri, sweep = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "sweep"
    command = [sys.executable, TRAIN, "-m", f"hydra/launcher={launcher}", *TINY, f"tracking.uri={uri}"]
    done = run([*command, "+cp=1,2", "optimizer.lr=1e38,1e-3", f"hydra.sweep.dir={sweep}"], tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: the validation loss is not finite at step 1"), done.stderr
    assert [(sweep / str(job) / "scores.json").exists() for job in range(4)] == [False, True, False, True]

    from training.tracking_store import Store

    client, experiment = Store(uri, "hydrasphere").client()
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 5 and sorted(run.info.status for run in children) == ["FAILED"] * 2 + ["FINISHED"] * 2
