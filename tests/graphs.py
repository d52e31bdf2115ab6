"""What a CUDA graph does of the GPU kernel, without a GPU: launches recorded, and made again on the same memory."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

# What makes the host wait for the device, or depends on values: neither can be captured.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero")


class Watched(TorchDispatchMode):
    """Watches a block. forbidden: torch's operators in it that no graph can have."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if any(name in str(function) for name in FORBIDDEN):
            self.forbidden.append(str(function))
        return function(*arguments, **(named or {}))


class Captured(Watched):
    """Records the launches of a block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.launches: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []
        self._patch = monkeypatch

    def __enter__(self) -> "Captured":
        from deltacome.runtime.kernels import programs

        for name in ("prepare", "inner", "scale", "outer", "finish"):
            self._patch.setattr(programs, name, _Recorder(getattr(programs, name), self.launches))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patch.undo()

    def replay(self) -> None:
        for kernel, grid, arguments, named in self.launches:
            kernel[grid](*arguments, **named)


class _Recorder:
    """A kernel whose launches are noted."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launches.append((self.kernel, grid, arguments, named))

        return launch
