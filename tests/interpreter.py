"""Tests of Triton kernels without a GPU: run by Triton's interpreter, which a process chooses before it imports Triton.

Tests that need it carry `interpreted`, and each file has one test that runs them in a process of their own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kernels.dispatch import INTERPRETED

needs_triton = pytest.mark.skipif(
    INTERPRETED or find_spec("triton") is None, reason="needs Triton (pip install '.[triton]'), not its interpreter"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs under Triton's interpreter, in a process of its own")


def run_interpreted(file: str) -> None:
    """Runs the interpreted tests of a file; fails with their output."""
    assert not INTERPRETED, "processes would start each other without end"
    command = [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", "-m", "not slow", "--show-capture=no"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
