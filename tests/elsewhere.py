"""A pretended GPU, and a compression on it: its tensors lie on the CPU, and refuse what a real GPU's would refuse.

    python tests/elsewhere.py BASE FINETUNED OUT [METHOD [CALIBRATION]]

In a process of its own: what it does to torch is for nobody else.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # which a mode imports, and which wants the real `Generator`
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "meta"  # a device that every build of torch knows, with autograd, and that is otherwise not used on the way
ANYWHERE = {"_to_copy", "copy_", "index", "index_put_", "_index_put_impl_"}  # which take tensors of both devices
TO_NUMBERS = {torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__}


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; `here` has its values."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Elsewhere":
        found: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=NAME
        )
        found.here = here
        return found

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in TO_NUMBERS:  # which torch does not dispatch
            return function(arguments[0].here)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(options or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return run(function, arguments, options or {})


class Mode(TorchDispatchMode):
    """What makes tensors on the device, too, in the place of the functions that have none to begin with."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return run(function, arguments, options or {})


def run(function: Any, arguments: Any, options: dict[str, Any]) -> Any:
    """An operator of torch's."""
    name = function._schema.name.removeprefix("aten::")
    given = [item for item in tree_flatten((arguments, options))[0] if isinstance(item, torch.Tensor)]
    there = [item for item in given if isinstance(item, Elsewhere)]
    if there and name not in ANYWHERE and any(item.ndim and not isinstance(item, Elsewhere) for item in given):
        raise RuntimeError(f"{name} takes tensors on two devices")
    wanted = options.get("device")
    is_there = wanted.type == NAME if wanted is not None else bool(there)
    plain = tree_map(lambda item: item.here if isinstance(item, Elsewhere) else item, (arguments, options))
    if wanted is not None:
        plain[1]["device"] = torch.device("cpu")
    result = function(*plain[0], **plain[1])
    if not is_there or (name == "copy_" and not isinstance(arguments[0], Elsewhere)):
        return result
    same = {id(item.here): item for item in there}  # what is changed in place stays the object that it is

    def wrap(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return same[id(item)] if id(item) in same else Elsewhere(item)

    return tree_map(wrap, result)


class Generator(torch.Generator):
    """One for any device."""

    def __new__(cls, device: Any = None) -> "Generator":
        return super().__new__(cls)


def main() -> None:
    from deltacome.compression import executors, pipeline

    base, finetuned, out, method, calibration = [*sys.argv[1:], *([None] * 5)][:5]
    make, to_list = torch.tensor, torch.Tensor.tolist
    threads = partial(ThreadPoolExecutor, initializer=Mode().__enter__)
    with (
        patch.object(pipeline, "choose_device", lambda _: torch.device(NAME)),
        patch.object(executors, "ThreadPoolExecutor", threads),
        patch("torch.Generator", Generator),
        patch("torch.inference_mode", torch.no_grad),
        patch("torch.Tensor.tolist", lambda self: to_list(getattr(self, "here", self))),
        patch("torch.tensor", lambda *numbers, device=None, **options: make(*numbers, **options).to(device)),
        Mode(),
    ):
        ratio = None if method == "bitdelta" else 4
        pipeline.compress(base, finetuned, out, ratio=ratio, method=method, calibration=calibration, warn=sys.exit)


if __name__ == "__main__":
    main()
