"""Processes that something else started: torchrun, or Slurm's srun, also through submitit; what all of them need.

Imports nothing heavy: the command line asks before anything else is loaded.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST_PORT, PORTS = 10_000, 20_000  # below those that systems hand out by themselves


@dataclass(frozen=True)
class Cluster:
    """This process among them. local_rank, local_world: among those of its machine. method: how they find each other,
    see torch."""

    rank: int
    local_rank: int
    local_world: int
    world: int
    method: str

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @staticmethod
    def found() -> Cluster | None:
        """What the environment says, or None: this process is alone."""
        environment = os.environ
        if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local_rank, local_world = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", world)
            return Cluster(rank, int(local_rank), int(local_world), world, "env://")
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            # Every task comes to the same port; steps of a job, which may share a machine, to different ones.
            world = int(environment["SLURM_STEP_NUM_TASKS"])
            here = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # like 4(x2)
            number = int(environment["SLURM_JOB_ID"]) + 7919 * int(environment.get("SLURM_STEP_ID", 0))
            return Cluster(
                int(environment["SLURM_PROCID"]),
                int(environment.get("SLURM_LOCALID", 0)),
                int(here[0]) if here else world,
                world,
                f"tcp://{first_host(environment['SLURM_STEP_NODELIST'])}:{FIRST_PORT + number % PORTS}",
            )
        return None


def ranks_here(world: int) -> int:
    """How many of the ranks of a run share this machine."""
    cluster = Cluster.found()
    return world if cluster is None else min(world, cluster.local_world)


def cores_per_rank(world: int) -> int:
    """CPU cores that each rank of a run may use: together no more than the machine has."""
    if "SLURM_CPUS_PER_TASK" in os.environ and Cluster.found() is not None:
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    return max(1, len(os.sched_getaffinity(0)) // ranks_here(world))


def first_host(nodes: str) -> str:
    """The first of Slurm's compressed list of hosts: node01 of node[01-04,07],login2."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def started_again() -> bool:
    """Whether a scheduler started this job another time, after preemption, a time limit or a failure."""
    return any(int(os.environ.get(name, 0)) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def repository_importable():
    """Processes started inside find the modules of the repository, wherever they are started."""
    return prepended("PYTHONPATH", str(REPOSITORY), os.pathsep)


@contextmanager
def prepended(name: str, value: str, separator: str):
    """A list in the environment that starts with `value`, for processes started inside."""
    before = os.environ.get(name)
    os.environ[name] = separator.join(filter(None, [value, before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
