"""The device that arithmetic is done on."""

import torch

from deltacome.errors import DeltacomeError

CPU = torch.device("cpu")


def choose_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default a GPU if there is one, else the CPU.

    Raises:
        DeltacomeError: if there is no such device here.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise DeltacomeError(f"there is no device {wanted!r}; choose cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise DeltacomeError(f"deltacome does not compute on {device}; choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeltacomeError(f"torch sees no device {device} here; choose cpu, or install torch for your GPU")
    return device
