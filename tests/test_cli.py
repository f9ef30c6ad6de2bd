"""`train.py` as a person uses it: what it writes and prints, and one line for everything typed wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import write_weather

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = ["debug=limit", "data=netcdf", "model/size=tiny"]


@pytest.fixture
def command(command, tmp_path, monkeypatch):
    """Runs train.py in this process; returns (exit code, stdout, stderr). Its output folder is `tmp_path/run`."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    weather = write_weather(tmp_path / "weather.nc")

    def call(*arguments, tiny=True):
        added = [*TINY, f"data.path={weather}", f"hydra.run.dir={tmp_path / 'run'}"] if tiny else []
        typed = {item.split("=")[0] for item in arguments}
        given = [item for item in added if item.split("=")[0] not in typed]
        return command("train", *given, *arguments)

    return call


WRONG = [
    (["model.encoder.context_=4"], "did you mean model.encoder.context?"),
    (["model/encoder=nope"], "there is no model/encoder=nope; choose one of cross_resolution, grid_patch, "),
    (["model.encoder=perceiver"], "use model/encoder=perceiver"),
    (["encoder=perceiver"], "model/encoder=<option>"),
    (["model=nope"], "there is no model=nope; choose one of "),
    (["experiment=nope"], "there is no experiment=nope"),
    (["-m", "hydra/launcher=nope"], "pip install -e '.[sweep]'"),
    (["+cps=8"], "did you mean 'cp'?"),
    (["cp=2"], "use dp instead of cp"),
    (["+dp=3", "trainer.batch_size=8"], "dp must divide trainer.batch_size=8: use 1, 2, 4 or 8"),
    (["+cp=0"], "cp=0 must be at least 1"),
    (["cp=2", "trainer.timeout=0"], "trainer.timeout=0 must be more than 0 seconds"),
    (["cp=two"], "cp=two does not fit: Value 'two'"),
    (["optimizer.lrr=1"], "did you mean optimizer.lr?"),
    (["optimizer.name=lion"], "optimizer.name=adamw|sgd"),
    (["scheduler.name=step"], "scheduler.name=cosine|constant"),
    (["trainer.batch_size=2.5"], "trainer.batch_size=2.5 does not fit"),
    (["task.stacking=mean"], "task.stacking=mean is unknown; use null or one of persistence"),
    (["trainer.batch_size=0"], "trainer.batch_size=0 must be at least 1"),
    (["+trainer.max_steps=3"], "without the +"),
    (["trainer.precision=fp8"], "trainer.precision=auto, float32, bf16"),
    (["trainer.device=cuda:99"], "trainer.device=cuda:99 is not available"),
    (["task.lead_times=[7]"], "task.lead_times: 7 h is not a multiple of the data's step of 6 h"),
    (["task.lead_times=[24,6]"], "must be increasing lead times above 0 h"),
    (["task.lead_weights=[1]"], "1 values for 3 lead times"),
    (["task.variable_weights={x: 1}"], "'x'; the data has t2m"),
    (["task.reference=nothing"], "task.reference=nothing is unknown"),
    (["task.loss=mae"], "task.loss=mae is unknown"),
    (["data.path=/nowhere.nc"], "/nowhere.nc does not exist"),
    (["data.path=???"], "data.path must be given"),
    (["tracking.enabled=true", "tracking.uri=file:./mlruns"], "tracking.uri=file:./mlruns is a folder"),
    (["resume=/nowhere"], "resume=/nowhere is not a folder"),
    (["oops"], "settings are typed as name=value"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(given) for given, _ in WRONG])
def test_a_wrong_setting_is_one_line_and_leaves_no_folder(command, tmp_path, arguments, message):
    code, out, err = command(*arguments)
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weather.nc"]


def test_an_output_folder_that_cannot_be_written_is_one_line(command, tmp_path):
    code, _, err = command(f"hydra.run.dir={tmp_path / 'weather.nc' / 'run'}")
    assert code == 1 and err.count("\n") == 1
    assert "cannot create the output folder" in err and "hydra.run.dir=<folder>" in err


def test_a_folder_with_an_equals_sign_is_shown_quoted(command, tmp_path):
    code, _, err = command("hydra.run.dir=a=b")
    assert code == 1 and "\"hydra.run.dir='a=b'\"" in err
    assert command("hydra.run.dir='a=b'", "dry_run=true")[0] == 0


