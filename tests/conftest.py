"""One thread for the suite and what it starts: tensors are tiny here, and waiting threads cost more than they give."""

import importlib
import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, here and in child processes

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts jobs in the background, and those their own
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def determinism_as_it_was():
    """A training loop asks its process for deterministic sums; the next test starts as if alone."""
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a script of the repository in this process, from an empty folder; returns (exit code, stdout, stderr)."""
    from training import command_line

    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        code = 0
        try:
            if script == "train":
                command_line.run(module.train, rewrite=module.arguments.rewrite, finish=module.sweep.finish)
            else:
                command_line.run(module.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def eccodes():
    """The library that reads BUFR; tests without it are skipped."""
    try:
        import eccodes
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the extra bufr is not installed: {error}")
    return eccodes
