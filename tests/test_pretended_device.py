"""Models on a device that is not the CPU: nothing they make or look up stays behind. In a process of its own, as the
device that is pretended stays registered."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils import backend_registration

from models.composition import build_from_config
from tests.test_swaps import (
    FIELDS,
    OBSERVED,
    PLANAR,
    RECONSTRUCTED,
    compose,
    masked,
    on_a_plane,
    pairwise,
    tiny_batch,
    with_fields,
    with_observations,
    with_reconstruction,
)

OWN_PROCESS = os.environ.get("PRETENDED_DEVICE") == "1"
able = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"PyTorch {torch.__version__} cannot pretend a device",
)
pretended = pytest.mark.skipif(not OWN_PROCESS, reason="runs in a process of its own")
CASES = [
    *((with_fields, case) for case in pairwise(sorted({(*case[:3], "auto", "auto") for case in FIELDS}))),
    *((on_a_plane, case) for case in PLANAR[::9]),
    *((with_observations, case) for case in pairwise(OBSERVED)),
    *((with_reconstruction, case) for case in RECONSTRUCTED[::4]),
]


@able
@pytest.mark.skipif(OWN_PROCESS, reason="processes would start each other without end")
def test_in_a_process_of_its_own():
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "--show-capture=no"]
    environment = {**os.environ, "PRETENDED_DEVICE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"{len(CASES)} passed" in done.stdout, done.stdout + done.stderr


@able
@pretended
@pytest.mark.parametrize("prepare, case", CASES, ids=lambda part: "-".join(part) if isinstance(part, tuple) else "")
def test_losses_are_those_of_the_cpu(prepare, case):
    from tests.pretended_device import DEVICE, PretendedDevice

    torch.manual_seed(0)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter changes its class
    given, layout = prepare(*case)
    model, batch = build_from_config(compose(given), layout), masked(tiny_batch(layout), torch.nan)

    def loss(batch):
        (target,) = layout.targets
        sums, weights = model.head.loss(model(batch)[target], batch.targets[target])
        return (sums / weights).sum()

    with torch.no_grad():
        expected = loss(batch)
    with PretendedDevice(), torch.autograd.set_multithreading_enabled(False):
        model.to(DEVICE)
        found = loss(batch.to(DEVICE))
        assert found.device == DEVICE
        if case[0] != "monthly_video":  # ends the process in PyTorch's C++
            found.backward()
            assert all(parameter.grad.device == DEVICE for parameter in model.parameters())
    torch.testing.assert_close(found.detach().held, expected, rtol=1e-5, atol=1e-6)
