"""What makes a host wait for a device, forbidden where nothing may wait."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoDataDependence(TorchDispatchMode):
    """Forbids operators that read values or whose shapes follow from values: on a device they wait for it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim", "unique_consecutive")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        if name.startswith(self.FORBIDDEN) or name in ("equal", "repeat_interleave.Tensor", "hydrasphere::occupied"):
            raise AssertionError(f"{name} waits for the device")
        if name.startswith(("index.Tensor", "index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError(f"{name} with a mask waits for the device")
        return function(*args, **(kwargs or {}))
