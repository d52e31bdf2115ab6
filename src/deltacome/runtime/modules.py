"""What takes the place of a module's `forward`: the base's own result, and for each row what its tenant changes."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear
from transformers.pytorch_utils import Conv1D

from deltacome.errors import DeltacomeError
from deltacome.experts import is_experts
from deltacome.runtime.batch import Batch, running
from deltacome.runtime.experts import Experts
from deltacome.runtime.replacement import Replacement
from deltacome.runtime.sharing import LAYERS, Shared, Turn
from deltacome.runtime.tenant import Change, Tenant, embed

QUANTIZED = ("bitsandbytes.nn", "transformers.integrations.finegrained_fp8")  # linear layers, with weights of their own
FEW_ROWS = 64  # up to which the base's product may be faster with the weight on the left
TIMED = 3  # products of each kind, to find out


def install(name: str, module: nn.Module, kernels: Any) -> None:
    """Make a module ready for tenants; without any in the batch it computes what it did before.

    Raises:
        DeltacomeError: if it is of a kind whose deltas can only be merged.
    """
    if isinstance(module.__dict__.get("forward"), Replacement):
        return
    forward: Callable[..., Any]
    if isinstance(module, nn.Linear | Conv1D):
        is_plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
        if not is_plain and not type(module).__module__.startswith(QUANTIZED):
            raise DeltacomeError(
                f"{name} is a {type(module).__name__}, whose deltas cannot be served; merge it instead"
            )
        forward = _Linear(name, module, kernels)
    elif isinstance(module, nn.Embedding):
        forward = _Embedding(name, module, kernels)
    elif is_experts(module):
        forward = Experts(name, module, kernels)
    else:
        forward = _Exact(name, module)
    module.forward = forward


def share_inputs(model: nn.Module, kernels: Any) -> None:
    """Let layers that share an input compute together, where the kernels can and all of them are made ready."""
    if not hasattr(kernels, "SharedWork"):
        return
    for module in model.modules():
        for names in LAYERS:
            children = [vars(getattr(module, name, None) or nn.Identity()) for name in names]
            found = [child["forward"] for child in children if isinstance(child.get("forward"), _Linear)]
            if len(found) == len(names):
                for layer in found:
                    layer.sharing = found


@dataclass(frozen=True)
class _Job:
    """What one linear layer does for the batch, apart from the base's product; row numbers count tokens.

    work: the kernels' part. replaced and added: exact weights with their rows. width: outputs, the added ones included.
    sizes: how many outputs some rows have, if not all.
    """

    work: Any
    width: int
    replaced: Sequence[tuple[Tensor, Tensor]] = ()
    added: Sequence[tuple[Tensor, Tensor]] = ()
    biases: Sequence[tuple[Tensor, Tensor]] = ()
    sizes: Sequence[tuple[int, Tensor]] = ()


class _Linear(Replacement):
    """`nn.Linear`, also quantized, and transformers' `Conv1D`, whose weight lies the other way round."""

    def __init__(self, name: str, module: nn.Module, kernels: Any) -> None:
        self.name, self.module, self.kernels = name, module, kernels
        self.sharing: list[_Linear] = []  # the layers with this one's input, itself included
        self.is_transposed = isinstance(module, Conv1D)
        is_plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
        self.forward = None if is_plain else module.forward

    def __call__(self, x: Tensor) -> Tensor:
        batch = running.get()
        if batch is None:
            return self._base(x)
        inputs = x.reshape(-1, x.shape[-1])
        outputs = self._base(inputs)
        tokens, rest = divmod(len(inputs), len(batch))
        if rest:
            raise DeltacomeError(
                f"{self.name} was given {len(inputs)} rows for a batch of {len(batch)}; this model cannot be shared"
            )
        job: _Job | None = batch.prepared(
            self.name, lambda: self._job(batch, tokens, outputs.shape[1], x.device), tokens
        )
        if job is not None:
            outputs = self._change(outputs, inputs, job)
        return outputs.view(*x.shape[:-1], -1)

    def _base(self, x: Tensor) -> Tensor:
        """The base's outputs."""
        if self.forward is not None:
            return self.forward(x)
        weight = self.module._parameters["weight"]  # not by the module's own attribute, which is slow
        assert weight is not None
        bias = self.module._parameters["bias"]
        product = _product if x.ndim == 2 else linear
        return product(x, weight.T if self.is_transposed else weight, bias)

    def _job(self, batch: Batch, tokens: int, m: int, device: torch.device) -> _Job | None:
        work: Any = _work_of_model(self.name, batch, tokens, device, self.kernels)
        if work is not None and not any(self.name in tenant.exact for tenant in batch.tenant_rows(tokens, device)):
            return _Job(work, max(m, work.outputs))
        changes = batch.token_changes(self.name, tokens, device)
        if not changes:
            return None
        exact = [(change.rows, rows, change.start) for change, rows in changes if change.rows is not None]
        packed = _packed(changes)
        if work is None and packed and self.sharing:
            shared = batch.prepared(
                (self.sharing[0].name, "shared"), lambda: self._shared(batch, tokens, device), tokens
            )
            work = Turn(shared, self.sharing.index(self))
        elif work is None and packed:
            work = self.kernels.Work(packed)
        return _Job(
            work=work,
            replaced=[(weight, rows) for weight, rows, start in exact if start == 0],
            added=[(weight, rows) for weight, rows, start in exact if start],
            biases=[(change.exact["bias"], rows) for change, rows in changes if "bias" in change.exact],
            width=max(
                [m, *(start + len(weight) for weight, _, start in exact), *(delta.shape[0] for delta, _ in packed)]
            ),
            sizes=[(change.size, rows) for change, rows in changes if change.size is not None],
        )

    def _shared(self, batch: Batch, tokens: int, device: torch.device) -> Shared:
        """The work of the layers with this one's input."""
        lists = [_packed(batch.token_changes(layer.name, tokens, device)) for layer in self.sharing]
        return Shared(self.kernels, lists)

    def _change(self, outputs: Tensor, inputs: Tensor, job: _Job) -> Tensor:
        """The base's outputs (rows, m) as the rows' tenants have them, in place unless there are more than m."""
        m = outputs.shape[1]
        bias = self.module._parameters["bias"]
        for weight, rows in job.replaced:
            known = min(m, len(weight))
            product = linear(inputs[rows], weight[:known].to(inputs.dtype), None if bias is None else bias[:known])
            outputs[rows[:, None], torch.arange(known, device=rows.device)] = product
        if job.width > m:  # tokens that only some tenants have: no other may choose them
            outputs = nn.functional.pad(outputs, (0, job.width - m), value=-torch.inf)
        if job.work is not None:
            job.work.add(outputs, inputs)
        for tenants_bias, rows in job.biases:
            difference = tenants_bias.to(inputs.dtype)
            outputs[rows, :m] += difference if bias is None else difference - bias
        for weight, rows in job.added:
            outputs[rows, m : m + len(weight)] = linear(inputs[rows], weight.to(inputs.dtype))
        for weight, rows in job.replaced:
            if len(weight) > m:
                outputs[rows, m : len(weight)] = linear(inputs[rows], weight[m:].to(inputs.dtype))
        for size, rows in job.sizes:  # tokens that its vocabulary has not
            outputs[rows, size:] = -torch.inf
        return outputs


