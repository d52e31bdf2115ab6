"""The kernels: `Work(deltas).add(y, x)` of a module each, chosen by device."""

from importlib import import_module
from typing import Any

BACK_ENDS = {"cpu": "cpu", "cuda": "triton"}


def kernels_for(device_type: str) -> Any:
    """The module whose `Work` computes on devices of that type; `reference` where there is no faster one.

    Compiles it for this machine if that has not been done, which takes the CPU's half a minute.
    """
    module = import_module(f"{__name__}.{BACK_ENDS.get(device_type, 'reference')}")
    if hasattr(module, "compile_all"):
        module.compile_all()
    return module
