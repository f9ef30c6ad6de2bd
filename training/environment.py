"""What a run was made of: commit, command, packages and hardware, recorded with every run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def git_commit() -> str:
    """Commit of the code, `+changes` where the working tree differs, `unknown` outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command() -> str:
    import shlex

    return "python " + shlex.join(sys.argv)


def describe() -> str:
    """Python, hardware and every installed package, as text."""
    import torch

    lines = [
        f"python {platform.python_version()} on {platform.platform()}",
        f"cpus {os.cpu_count()}, torch threads {torch.get_num_threads()}",
        *(f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())),
        "",
        *sorted({f"{package.name}=={package.version}" for package in metadata.distributions()}, key=str.lower),
    ]
    return "\n".join(lines) + "\n"


def _git(*arguments: str) -> str:
    finished = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return finished.stdout.strip()