def model_table(tenant: Tenant, kernels: Any) -> Any:
    """What the kernels keep of all deltas of a tenant, made the first time."""
    if tenant not in _model_tables:
        _model_tables[tenant] = kernels.ModelTable(tenant.deltas)
    return _model_tables[tenant]


_model_tables: WeakKeyDictionary[Tenant, Any] = WeakKeyDictionary()


def _work_of_model(name: str, batch: Batch, tokens: int, device: torch.device, kernels: Any) -> Any:
    """A module's part of what the kernels prepare for all modules of a batch at once; None if it has none."""
    rows = batch.tenant_rows(tokens, device)
    if not rows or not hasattr(kernels, "ModelWork"):
        return None

    def make() -> Any:
        return kernels.ModelWork([(model_table(tenant, kernels), own) for tenant, own in rows.items()])

    return batch.prepared(("work of model", device), make, tokens).work(name)


def _packed(changes: list[tuple[Change, Tensor]]) -> list[tuple[Any, Tensor]]:
    return [(block, rows) for change, rows in changes for block in change.packed]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x (rows, n), contiguous.

    A tall matrix times a few columns is up to four times faster than a few rows times its transpose, or takes three
    times as long, by shape, rows and processor: the faster way is found out the first time.
    """
    rows = len(x)
    if not (1 < rows <= FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.float32 and weight.is_contiguous()):
        return linear(x, weight, bias)
    key = (*weight.shape, rows.bit_length())
    if key not in _faster:
        _faster[key] = min((_linear, _from_the_left), key=_stopwatch(x, weight))
    y = _faster[key](x, weight)
    return y if bias is None else y.add_(bias)


_faster: dict[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]] = {}  # by the weight's shape, and rows


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight)


def _from_the_left(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, x.t()).t().contiguous()


def _stopwatch(x: Tensor, weight: Tensor) -> Callable[[Callable[[Tensor, Tensor], Tensor]], float]:
    """What takes the least time of a few that a way of multiplying needs."""

    def seconds(way: Callable[[Tensor, Tensor], Tensor]) -> float:
        found = []
        for _ in range(TIMED):
            start = time.perf_counter()
            way(x, weight)
            found.append(time.perf_counter() - start)
        return min(found)

    return seconds


class _Embedding(Replacement):
    def __init__(self, name: str, module: nn.Embedding, kernels: Any) -> None:
        self.name, self.module, self.kernels = name, module, kernels
        self.forward = module.forward
        scaled = hasattr(module, "embed_scale")  # Gemma's
        if type(module).forward is not nn.Embedding.forward and not scaled:
            raise DeltacomeError(
                f"{name} is a {type(module).__name__}, whose deltas cannot be served; merge it instead"
            )

    def __call__(self, ids: Tensor) -> Tensor:
        batch = running.get()
        changes = [] if batch is None else batch.prepared(self.name, lambda: batch.changes(self.name))
        if batch is None or not changes:
            return self.forward(ids)
        if ids.shape[0] == 1:
            ids = ids.expand(len(batch), -1)  # positions, the same for all rows
        m, n = self.module.weight.shape
        self._check(ids, changes, m)
        y = self.forward(ids.clamp(max=m - 1))
        scale = getattr(self.module, "embed_scale", 1.0)
        for change, numbers in changes:
            rows = batch.token_rows(numbers, 1, ids.device)
            tokens = ids[rows]
            flat = tokens.reshape(-1)
            if change.rows is not None and change.start == 0:
                y[rows] = change.rows[flat.clamp(max=len(change.rows) - 1)].to(y.dtype).view(*tokens.shape, n) * scale
                continue
            if change.packed:
                added = embed(change, flat.clamp(max=(change.size or m) - 1), n, self.kernels).view(*tokens.shape, n)
                y[rows] += (added * scale).to(y.dtype)
            if change.rows is not None:
                is_new = tokens >= m
                new = change.rows[(tokens - m).clamp(min=0)].to(y.dtype) * scale
                y[rows] = torch.where(is_new[..., None], new, y[rows])
        return y

    def _check(self, ids: Tensor, changes: list[tuple[Change, list[int]]], m: int) -> None:
        """Refuse tokens that a row's tenant has not. Only prompts can hold them, which are longer than a token."""
        if ids.device.type != "cpu" and ids.shape[1] == 1:
            return  # looking would stop the device at every step
        limits = torch.full((len(ids), 1), m, device=ids.device)
        for change, rows in changes:
            limits[rows] = change.vocabulary(m)
        if (ids >= limits).any():
            raise DeltacomeError(f"a prompt holds token {int(ids.max())}, which its tenant's vocabulary has not")


