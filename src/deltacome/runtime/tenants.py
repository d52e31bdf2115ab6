"""The deltas of a model by name."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.restore.merging import open_checked
from deltacome.runtime.batch import Batch, running
from deltacome.runtime.kernels import kernels_for
from deltacome.runtime.modules import install
from deltacome.runtime.tenant import Tenant, check_config, load_tenant

Names = Sequence[str | Tenant | None]
KEPT_BATCHES = 8  # combinations of tenants whose preparations are kept for the next call


class Tenants:
    """The deltas of a model by name."""

    def __init__(self, model: Any, checkpoint: Checkpoint | None) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.by_name: dict[str, Tenant] = {}
        self.in_use: Counter[Tenant] = Counter()
        self.lock = threading.Lock()
        self._batches: OrderedDict[tuple[Tenant | None, ...], Batch] = OrderedDict()

    def add(self, name: str, folder: str | Path) -> None:
        """See `add_delta` below."""
        self.put(self.read(name, folder))

    def read(self, name: str, folder: str | Path) -> Tenant:
        """Load a compressed delta and make the model ready for it, without making its name known.

        Raises:
            DeltacomeError: as `add_delta`.
        """
        assert self.checkpoint is not None
        artifact = open_checked(self.checkpoint, folder)
        check_config(artifact, self.checkpoint)
        try:
            tenant = load_tenant(name, artifact, self.model, self.model.device)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            raise DeltacomeError(f"not enough memory for {folder}; remove another delta first") from error
        self._install(tenant)
        return tenant

    def put(self, tenant: Tenant) -> None:
        """Make a tenant known under its name."""
        self._install(tenant)
        with self.lock:
            self.by_name[tenant.name] = tenant
            self._batches.clear()  # they would keep a replaced one alive

    def _install(self, tenant: Tenant) -> None:
        kernels = kernels_for(self.model.device.type)
        for module_name in tenant.changes:
            install(module_name, self.model.get_submodule(module_name), kernels)

    def forget_batches(self) -> None:
        """Drop what is kept for the next calls, and with it tenants that nobody knows any more."""
        with self.lock:
            self._batches.clear()

    def remove(self, name: str) -> None:
        """See `remove_delta` below."""
        with self.lock:
            tenant = self._get(name)
            if self.in_use[tenant]:
                raise DeltacomeError(f"{name} is in use by a running call; remove it when that has returned")
            del self.by_name[name]
            self._batches.clear()

    def _get(self, name: str) -> Tenant:
        if name not in self.by_name:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise DeltacomeError(f"there is no tenant {name!r}; those loaded are: {known}")
        return self.by_name[name]

    @contextmanager
    def batch(self, tenants: Names) -> Iterator[None]:
        """The batch of those tenants is the running one."""
        with self.lock:
            found = tuple(self._get(name) if isinstance(name, str) else name for name in tenants)
            used = {tenant for tenant in found if tenant is not None}
            self.in_use.update(used)
            batch = self._batches.pop(found, None) or Batch(found)
            self._batches[found] = batch
            while len(self._batches) > KEPT_BATCHES:
                self._batches.popitem(last=False)
        token = running.set(batch)
        try:
            yield
        finally:
            running.reset(token)
            with self.lock:
                self.in_use.subtract(used)
                self.in_use += Counter()  # drop those at zero
