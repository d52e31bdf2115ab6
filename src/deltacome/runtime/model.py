"""One base model in memory with any number of compressed deltas, and a tenant for each row of a batch."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deltacome.checkpoints.architectures import auto_class
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.device import choose_device
from deltacome.errors import DeltacomeError, reason
from deltacome.hub import UNFIT_FILES
from deltacome.language import as_set
from deltacome.runtime.batch import Batch, running
from deltacome.runtime.ends import end_options
from deltacome.runtime.tenant import Tenant
from deltacome.runtime.tenants import TenantNames, Tenants


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
    row is the base's. A generated row ends at its own model's end tokens, unless `eos_token_id` is given.
    `model.add_delta(name, folder)` and `model.remove_delta(name)` change what is there at any time, from any thread;
    `model.deltas` lists it. `model.tenants` is the `Tenants` behind these, whose `batch_of` makes a batch for several
    calls.

    Args:
        base: a checkpoint folder or hub id.
        deltas: compressed deltas of that base by name.
        device: a GPU where there is one, else the CPU.
        dtype: to compute in; the checkpoint's own on a GPU, float32 on the CPU.

    Raises:
        DeltacomeError: if there is no such device, transformers cannot load the base, or a delta is broken, of another
            base, or has changes that can only be merged.
    """
    device = choose_device(device)
    checkpoint = Checkpoint(base)
    model = _load_base(checkpoint, dtype or (torch.float32 if device.type == "cpu" else None)).to(device).eval()
    share(model, checkpoint)
    for name, folder in (deltas or {}).items():
        model.add_delta(name, folder)
    return model


def share(model: Any, checkpoint: Checkpoint | None) -> None:
    """Turn a transformers model into one that takes tenants; without its checkpoint, only by `tenants.put`."""
    model.requires_grad_(False)
    model.__class__ = _with_tenants(type(model))
    model.tenants = Tenants(model, checkpoint)


def _with_tenants(model_class: Any) -> Any:
    """The model class with `tenants` in `forward` and `generate`, and deltas to add and remove."""

    @functools.wraps(model_class.forward)
    def forward(self: Any, *arguments: Any, tenants: TenantNames | Batch | None = None, **options: Any) -> Any:
        if tenants is not None:
            _check_size(tenants, _rows(arguments, options))
            with self.tenants.run(tenants):
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
    def generate(self: Any, *arguments: Any, tenants: TenantNames | Batch | None = None, **options: Any) -> Any:
        if tenants is None:
            return model_class.generate(self, *arguments, **options)
        _check_size(tenants, _rows(arguments, options))
        batch = tenants if isinstance(tenants, Batch) else self.tenants.batch_of(tenants)
        config = options.get("generation_config", arguments[1] if len(arguments) > 1 else None)
        if "eos_token_id" not in options and getattr(config, "eos_token_id", None) is None:
            own = self.generation_config
            base = as_set(own.eos_token_id)
            ends = [(tenant and tenant.ends) or base for tenant in batch.tenants]
            options |= end_options(ends, options.get("stopping_criteria") or ())
            pads = (own.pad_token_id, *sorted(set().union(*ends)))
            options.setdefault("pad_token_id", next((token for token in pads if token is not None), None))
        with self.tenants.run(batch):
            output = model_class.generate(self, *arguments, **options)
        tokens = output if isinstance(output, torch.Tensor) else output.sequences
        if options.get("pad_token_id") is not None:
            tokens[tokens < 0] = options["pad_token_id"]  # which beams are padded with where rows end in other ways
        return output

    def add_delta(self: Any, name: str, folder: str | Path) -> None:
        """Load a compressed delta under a name; one that has it already is replaced, running calls keeping the old.

        Raises:
            DeltacomeError: if it is broken, of another base, or does not fit; the model is as it was before.
        """
        self.tenants.add(name, folder)

    def remove_delta(self: Any, name: str) -> None:
        """Forget a delta and free its memory.

        Raises:
            DeltacomeError: if there is none of that name, or a running call uses it.
        """
        self.tenants.remove(name)

    def deltas(self: Any) -> dict[str, Tenant]:
        """The loaded deltas by name."""
        return self.tenants.by_name()

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


def _check_size(tenants: TenantNames | Batch, rows: int) -> None:
    if len(tenants) != rows:
        raise DeltacomeError(f"{len(tenants)} tenants for a batch of {rows} rows; name one, or None, for each row")


def _rows(arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Rows of the batch that `forward` or `generate` was given."""
    given = (options.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    for tensor in (*given, *arguments[:1]):
        if isinstance(tensor, torch.Tensor):
            return tensor.shape[0]
    raise DeltacomeError("a batch with tenants needs input_ids or inputs_embeds")


def _load_base(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    kind = auto_class(checkpoint.config.get("model_type"))
    try:
        return kind.from_pretrained(checkpoint.folder, dtype=dtype or "auto", trust_remote_code=False)
    except UNFIT_FILES as error:
        raise DeltacomeError(f"transformers cannot load {checkpoint.source}: {reason(error)}") from error
