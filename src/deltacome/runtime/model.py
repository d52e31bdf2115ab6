"""One base model in memory with any number of compressed deltas, and a tenant for each row of a batch."""

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltacome.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.merging import open_checked
from deltacome.runtime.batch import Batch, running
from deltacome.runtime.kernels import kernels_for
from deltacome.runtime.modules import install
from deltacome.runtime.tenant import Tenant, check_config, load_tenant

Names = Sequence[str | Tenant | None]
KEPT_BATCHES = 8  # combinations of tenants whose preparations are kept for the next call


def load(
    base: str | Path,
    deltas: Mapping[str, str | Path] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a base as a transformers model that serves compressed deltas of it beside each other.

    `model.generate(..., tenants=["math", None])` and `model(..., tenants=[...])` take the name of a delta, or None for
    the base, for each row of the batch (or, instead of a name, what `model.deltas` has for it); without `tenants` every
    row is the base's. `model.add_delta(name, folder)` and `model.remove_delta(name)` change what is there at any time,
    from any thread; `model.deltas` lists it.

    Args:
        base: a checkpoint folder or hub id.
        deltas: compressed deltas of that base by name.
        device: a GPU where there is one, else the CPU.
        dtype: to compute in; the checkpoint's own on a GPU, float32 on the CPU.

    Raises:
        DeltacomeError: if transformers cannot load the base, or a delta is broken, of another base, or has changes
            that can only be merged.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = Checkpoint(base)
    model = _load_base(checkpoint, dtype or (torch.float32 if place.type == "cpu" else None)).to(place).eval()
    share(model, checkpoint)
    for name, folder in (deltas or {}).items():
        model.add_delta(name, folder)
    return model


def share(model: Any, checkpoint: Checkpoint | None) -> None:
    """Turn a transformers model into one that takes tenants; without its checkpoint, only through `put`."""
    model.requires_grad_(False)
    model.__class__ = _with_tenants(type(model))
    model._tenants = Tenants(model, checkpoint)


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


def _with_tenants(model_class: Any) -> Any:
    """The model class with `tenants` in `forward` and `generate`, and deltas to add and remove."""

    @functools.wraps(model_class.forward)
    def forward(self: Any, *arguments: Any, tenants: Names | None = None, **options: Any) -> Any:
        if tenants is not None:
            with _named(self, tenants, _rows(arguments, options)):
                return model_class.forward(self, *arguments, **options)
        batch = running.get()
        if batch is None:
            return model_class.forward(self, *arguments, **options)
        token = running.set(batch.of_size(_rows(arguments, options)))
        try:
            return model_class.forward(self, *arguments, **options)
        finally:
            running.reset(token)

    @functools.wraps(model_class.generate)
    def generate(self: Any, *arguments: Any, tenants: Names | None = None, **options: Any) -> Any:
        if tenants is None:
            return model_class.generate(self, *arguments, **options)
        with _named(self, tenants, _rows(arguments, options)):
            return model_class.generate(self, *arguments, **options)

    def add_delta(self: Any, name: str, folder: str | Path) -> None:
        """Load a compressed delta under a name; one that has it already is replaced, running calls keeping the old.

        Raises:
            DeltacomeError: if it is broken, of another base, or does not fit; the model is as it was before.
        """
        self._tenants.add(name, folder)

    def remove_delta(self: Any, name: str) -> None:
        """Forget a delta and free its memory.

        Raises:
            DeltacomeError: if there is none of that name, or a running call uses it.
        """
        self._tenants.remove(name)

    def deltas(self: Any) -> dict[str, Tenant]:
        """The loaded deltas by name."""
        return dict(self._tenants.by_name)

    members = {
        "forward": forward,
        "generate": generate,
        "add_delta": add_delta,
        "remove_delta": remove_delta,
        "deltas": property(deltas),
        "__module__": model_class.__module__,
        "__doc__": model_class.__doc__,
    }
    return type(model_class.__name__, (model_class,), members)


@contextmanager
def _named(model: Any, tenants: Names, rows: int) -> Iterator[None]:
    if len(tenants) != rows:
        raise DeltacomeError(f"{len(tenants)} tenants for a batch of {rows} rows; name one, or None, for each row")
    with model._tenants.batch(tenants):
        yield


def _rows(arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Rows of the batch that `forward` or `generate` was given."""
    given = (options.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    for tensor in (*given, *arguments[:1]):
        if isinstance(tensor, torch.Tensor):
            return tensor.shape[0]
    raise DeltacomeError("a batch with tenants needs input_ids or inputs_embeds")


def _load_base(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text_only = checkpoint.config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    try:
        return kind.from_pretrained(checkpoint.folder, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise DeltacomeError(f"transformers cannot load {checkpoint.source}: {reason}") from error
