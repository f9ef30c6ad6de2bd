"""Starts the ranks of a run from one plain `python` call, or joins those that torchrun or Slurm started.

Ranks are processes of a fork server that has imported torch once: eight of them are ready in seconds, also on two
cores. The first failure is what the user sees, alone: every rank writes what went wrong before it leaves, and nobody
tears the process group down, which would make healthy ranks fail first.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from training.devices import choose_device
from training.ranks import Mesh, Ranks, join

REPOSITORY = Path(__file__).resolve().parents[1]
PRELOADED = ("__main__", "torch", "torch.distributed", "training.run", "training.parallel")
GRACE = 60.0  # seconds in which ranks finish their step and save when asked to stop
SETTLING = 0.5  # seconds for the other ranks to write what they saw, once one has failed


class RankFailed(RuntimeError):
    """A rank ended with an error that is a bug, or was killed, or waited in vain. The text is all the user needs."""


@dataclass(frozen=True)
class Cluster:
    """Processes that something else started: torchrun, or Slurm's srun (also through submitit)."""

    rank: int
    local_rank: int
    world: int
    method: str

    @staticmethod
    def found() -> Cluster | None:
        """What the environment says, or None: this process is alone. Raises ValueError where Slurm's hosts are
        unreadable."""
        environment = os.environ
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return Cluster(rank, int(environment.get("LOCAL_RANK", rank)), world, "env://")
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            port = 20_000 + int(environment["SLURM_JOB_ID"]) % 40_000
            return Cluster(
                int(environment["SLURM_PROCID"]),
                int(environment.get("SLURM_LOCALID", 0)),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                f"tcp://{_first_host(environment['SLURM_STEP_NODELIST'])}:{port}",
            )
        return None


def mesh_of(cp: int | None, dp: int | None) -> Mesh:
    """The mesh that is asked for. Under torchrun or Slurm what was left open follows from their processes.

    Raises ValueError where their number does not fit.
    """
    cluster = Cluster.found()
    if cluster is None:
        return Mesh(dp=dp or 1, cp=cp or 1)
    wanted = Mesh(dp=dp or max(1, cluster.world // (cp or 1)), cp=cp or (cluster.world // dp if dp else 1))
    if wanted.world != cluster.world:
        raise ValueError(
            f"dp={wanted.dp} and cp={wanted.cp} make {wanted.world} ranks, and {cluster.world} processes were started; "
            "start as many, or leave dp out"
        )
    return wanted


def launch(work: Callable, *arguments, mesh: Mesh, trainer):
    """work(ranks, *arguments) on every rank of the mesh; returns what the first rank returns.

    work: a function of an importable module; arguments and result are pickled. trainer: its device and timeout, the
    seconds after which waiting for other ranks is an error. Raises what a rank raised where the user can repair it
    (ValueError, OSError), RankFailed for anything else, KeyboardInterrupt or SystemExit(143) after Ctrl-C or SIGTERM,
    once the ranks have saved.
    """
    if mesh.world == 1 and Cluster.found() is None:
        return work(Ranks(), *arguments)
    device, timeout = choose_device(trainer.device).type, trainer.timeout
    if (cluster := Cluster.found()) is not None:
        return _as_member(cluster, work, arguments, mesh, device, timeout)
    if device == "cuda" and mesh.world > (gpus := torch.cuda.device_count()):
        raise ValueError(
            f"{mesh} asks for {mesh.world} GPUs, and this machine has {gpus}; use trainer.device=cpu or less"
        )
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch, _import_path():
        folder = Path(scratch)
        (folder / "work").write_bytes(pickle.dumps((work, arguments)))
        # joblib's workers leave a start method behind that children cannot import.
        multiprocessing.set_start_method("forkserver", force=True)
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([*PRELOADED, work.__module__])
        shared = (str(folder), mesh, device, timeout, dict(os.environ), os.getcwd())
        ranks = [processes.Process(target=_run_rank, args=(rank, *shared)) for rank in range(mesh.world)]
        with _asked_to_stop() as asked:
            try:
                for rank in ranks:
                    rank.start()
                _watch(ranks, asked)
                _raise_failure(ranks, folder, asked)
            finally:
                _end(ranks)
        if asked:
            raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])
        return pickle.loads((folder / "result").read_bytes())


