"""Slurm's commands as far as submitit calls them: jobs run at once on this machine, in the background.

Called as `<this file> sbatch|srun|scontrol|sacct ...`. Files of the folder SLURM_STAND_IN tell what was asked for:
`script_<job>`, and `requeue_<job>` for a job that shall start again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["SLURM_STAND_IN"])


def sbatch(script: str) -> None:
    """Starts every task of the job array, or the only one."""
    text = Path(script).read_text()
    (FOLDER / "script_41").write_text(text)
    tasks = re.search(r"--ntasks-per-node=(\d+)", text)
    environment = os.environ | {"SLURM_STEP_NUM_TASKS": tasks.group(1) if tasks else "1", "SLURM_STEP_ID": "0"}
    environment |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    array = re.search(r"--array=0-(\d+)", text)
    for number in range(int(array.group(1)) + 1 if array else 1):
        job = {"SLURM_JOB_ID": str(41 + number)}
        if array:
            job |= {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": str(number)}
        subprocess.Popen(
            [sys.executable, __file__, "slurmd", script],
            env=environment | job,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print("Submitted batch job 41")


def slurmd(script: str) -> None:
    """One job, again and again while it asks for it."""
    requeue = FOLDER / f"requeue_{os.environ['SLURM_JOB_ID']}"
    for count in range(3):
        subprocess.run(["bash", script], env=os.environ | {"SLURM_RESTART_COUNT": str(count)}, check=False)
        if not requeue.exists():
            return
        requeue.unlink()


def srun(*arguments: str) -> None:
    command = arguments.index(sys.executable)
    options = list(arguments[:command])
    names = {"%t": "0", "%j": os.environ["SLURM_JOB_ID"]}
    names |= {"%A": os.environ.get("SLURM_ARRAY_JOB_ID", ""), "%a": os.environ.get("SLURM_ARRAY_TASK_ID", "")}
    tasks = []
    for rank in range(int(os.environ["SLURM_STEP_NUM_TASKS"])):
        names["%t"] = str(rank)
        out, err = (
            re.sub("%[tjAa]", lambda found: names[found.group()], options[options.index(name) + 1])
            for name in ("--output", "--error")
        )
        local = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        with open(out, "a") as out, open(err, "a") as err:
            tasks.append(subprocess.Popen(arguments[command:], env=os.environ | local, stdout=out, stderr=err))
    for task in tasks:
        task.wait()


def scontrol(verb: str, job: str) -> None:
    assert verb == "requeue"
    (FOLDER / f"requeue_{job}").touch()


def sacct(*_: str) -> None:
    print("JobID|State|NodeList\n41|RUNNING|localhost")


if __name__ == "__main__":
    {"sbatch": sbatch, "slurmd": slurmd, "srun": srun, "scontrol": scontrol, "sacct": sacct}[sys.argv[1]](*sys.argv[2:])