def test_bugs_keep_their_traceback(command, monkeypatch):
    monkeypatch.setattr("training.run.build_data", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command()


def test_inspect_and_dry_run_print_and_leave_nothing(command, tmp_path):
    code, out, _ = command("data.inspect=true")
    assert code == 0 and "4 x 8" in out and "t2m" in out
    code, out, _ = command("dry_run=true")
    assert code == 0
    for text in ("encoder", "processor", "decoder", "memory", "steps"):
        assert text in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there", ("kept", "kept/made", "kept/made/${hydra:job.name}"))
def test_only_folders_that_were_made_are_removed(command, tmp_path, there):
    (tmp_path / there.replace("${hydra:job.name}", "train")).mkdir(parents=True)
    before = sorted((tmp_path / "kept").rglob("*"))
    code, _, err = command(f"hydra.run.dir='{tmp_path}/kept/made/${{hydra:job.name}}'", "data.inspect=true")
    assert code == 0, err
    assert (tmp_path / "kept").is_dir() and sorted((tmp_path / "kept").rglob("*")) == before


def test_a_run_writes_its_files_and_resumes(command, tmp_path):
    code, out, err = command("trainer.validate_every=2", "seed=3")
    assert code == 0, err
    run = tmp_path / "run"
    assert {"config.yaml", "overrides.txt", "metrics.jsonl", "scores.json", "checkpoints"} <= {
        path.name for path in run.iterdir()
    }
    assert not (run / ".hydra").exists() and not (run / "mlflow_run_id").exists()
    for text in ("persistence", "climatology", "waiting for data", f"python evaluate.py run={run}"):
        assert text in out
    scores = json.loads((run / "scores.json").read_text())
    assert {"ours", "persistence", "climatology"} <= scores["t2m"]["rmse"]["24"].keys()
    assert "seed=3" in (run / "overrides.txt").read_text().splitlines()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]

    from omegaconf import OmegaConf

    config = OmegaConf.load(run / "config.yaml")
    assert config.trainer.max_steps == 4 and config.seed == 3 and config.model.size == "tiny"

    code, out, err = command(f"resume={run}", "trainer.max_steps=6", tiny=False)
    assert code == 0, err
    assert OmegaConf.load(run / "config.yaml").seed == 3
    assert "6 steps" in out and (run / "checkpoints" / "last").readlink().name == "step_00000006"
    assert sum(1 for line in (run / "overrides.txt").read_text().splitlines() if "max_steps" in line) == 1
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again[:3] == lines[:3] and [line["step"] for line in again] == [1, 2, 3, 4, 5, 6]


def test_overfit_preset_reduces_the_loss(command, tmp_path):
    code, _, err = command("debug=overfit", "trainer.max_steps=40", "trainer.batch_size=4", "optimizer.lr=3e-3")
    assert code == 0, err
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_profile_preset_writes_a_trace(command, tmp_path):
    code, out, err = command("debug=profile", "trainer.batch_size=2")
    assert code == 0, err
    assert "Self CPU" in out and (tmp_path / "run" / "trace.json").stat().st_size > 1000


def test_help_does_not_import_torch():
    script = (
        "import sys; sys.argv = ['train.py', '--help']; import train; from training import command_line\n"
        "try:\n    command_line.run(train.train)\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'mlflow', 'xarray', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert "model/encoder" in finished.stdout


@pytest.mark.slow
def test_a_sweep_has_a_parent_and_goes_on_after_a_failing_job(command, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep = tmp_path / "sweep"
    tracked = ["tracking.enabled=true", f"tracking.uri={uri}", f"hydra.sweep.dir={sweep}"]
    code, _, err = command("-m", *tracked, "model.hidden_size=64,65,32", "trainer.progress=false")
    assert code == 1 and "error: job 1" in err and "model.hidden_size=65" in err
    assert (sweep / "0" / "scores.json").exists() and (sweep / "2" / "scores.json").exists()
    assert not (sweep / "1").exists()

    from training.tracking_store import Store

    client, experiment = Store(uri, "hydrasphere").client()
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if run.data.tags.get("kind") == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2 and len(runs) == 3
    assert parent.info.status == "FAILED" and {run.info.status for run in children} == {"FINISHED"}
    best = min(children, key=lambda run: run.data.metrics["best/val_loss"])
    assert parent.data.tags["best_run"] == best.info.run_id
    assert parent.data.metrics["best/val_loss"] == best.data.metrics["best/val_loss"]
    assert parent.data.metrics["test/rmse/t2m/24h"] == best.data.metrics["test/rmse/t2m/24h"]
    assert {run.data.params["model.hidden_size"] for run in children} == {"64", "32"}
    assert "HYDRASPHERE_SWEEP_RUN" not in os.environ
