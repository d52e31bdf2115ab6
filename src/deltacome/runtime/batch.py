"""Which tenant each row of the running batch belongs to."""

from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.runtime.tenant import Change, Tenant

Rows = TypeVar("Rows")


class Batch:
    """The tenant of each row, None for the base, and what the modules prepared for these rows.

    It belongs to one call, or to one caller who makes calls with the same tenants one after another: what is prepared
    depends on how many tokens a row has, and two calls at once would take each other's.
    """

    def __init__(self, tenants: tuple[Tenant | None, ...]) -> None:
        self.tenants = tenants
        self._of_steps: dict[Hashable, Any] = {}
        self._of_prompts: dict[Hashable, Any] = {}
        self._tokens = 1
        self._rows: dict[Tenant, list[int]] = {}
        for row, tenant in enumerate(tenants):
            if tenant is not None:
                self._rows.setdefault(tenant, []).append(row)

    def __len__(self) -> int:
        """How many rows it has."""
        return len(self.tenants)

    def prepared(self, key: Hashable, make: Callable[[], Any], tokens: int = 1) -> Any:
        """What `make` returned when the key was first asked for.

        tokens: in a row, if it depends on that: of prompts, whose lengths are many, only the last length's is there.
        """
        if tokens > 1 and tokens != self._tokens:
            self._of_prompts.clear()
            self._tokens = tokens
        prepared = self._of_steps if tokens == 1 else self._of_prompts
        if key not in prepared:
            prepared[key] = make()
        return prepared[key]

    def changes(self, module_name: str) -> list[tuple[Change, list[int]]]:
        """The changes of the batch's tenants in a module, each with the rows that it is for."""
        return _of_module(module_name, self._rows)

    def token_changes(self, module_name: str, tokens: int, device: torch.device) -> list[tuple[Change, Tensor]]:
        """As `changes`, with the rows of `tenant_rows`."""
        return _of_module(module_name, self.tenant_rows(tokens, device))

    def tenant_rows(self, tokens: int, device: torch.device) -> dict[Tenant, Tensor]:
        """The tenants, each with its `token_rows`, the same tensors whoever asks."""

        def make() -> dict[Tenant, Tensor]:
            return {tenant: self.token_rows(rows, tokens, device) for tenant, rows in self._rows.items()}

        found: dict[Tenant, Tensor] = self.prepared(("rows of tenants", device), make, tokens)
        return found

    def of_size(self, size: int) -> "Batch":
        """The batch with every row repeated so often that there are `size`: beams, or several answers to a prompt.

        Raises:
            DeltacomeError: if that is not possible.
        """
        count = len(self)
        if size == count:
            return self
        if size % count:
            raise DeltacomeError(f"{count} tenants for a batch of {size} rows; name one, or None, for each row")
        repeated = tuple(tenant for tenant in self.tenants for _ in range(size // count))
        return self.prepared(("size", size), lambda: Batch(repeated))

    def token_rows(self, rows: list[int], tokens: int, device: torch.device) -> Tensor:
        """The numbers of the rows of a (batch * tokens, n) matrix that belong to those rows of the batch."""

        def make() -> Tensor:
            starts = torch.tensor(rows, device=device) * tokens
            return (starts[:, None] + torch.arange(tokens, device=device)).reshape(-1)

        return self.prepared(("rows", *rows, device), make, tokens)


def _of_module(name: str, rows: Mapping[Tenant, Rows]) -> list[tuple[Change, Rows]]:
    return [(change, own) for tenant, own in rows.items() if (change := tenant.changes.get(name)) is not None]


running: ContextVar[Batch | None] = ContextVar("running", default=None)
