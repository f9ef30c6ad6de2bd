"""One thread for the suite and what it starts: tensors are tiny here, and waiting threads cost more than they give."""

import os
import signal

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
