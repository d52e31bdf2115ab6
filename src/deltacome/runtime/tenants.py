"""The deltas of a model by name."""

import copy
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.rebuilding import sidecars
from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.language import end_tokens
from deltacome.memory import is_out_of_memory
from deltacome.restore.merging import open_checked
from deltacome.runtime.batch import Batch, running
from deltacome.runtime.kernels import kernels_for
from deltacome.runtime.modules import install, model_table, share_inputs
from deltacome.runtime.tenant import Tenant, check_config, load_tenant

TenantNames = Sequence[str | Tenant | None]


class Tenants:
    """The deltas of a model by name: `model.tenants`, for any thread.

    checkpoint: the base's; without it there is no `read`, and so no `add`.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint | None) -> None:
        self._model, self.checkpoint = model, checkpoint
        self._by_name: dict[str, Tenant] = {}
        self._calls_of: Counter[Tenant] = Counter()
        self._busy: set[Batch] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tenants":
        """Of a copied model: the same tenants, which come and go in each on their own."""
        new = memo[id(self)] = Tenants(copy.deepcopy(self._model, memo), self.checkpoint)
        new._by_name = self.by_name()
        return new

    def by_name(self) -> dict[str, Tenant]:
        """The known tenants, as they are now."""
        return dict(self._by_name)

    def add(self, name: str, folder: str | Path) -> None:
        """Load a compressed delta and make it known under its name.

        Raises:
            DeltacomeError: as `read`.
        """
        self.put(self.read(name, folder))

    def read(self, name: str, folder: str | Path) -> Tenant:
        """Load a compressed delta and make the model ready for it, without making its name known.

        Raises:
            DeltacomeError: if it is broken, of another base, or does not fit; the model is as it was before.
        """
        assert self.checkpoint is not None
        artifact = open_checked(self.checkpoint, folder)
        check_config(artifact, self.checkpoint)
        try:
            tenant = load_tenant(name, artifact, self._model, self._model.device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeltacomeError(f"not enough memory for {folder}; remove another delta first") from error
        tenant = replace(tenant, ends=frozenset(_end_tokens(artifact, self.checkpoint)))
        self._install(tenant)
        return tenant

    def put(self, tenant: Tenant) -> None:
        """Make a tenant known under its name, in place of one that has it already."""
        self._install(tenant)
        with self._lock:
            self._by_name[tenant.name] = tenant

    def remove(self, name: str) -> None:
        """Forget a tenant; its memory is free when no `Batch` has it any more.

        Raises:
            DeltacomeError: if there is none of that name, or a running call uses it.
        """
        with self._lock:
            tenant = self._get(name)
            if self._calls_of[tenant]:
                raise DeltacomeError(f"{name} is in use by a running call; remove it when that has returned")
            del self._by_name[name]

    def batch_of(self, tenants: TenantNames) -> Batch:
        """A batch with those tenants, a row each, for the `tenants=` of several calls one after another.

        What the first call prepares serves the others. Who calls with names gets a new batch each time.

        Raises:
            DeltacomeError: if there is no tenant of a name.
        """
        with self._lock:
            return self._batch_of(tenants)

    @contextmanager
    def run(self, tenants: TenantNames | Batch) -> Iterator[None]:
        """Make a batch, or one of those tenants, the running one; until the end its tenants cannot be removed.

        Raises:
            DeltacomeError: if there is no tenant of a name, or another call runs with that batch.
        """
        with self._lock:
            batch = tenants if isinstance(tenants, Batch) else self._batch_of(tenants)
            if batch in self._busy:
                raise DeltacomeError("a batch is for one call at a time; make one for each thread")
            self._busy.add(batch)
            used = {tenant for tenant in batch.tenants if tenant is not None}
            self._calls_of.update(used)
        token = running.set(batch)
        try:
            yield
        finally:
            running.reset(token)
            with self._lock:
                self._busy.remove(batch)
                self._calls_of.subtract(used)
                self._calls_of += Counter()  # drop those at zero

    def _install(self, tenant: Tenant) -> None:
        kernels = kernels_for(self._model.device.type)
        for module_name in tenant.changes:
            install(module_name, self._model.get_submodule(module_name), kernels)
        share_inputs(self._model, kernels)
        if hasattr(kernels, "ModelTable"):
            model_table(tenant, kernels)  # now, and not when the first batch has the tenant

    def _batch_of(self, tenants: TenantNames) -> Batch:
        return Batch(tuple(self._get(tenant) if isinstance(tenant, str) else tenant for tenant in tenants))

    def _get(self, name: str) -> Tenant:
        if name not in self._by_name:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise DeltacomeError(f"there is no tenant {name!r}; those loaded are: {known}")
        return self._by_name[name]


def _end_tokens(artifact: Artifact, base: Checkpoint) -> set[int]:
    """Those that the fine-tuned model's configuration names."""

    found = sidecars(artifact, base)
    return end_tokens(found.get("generation_config.json"), found.get("config.json"))
