"""Interrupted in any way, a run leaves no process and a checkpoint, and resumed is the run that never stopped (CPU)."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.tiny_run import HEALDA, write_weather
from training import interruption
from training.interruption import Interruption
from training.run_folder import last_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
MARK = "HYDRASPHERE_TEST_MARK"


def marked(mark: Path) -> list[int]:
    """Processes that inherited this mark, oldest first."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # gone, or another user's
            continue
    return sorted(found)


def start(arguments: list, folder: Path) -> subprocess.Popen:
    environment = os.environ | {MARK: str(folder), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(process: subprocess.Popen, folder: Path, *, how: str, metrics: Path, steps: int) -> tuple[int, str]:
    """Waits for so many steps, then stops the run; the exit code and what it said."""
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < steps):
        time.sleep(0.01)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "SIGTERM":
        process.terminate()
    else:  # the youngest process is a rank: fork server and launcher were there before
        os.kill(marked(folder)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert marked(folder) == []
    return process.returncode, err


def files(run: Path) -> dict[str, bytes]:
    """Losses, weights and averages of the last checkpoint, as bytes."""
    kept = {path.name: path.read_bytes() for path in last_checkpoint(run).glob("*.safetensors")}
    return kept | {"step": last_checkpoint(run).name.encode(), "metrics": (run / "metrics.jsonl").read_bytes()}


SCRIPT = REPOSITORY / "tests" / "interrupted_run.py"
WAYS = {"Ctrl-C": 130, "SIGTERM": 143, "SIGKILL of a rank": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The files of a run on so many ranks."""

    @functools.cache
    def run(ranks: int) -> dict[str, bytes]:
        folder = tmp_path_factory.mktemp(f"uninterrupted_{ranks}")
        write_weather(folder / "weather.nc")
        process = start([SCRIPT, folder, ranks, 0, 0], folder)
        assert process.communicate(timeout=120)[0] == "step 24\n"
        return files(folder / "run")

    return run


@pytest.mark.parametrize(
    ("ranks", "how"),
    [
        pytest.param(1, "Ctrl-C", marks=pytest.mark.slow),
        pytest.param(1, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(2, "Ctrl-C", marks=pytest.mark.slow),
        pytest.param(2, "SIGTERM", marks=pytest.mark.slow),
        (2, "SIGKILL of a rank"),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(uninterrupted, tmp_path, ranks, how):
    write_weather(tmp_path / "weather.nc")
    run = tmp_path / "run"
    loaders = 1 if how == "Ctrl-C" else 0  # processes of the ranks' own, which must go too
    process = start([SCRIPT, tmp_path, ranks, 0.1, loaders], tmp_path)
    code, err = interrupt(process, tmp_path, how=how, metrics=run / "metrics.jsonl", steps=7)
    assert code == WAYS[how] and "Traceback" not in err
    reached = (run / "metrics.jsonl").read_bytes().count(b"\n")
    assert 7 <= reached < 24
    if how == "SIGKILL of a rank":
        assert "was killed by SIGKILL" in err and err.count("\n") == 1
        assert 0 < int(last_checkpoint(run).name.removeprefix("step_")) <= reached
    else:
        assert last_checkpoint(run).name == f"step_{reached:08}"
        assert f"saved at step {reached}; go on with: python train.py resume={run}" in err
    process = start([SCRIPT, tmp_path, ranks, 0, 0], tmp_path)
    assert process.communicate(timeout=120)[0] == "step 24\n"
    assert files(run) == uninterrupted(ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_at_once(tmp_path, ranks):
    write_weather(tmp_path / "weather.nc")
    process = start([SCRIPT, tmp_path, ranks, 100, 0], tmp_path)  # the step under way does not end
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes()):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(interruption.TOLD_TWICE + 0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and (out, err) == ("", "error: interrupted\n")
    assert marked(tmp_path) == []


@pytest.fixture
def clock(monkeypatch):
    """What `Interruption` takes for the time; one signal a test is far apart from the next only where it says so."""
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_the_first_signal_is_noted_and_a_later_one_ends(clock, number, raised):
    before = signal.getsignal(number)
    with pytest.raises(raised), Interruption() as asked:
        signal.raise_signal(number)
        assert asked.asked == number
        clock[0] += 0.5
        signal.raise_signal(number)  # torchrun's copy of the same Ctrl-C
        clock[0] += 2
        signal.raise_signal(number)
        pytest.fail("the second request was not obeyed")
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked.asked is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_schedulers_warning_is_told_to_who_listened_after_saving(clock):
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with Interruption() as asked:
            signal.raise_signal(signal.SIGUSR2)
            assert asked.asked == signal.SIGUSR2 and heard == []
        with Interruption() as asked:
            signal.raise_signal(signal.SIGTERM)
            clock[0] += 60
            signal.raise_signal(signal.SIGUSR2)  # not a second request
            assert asked.asked == signal.SIGUSR2 and heard == []
        with pytest.raises(SystemExit) as ended:
            asked.end()
        assert heard == [signal.SIGUSR2] and ended.value.code == 0
    finally:
        signal.signal(signal.SIGUSR2, before)
    with Interruption():
        assert signal.getsignal(signal.SIGUSR2) == before  # nobody listens: nothing to save for


def test_outside_the_main_thread_nothing_changes():
    found = []

    def enter() -> None:
        with Interruption() as asked:
            found.append(asked.asked)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None] and signal.getsignal(signal.SIGINT) == before


TINY = [*HEALDA, "trainer.max_steps=12", "trainer.validate_every=4", "tracking.enabled=false"]


@pytest.mark.slow
def test_the_whole_command_goes_on_bit_for_bit(tmp_path):
    def command(name: str, *more: str) -> subprocess.Popen:
        run = tmp_path / name
        run.mkdir(exist_ok=True)
        return start([REPOSITORY / "train.py", *TINY, "+cp=2", f"hydra.run.dir={run}", *more], run)

    assert command("uninterrupted").wait(300) == 0
    expected = files(tmp_path / "uninterrupted")
    for how, code in WAYS.items():
        run = tmp_path / how.replace(" ", "_")
        process = command(run.name)
        found, err = interrupt(process, run, how=how, metrics=run / "metrics.jsonl", steps=6)
        assert found == code, err
        process = start([REPOSITORY / "train.py", f"resume={run}"], run)
        assert process.wait(300) == 0
        assert files(run) == expected, how
