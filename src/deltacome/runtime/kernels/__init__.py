"""The kernels: `Work(deltas).add(y, x)` of a module each, chosen by device."""

from importlib import import_module
from typing import Any

BACK_ENDS = {"cpu": "cpu", "cuda": "triton"}


def kernels_for(device_type: str) -> Any:
    """The module whose `Work` computes on devices of that type; `reference` where there is no faster one."""
    return import_module(f"{__name__}.{BACK_ENDS.get(device_type, 'reference')}")