def _run_rank(rank: int, scratch: str, mesh: Mesh, device: str, timeout: float, environment: dict, cwd: str) -> None:
    """The whole life of a rank."""
    folder = Path(scratch)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher passes it on
    with open(folder / f"stack_{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        torch.set_num_threads(threads_per_rank(mesh.world))
        try:
            work, arguments = pickle.loads((folder / "work").read_bytes())
            _take_device(device, rank)
            join(rank, mesh.world, method=f"file://{folder}/rendezvous", device=device, timeout=timeout)
            result = work(Ranks(mesh, rank), *arguments)
            if rank == 0:
                (folder / "result").write_bytes(pickle.dumps(result))
        except (KeyboardInterrupt, SystemExit):  # asked to stop, and saved
            os._exit(0)
        except BaseException as error:
            _write_error(folder, rank, error)
            sys.stdout.flush()
            os._exit(1)
        dist.destroy_process_group()


def threads_per_rank(world: int) -> int:
    """CPU threads of each of `world` ranks on this machine: together no more than there are cores."""
    return max(1, len(os.sched_getaffinity(0)) // world)


def _write_error(folder: Path, rank: int, error: BaseException) -> None:
    repairable = isinstance(error, ValueError | OSError) and not _is_timeout(error)
    content = {
        "rank": rank,
        "kind": type(error).__name__ if repairable else None,
        "message": str(error),
        "traceback": traceback.format_exc(),
        "waited": _is_timeout(error),
    }
    beside = folder / f".error_{rank}"
    beside.write_text(json.dumps(content))
    os.replace(beside, folder / f"error_{time.time_ns()}_{rank}")


def _is_timeout(error: BaseException) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in type(error).__name__.lower()


def _watch(ranks: Sequence, asked: list[int]) -> None:
    """Until all ranks are done, one has failed, or those asked to stop had their time."""
    passed_on, deadline = 0, None
    while True:
        alive = [rank for rank in ranks if rank.exitcode is None]
        if not alive or any(rank.exitcode for rank in ranks):
            return
        if len(asked) > passed_on:
            if passed_on:  # asked twice: at once
                return
            passed_on, deadline = 1, time.monotonic() + GRACE
            for rank in alive:
                rank.terminate()
        if deadline is not None and time.monotonic() > deadline:
            return
        wait([rank.sentinel for rank in alive], timeout=0.2)


def _raise_failure(ranks: Sequence, folder: Path, asked: list[int]) -> None:
    """Says why a rank failed, if one did: killed from outside, else the first that wrote an error."""
    if asked or not any(rank.exitcode for rank in ranks):
        return
    time.sleep(SETTLING)
    killed = [(number, -rank.exitcode) for number, rank in enumerate(ranks) if (rank.exitcode or 0) < 0]
    if killed:
        number, code = killed[0]
        why = " (the machine may be out of memory: fewer ranks, or a smaller trainer.batch_size or model/size)"
        raise RankFailed(
            f"rank {number} of {len(ranks)} was killed by {signal.Signals(code).name}"
            f"{why if code == signal.SIGKILL else ''}; go on from its last checkpoint with resume=<output folder>"
        )
    errors = [json.loads(path.read_text()) for path in sorted(folder.glob("error_*"))]
    if not errors:
        codes = ", ".join(f"rank {number}: {rank.exitcode}" for number, rank in enumerate(ranks) if rank.exitcode)
        raise RankFailed(f"a rank ended without saying why (exit codes {codes})")
    first = errors[0]
    if first["kind"] is not None:
        raise OSError(first["message"]) if first["kind"] != "ValueError" else ValueError(first["message"])
    if first["waited"]:
        raise RankFailed(_waiting(first, ranks, folder))
    raise RankFailed(f"rank {first['rank']} of {len(ranks)} failed first:\n{first['traceback']}")


def _waiting(first: dict, ranks: Sequence, folder: Path) -> str:
    """Which rank waited where, and where those that kept it waiting are."""
    stacks = []
    for rank in ranks:
        if rank.exitcode is None:
            os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(SETTLING)
    for number, rank in enumerate(ranks):
        text = (folder / f"stack_{number}").read_text()
        if rank.exitcode is None and text:
            stacks.append(f"rank {number} was at:\n{text}")
    return "\n".join(
        [f"rank {first['rank']} of {len(ranks)} waited in vain for the others at:\n{first['traceback']}", *stacks]
    )


def _end(ranks: Sequence) -> None:
    """No process stays."""
    started = [rank for rank in ranks if rank.pid is not None]
    for rank in started:
        if rank.exitcode is None:
            rank.kill()
    for rank in started:
        rank.join(10)


@contextmanager
def _asked_to_stop():
    """The signals of Ctrl-C and of a scheduler, collected instead of obeyed."""
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _import_path():
    """The fork server is started from the working directory, which need not be the repository."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _as_member(cluster: Cluster, work: Callable, arguments, mesh: Mesh, device: str, timeout: float):
    """This process is one of those that torchrun or Slurm started."""
    _take_device(device, cluster.local_rank)
    join(cluster.rank, cluster.world, method=cluster.method, device=device, timeout=timeout)
    try:
        result = work(Ranks(mesh, cluster.rank), *arguments)
    except Exception as error:
        store = dist.distributed_c10d._get_default_store()
        if store.add("failed", 1) == 1:  # the others fail because of this one
            raise
        print(f"rank {cluster.rank} ended after another one failed ({type(error).__name__})", file=sys.stderr)
        os._exit(1)
    dist.destroy_process_group()
    return result


def _take_device(device: str, local_rank: int) -> None:
    if device == "cuda":
        torch.cuda.set_device(local_rank)


def _first_host(nodes: str) -> str:
    """The first of Slurm's compressed list of hosts, like node[01-04,07]."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if found.returncode or not found.stdout.split():
        raise ValueError(f"the hosts {nodes} of this Slurm job cannot be read (scontrol said {found.stderr.strip()!r})")
    return found.stdout.split()[0]
