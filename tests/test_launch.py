"""Ranks that a plain call starts: what they give back, and what a person sees when one of them fails."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import rank_failures
from training import cluster, command_line
from training.cluster import Cluster
from training.command_line import RankFailed
from training.launch import launch, mesh_of
from training.ranks import Mesh

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINER = SimpleNamespace(device="cpu", timeout=60.0)
MARK = "HYDRASPHERE_TEST_MARK"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where a launch keeps its files: none is left after a test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.glob("ranks-*"))  # the fork server, and with it its socket, lives on


def left(folder: Path) -> list[Path]:
    """What a launch, or the fork server of a process that has ended, left."""
    return [*folder.glob("ranks-*"), *folder.glob("pymp-*")]


def alive(mark: str) -> list[str]:
    """Command lines of the processes that inherited this mark, but for those about to be collected."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
        except OSError:  # gone, or another user's
            continue
    return found


def test_every_rank_works_once_and_the_first_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("OF_THE_LAUNCHER", "seen")
    monkeypatch.chdir(tmp_path)
    found = launch(rank_failures.described, mesh=Mesh(dp=2, cp=2), trainer=TRAINER)
    assert [item["rank"] for item in found] == [0, 1, 2, 3]
    assert [item["parts"] for item in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({item["pid"] for item in found} | {os.getpid()}) == 5
    assert {item["variable"] for item in found} == {"seen"} and {item["folder"] for item in found} == {str(tmp_path)}
    cores = len(os.sched_getaffinity(0))
    assert {item["threads"] for item in found} == {1} if cores < 8 else True
    assert not any(Path(f"/proc/{item['pid']}").exists() for item in found)


@pytest.mark.parametrize("cores", [2, 64])
def test_ranks_share_the_cores(monkeypatch, cores):
    from training import launch as launching

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(launching.torch, "get_num_threads", lambda: 16)
    assert launching.threads_per_rank(8) == max(1, cores // 8)
    assert launching.threads_per_rank(2) == min(16, cores // 2)  # no more than one process would take


def test_the_first_failure_is_shown_alone():
    with pytest.raises(RankFailed) as failure:
        launch(rank_failures.unpicklable_bug, mesh=Mesh(cp=3), trainer=TRAINER)
    text = str(failure.value)
    assert text.startswith("rank 1 of 3 failed first:\nTraceback") and text.rstrip().endswith("Local: the bug itself")
    assert text.count("Traceback") == 1 and "onnection" not in text


@pytest.mark.parametrize(
    ("work", "sentence"),
    [("wrong_setting", "x=3 is too large; use x=2"), ("missing_file", "/nowhere/at-all: No such file or directory")],
)
def test_what_a_user_can_repair_is_one_sentence(work, sentence):
    with pytest.raises(ValueError) as error:
        launch(getattr(rank_failures, work), mesh=Mesh(cp=2), trainer=TRAINER)
    assert command_line.sentence(error.value) == sentence


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGKILL, "out of memory"), (signal.SIGSEGV, "in killed"), (signal.SIGABRT, "killed")],
)
def test_a_killed_rank_is_named(number, expected):
    with pytest.raises(RankFailed, match=f"rank 1 of 2 was killed by {number.name}") as failure:
        launch(rank_failures.killed, int(number), mesh=Mesh(cp=2), trainer=TRAINER)
    assert expected in str(failure.value)


def test_a_rank_that_leaves_without_a_word_is_named():
    with pytest.raises(RankFailed, match=r"rank 1: 7|lost the others"):
        launch(rank_failures.silent_exit, mesh=Mesh(cp=2), trainer=TRAINER)


def test_waiting_in_vain_names_both_places():
    with pytest.raises(RankFailed) as failure:
        launch(rank_failures.left_waiting, mesh=Mesh(cp=2), trainer=SimpleNamespace(device="cpu", timeout=2.0))
    waited, _, elsewhere = str(failure.value).partition("rank 1 was at:\n")
    assert waited.startswith("rank 0 of 2 waited in vain") and "all_to_all_single" in waited
    assert "in stay_away\n" in elsewhere and elsewhere.rstrip().endswith("in left_waiting")


def test_the_start_method_of_the_caller_stays():
    before = multiprocessing.get_start_method(allow_none=True)
    launch(rank_failures.described, mesh=Mesh(cp=2), trainer=TRAINER)
    assert multiprocessing.get_start_method(allow_none=True) == before


def test_ranks_start_from_another_thread():
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(launch(rank_failures.described, mesh=Mesh(cp=2), trainer=TRAINER))
    )
    thread.start()
    thread.join()
    assert [item["rank"] for item in found] == [0, 1]