class _Exact(Replacement):
    """A module that computes in its own way, a norm above all or a router, and whose parameters a delta replaces."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.forward = module.forward

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Any:
        batch = running.get()
        changes = [] if batch is None else batch.prepared(self.name, lambda: batch.changes(self.name))
        if batch is None or not changes:
            return self.forward(x, *arguments, **options)
        # The norms of transformers multiply by the weight and nothing else, so that a weight per row broadcasts.
        is_norm = type(self.module).__name__.endswith("RMSNorm") and not isinstance(self.module, nn.RMSNorm)
        if x.shape[0] == len(batch) and (is_norm or isinstance(self.module, nn.LayerNorm)):
            values = batch.prepared((self.name, x.ndim), lambda: self._stacked(batch, changes, x))
            if is_norm:
                module = batch.prepared((self.name, x.ndim, "module"), lambda: self._with(values))
                return module.forward(x, *arguments, **options)
            plain: Any = self.module
            y = layer_norm(x, plain.normalized_shape, None, None, plain.eps) * values["weight"]
            return y + values["bias"] if "bias" in values else y
        if arguments or options:  # which may have a part for each row
            raise DeltacomeError(f"{self.name} takes more than its input; this delta cannot be served, merge it")
        return self._by_tenant(batch, changes, x)

    def _by_tenant(self, batch: Batch, changes: list[tuple[Change, list[int]]], x: Tensor) -> Any:
        """The module's outputs, one or several, computed for the batch and once more for the rows of each tenant."""
        outputs = self.forward(x)
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        if any(len(part) % len(batch) for part in (x, *parts)):
            raise DeltacomeError(f"{self.name} changes the shape of the batch; this delta cannot be served, merge it")
        for number, (change, rows) in enumerate(changes):
            module = batch.prepared((self.name, number), partial(self._with, change.exact))
            changed = module.forward(x[batch.token_rows(rows, len(x) // len(batch), x.device)])
            for part, values in zip(parts, changed if isinstance(changed, tuple) else (changed,), strict=True):
                part[batch.token_rows(rows, len(part) // len(batch), x.device)] = values
        return outputs

    def _stacked(self, batch: Batch, changes: list[tuple[Change, list[int]]], x: Tensor) -> dict[str, Tensor]:
        """Each parameter with a value per row: (batch, 1, ..., n)."""
        stacked = {}
        for key, value in self.module.named_parameters():
            values = [value.detach()] * len(batch)
            for change, rows in changes:
                own = change.exact.get(key, value)
                for row in rows:
                    values[row] = own
            stacked[key] = torch.stack(values).to(value.dtype).view(len(values), *[1] * (x.ndim - 2), -1)
        return stacked

    def _with(self, values: dict[str, Tensor]) -> nn.Module:
        """The module with other values of parameters."""
        module = copy.copy(self.module)
        module.__dict__.pop("forward", None)
        module._parameters = {**self.module._parameters}
        for key, value in values.items():
            old = module._parameters[key]
            module._parameters[key] = nn.Parameter(value.to(value.dtype if old is None else old.dtype), False)
        return module
