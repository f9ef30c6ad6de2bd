"""Starts the ranks of a run from one plain `python` call, or joins those that torchrun or Slurm started.

Ranks are processes of a fork server that has imported torch once: eight of them are ready in seconds, also on two
cores. The first failure is what the user sees, alone: every rank writes what went wrong before it leaves, and nobody
tears the process group down, which would make healthy ranks fail first.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from data.started_processes import end_with_parent
from training.cluster import Cluster, cores_per_rank, prepended, repository_importable
from training.devices import choose_device
from training.interruption import Interruption
from training.rank_failure import explain, record, stack_file
from training.ranks import Mesh, Ranks, join

PRELOADED = ("torch", "torch.distributed", "training.run", "training.parallel")
GRACE = 60.0  # seconds in which ranks finish their step and save when asked to stop
FAREWELL = 20.0  # seconds in which the first rank, once another one failed, closes its files and its MLflow run
STOP = "stop"  # file: the ranks were asked to stop


def mesh_of(cp: int | None, dp: int | None) -> Mesh:
    """The mesh that is asked for. Under torchrun or Slurm what was left open follows from their processes.

    Raises ValueError where their number does not fit.
    """
    for name, size in (("cp", cp), ("dp", dp)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    cluster = Cluster.found()
    if cluster is None:
        return Mesh(dp=dp or 1, cp=cp or 1)
    for name, size in (("cp", cp), ("dp", dp)):
        if size is not None and cluster.world % size:
            raise ValueError(
                f"{name}={size} does not divide the {cluster.world} processes that were started; start a multiple of "
                f"{size}"
            )
    if cp is None:
        return Mesh(dp=dp or cluster.world, cp=cluster.world // (dp or cluster.world))
    wanted = Mesh(dp=dp or cluster.world // cp, cp=cp)
    if wanted.world != cluster.world:
        raise ValueError(
            f"{wanted} needs {wanted.world} processes, and {cluster.world} were started; start {wanted.world}"
        )
    return wanted


def launch(work: Callable, *arguments, mesh: Mesh, trainer):
    """work(ranks, *arguments) on every rank of the mesh; returns what the first rank returns.

    work: a function of an importable module; arguments and result are pickled. trainer: its device and timeout, the
    seconds after which waiting for other ranks is an error. Raises what a rank raised where the user can repair it
    (ValueError with the sentence), RankFailed for anything else, KeyboardInterrupt or SystemExit(143) after Ctrl-C or
    SIGTERM, once the ranks have saved.
    """
    cluster = Cluster.found()
    if cluster is None and mesh.world == 1:
        return work(Ranks(), *arguments)
    device = choose_device(trainer.device).type
    if cluster is not None:
        return _as_member(cluster, work, arguments, mesh, device, trainer.timeout)
    if device == "cuda" and mesh.world > (gpus := torch.cuda.device_count()):
        raise ValueError(
            f"{mesh} asks for {mesh.world} GPUs, and this machine has {gpus}; use trainer.device=cpu or fewer ranks"
        )
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch, _importable_start_method():
        folder = Path(scratch)
        (folder / "work").write_bytes(pickle.dumps((work, arguments)))
        _start_server(work.__module__)
        shared = (str(folder), mesh, device, trainer.timeout, dict(os.environ), os.getcwd())
        processes = multiprocessing.get_context("forkserver")
        ranks = [processes.Process(target=_run_rank, args=(rank, *shared)) for rank in range(mesh.world)]
        with Interruption() as interruption:
            try:
                for rank in ranks:
                    rank.start()
                _watch(ranks, folder, interruption)
                result = folder / "result"
                if result.exists() and not any(rank.exitcode for rank in ranks):
                    return pickle.loads(result.read_bytes())
                if interruption.asked is None:
                    ranks[0].join(FAREWELL)
                    raise explain(ranks, folder)
            finally:
                _end(ranks)
        interruption.end()


def threads_per_rank(world: int) -> int:
    """CPU threads of each of `world` ranks on this machine: together no more than there are cores."""
    return min(torch.get_num_threads(), cores_per_rank(world))


def _run_rank(rank: int, scratch: str, mesh: Mesh, device: str, timeout: float, environment: dict, cwd: str) -> None:
    """The whole life of a rank."""
    folder = Path(scratch)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher passes it on
    signal.signal(signal.SIGTERM, _stop)
    end_with_parent()
    with open(stack_file(folder, rank), "w") as stack:
        faulthandler.enable(file=stack)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        torch.set_num_threads(threads_per_rank(mesh.world))
        if rank > 0:
            warnings.simplefilter("ignore")  # the first rank says it
        try:
            if (folder / STOP).exists():  # asked before this process could listen
                _stop()
            work, arguments = pickle.loads((folder / "work").read_bytes())
            _take_device(device, rank)
            join(rank, mesh.world, method=f"file://{folder}/rendezvous", device=device, timeout=timeout)
            result = work(Ranks(mesh, rank), *arguments)
            if rank == 0:
                (folder / "result").write_bytes(pickle.dumps(result))
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit) and (folder / STOP).exists()
            if not stopped:
                record(folder, rank, error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0 if stopped else 1)
        dist.destroy_process_group()


def _stop(*_) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _start_server(module: str) -> None:
    """The fork server, unless it runs; it lives as long as this process, and its next ranks are ready at once."""
    forkserver.set_forkserver_preload([*PRELOADED, module])
    # Its helper removes the semaphores of killed processes, which needs no warning.
    quiet = prepended("PYTHONWARNINGS", "ignore:resource_tracker", ",")
    with _ignoring(signal.SIGINT, signal.SIGTERM), repository_importable(), quiet:
        forkserver.ensure_running()


def _watch(ranks: Sequence, folder: Path, interruption: Interruption) -> None:
    """Until all ranks are done, one has failed, or those asked to stop had their time."""
    deadline = None
    while alive := [rank for rank in ranks if rank.exitcode is None]:
        if time.monotonic() > deadline if deadline else any(rank.exitcode for rank in ranks):
            return
        if deadline is None and interruption.asked is not None:
            deadline = time.monotonic() + GRACE
            (folder / STOP).touch()
            for rank in alive:
                rank.terminate()
        wait([rank.sentinel for rank in alive], timeout=0.2)


def _end(ranks: Sequence) -> None:
    """No process stays."""
    started = [rank for rank in ranks if rank.pid is not None]
    for rank in started:
        rank.kill()
    for rank in started:
        rank.join()
        rank.close()


@contextmanager
def _ignoring(*signals: int):
    """What is started inside ignores these signals. Outside the main thread, where Python lets nobody, nothing
    changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _importable_start_method():
    """Ranks take over the start method of this process; that of joblib's workers they could not import."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _as_member(cluster: Cluster, work: Callable, arguments, mesh: Mesh, device: str, timeout: float):
    """This process is one of those that torchrun or Slurm started."""
    _take_device(device, cluster.local_rank)
    if not cluster.is_first:
        warnings.simplefilter("ignore")
    join(cluster.rank, cluster.world, method=cluster.method, device=device, timeout=timeout)
    try:
        result = work(Ranks(mesh, cluster.rank), *arguments)
    except Exception as error:
        if _is_first_failure():
            raise
        print(f"rank {cluster.rank} ended after another one failed ({type(error).__name__})", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()
    return result


def _is_first_failure() -> bool:
    """Whether no other rank of the process group has failed before; the others fail because of the first."""
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the first rank, which holds the count, is gone
        return False


def _take_device(device: str, local_rank: int) -> None:
    """Raises ValueError where this machine has no GPU for one more process."""
    if device != "cuda":
        return
    gpus = torch.cuda.device_count()
    if gpus > 1 and local_rank >= gpus:
        raise ValueError(f"process {local_rank + 1} of this machine needs a GPU, and there are {gpus}; start {gpus}")
    torch.cuda.set_device(local_rank if gpus > 1 else 0)  # a scheduler may show each process one GPU only