CALL = """
import sys
from types import SimpleNamespace
from tests import rank_failures
from training import command_line
from training.launch import launch
from training.ranks import Mesh

def main():
    trainer = SimpleNamespace(device="cpu", timeout=60)
    print(launch(rank_failures.{work}, *{arguments}, mesh=Mesh(cp=3), trainer=trainer))

if __name__ == "__main__":
    command_line.run(main)
"""


def start(folder: Path, work: str, *arguments) -> subprocess.Popen:
    """A launch from a process of its own, which knows the repository but was started elsewhere; in its own group."""
    (folder / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), MARK: str(folder)}
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})" + CALL.format(work=work, arguments=arguments)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_failure_is_printed_without_the_launchers_traceback(tmp_path):
    process = start(tmp_path, "unpicklable_bug")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    assert err.startswith("error: rank 1 of 3 failed first:\nTraceback") and err.count("Traceback") == 1
    assert alive(str(tmp_path)) == [] and left(tmp_path / "tmp") == []


def test_elsewhere_too_torch_is_imported_once_a_warning_said_once_and_nothing_stays(tmp_path):
    process = start(tmp_path, "warn")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "imported before: True\n"
    assert err.count("UserWarning: said by a library") == 1, err
    assert alive(str(tmp_path)) == [] and left(tmp_path / "tmp") == []


@pytest.mark.parametrize(
    ("number", "group", "code"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, False, 143),
        (signal.SIGTERM, True, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_no_process_outlives_its_launcher(tmp_path, number, group, code):
    process = start(tmp_path, "wait_long", "all are here")
    assert process.stderr.readline() == "all are here\n"
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)  # ranks hold the pipes: this ends when they are gone
    assert process.returncode == code and "Traceback" not in err
    assert out == "" and err == ("error: interrupted\n" if number == signal.SIGINT else "")
    assert alive(str(tmp_path)) == []
    if number != signal.SIGKILL:
        assert left(tmp_path / "tmp") == []


def test_processes_of_torchrun_and_slurm_are_found(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    assert Cluster.found() is None
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9"}
    slurm |= {"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert Cluster.found() == Cluster(9, 1, 8, 16, "tcp://gpu07:13456")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert Cluster.found().method != "tcp://gpu07:13456"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # one task starts the ranks of its machine itself
    assert Cluster.found() is None
    for name, value in dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    assert Cluster.found() == Cluster(3, 1, 4, 4, "env://")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("node[01-04,07]", "node01"),
        ("a[3,5-6],b[1-2]", "a3"),
        ("rack[2-3]n[10-19].site", "rack2n10.site"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes, first):
    assert cluster.first_host(nodes) == first


def test_a_job_that_was_started_again_is_known(monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not cluster.started_again()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert cluster.started_again()


@pytest.mark.parametrize(
    ("world", "cp", "dp", "mesh"),
    [
        (None, None, None, Mesh()),
        (None, 4, 2, Mesh(dp=2, cp=4)),
        (8, None, None, Mesh(dp=8)),
        (8, 4, None, Mesh(dp=2, cp=4)),
        (8, None, 2, Mesh(dp=2, cp=4)),
        (8, 3, None, "cp=3 does not divide the 8 processes that were started"),
        (8, 16, None, "cp=16 does not divide the 8 processes that were started"),
        (8, None, 3, "dp=3 does not divide the 8 processes that were started"),
        (8, 2, 2, "dp=2 cp=2 needs 4 processes, and 8 were started"),
        (None, 0, None, "cp=0 must be at least 1"),
        (None, None, -2, "dp=-2 must be at least 1"),
    ],
)
def test_the_mesh_follows_from_what_is_given(monkeypatch, world, cp, dp, mesh):
    monkeypatch.setattr(Cluster, "found", lambda: None if world is None else Cluster(0, 0, world, world, "env://"))
    if isinstance(mesh, Mesh):
        assert mesh_of(cp, dp) == mesh
        return
    with pytest.raises(ValueError, match=mesh):
        mesh_of(cp, dp)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    from training import launch as launching

    monkeypatch.setattr(launching, "choose_device", lambda name: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"cp=4 asks for 4 GPUs, and this machine has 2; use trainer.device=cpu"):
        launch(rank_failures.described, mesh=Mesh(cp=4), trainer=TRAINER)


def test_a_process_takes_the_gpu_it_was_shown(monkeypatch):
    from training import launch as launching

    taken = []
    monkeypatch.setattr(launching.torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 1)
    launching._take_device("cuda", 5)  # Slurm shows every task one GPU
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 4)
    launching._take_device("cuda", 3)
    assert taken == [0, 3]
    with pytest.raises(ValueError, match="process 5 of this machine needs a GPU, and there are 4"):
        launching._take_device("cuda", 4)
