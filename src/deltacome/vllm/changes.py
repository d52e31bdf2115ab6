"""What an adapter changes in a layer of vLLM's, and the share of it that one of several GPUs computes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltacome.errors import DeltacomeError
from deltacome.format.terms import Factored, Groups, Sign, Term
from deltacome.runtime.kernels.packed import Packed


@dataclass(frozen=True)
class Part:
    """What is added to a matrix, or to one of several whose outputs a layer computes in one go.

    packed, vectors: as in `runtime.tenant.Change`, the latter of an input embedding. matrices: a chain that the input
    goes through: LoRA's two factors (rank, n) and (m, rank), or one dense (m, n); of an input embedding (vocabulary,
    rank) and (n, rank), or (vocabulary, n). bias: what is added to the outputs, (m,). size: of an embedding, how many
    tokens the tenant has, if not as many as the base; rows: exact rows of the last of these, (tokens, n).
    """

    packed: tuple[Packed, ...] = ()
    vectors: tuple[Tensor, ...] = ()
    matrices: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    rows: Tensor | None = None
    size: int | None = None

    def tensors(self) -> list[Tensor]:
        """Everything that it keeps in memory."""
        found = [*self.matrices, *self.vectors, *(tensor for packed in self.packed for tensor in packed.tensors())]
        return [*found, *(tensor for tensor in (self.bias, self.rows) if tensor is not None)]

    def to(self, device: torch.device) -> "Part":
        """A copy on a device, or itself if it is there."""
        packed = tuple(own.to(device) for own in self.packed)
        vectors, matrices = (tuple(own.to(device) for own in tensors) for tensors in (self.vectors, self.matrices))
        bias, rows = (None if tensor is None else tensor.to(device) for tensor in (self.bias, self.rows))
        return replace(self, packed=packed, vectors=vectors, matrices=matrices, bias=bias, rows=rows)


@dataclass(frozen=True)
class Gains:
    """A norm's own gains and, where it has them, biases, (n,) each."""

    weight: Tensor
    bias: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Everything that it keeps in memory."""
        return [self.weight] + ([] if self.bias is None else [self.bias])

    def to(self, device: torch.device) -> "Gains":
        """A copy on a device, or itself if it is there."""
        return Gains(self.weight.to(device), None if self.bias is None else self.bias.to(device))


@dataclass(frozen=True)
class Values:
    """Parameters of an adapter's own, by vLLM's names."""

    values: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """Everything that it keeps in memory."""
        return list(self.values.values())

    def to(self, device: torch.device) -> "Values":
        """A copy on a device, or itself if it is there."""
        return Values({name: value.to(device) for name, value in self.values.items()})


def as_terms(lora_a: Tensor, lora_b: Tensor) -> list[Term]:
    """LoRA's factors (rank, n) and (m, rank) as factored terms of 8 bits, since slots have no others.

    What rounding takes from either vector is a component of its own, so that 1e-4 of the product is missing.
    """
    u, v = lora_b.T.float(), lora_a.float()
    term, own_u, own_v = _rounded(u, v)
    return [term, _rounded(u - own_u, v)[0], _rounded(own_u, v - own_v)[0]]


def _rounded(u: Tensor, v: Tensor) -> tuple[Factored, Tensor, Tensor]:
    """Vectors (rank, m) and (rank, n) as a term of 8 bits, and as they are in it."""
    u_step, v_step = (x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127.5 for x in (u, v))
    scale = (u_step * v_step).to(torch.bfloat16)  # as a term has it
    u_step = scale.float() / v_step
    u_codes, v_codes = ((x / step + 127.5).round().clamp(0, 255).int() for x, step in ((u, u_step), (v, v_step)))
    term = Factored.from_codes(8, u_codes, v_codes, scale[:, 0])
    return term, (u_codes - 127.5) * u_step, (v_codes - 127.5) * v_step


def share(terms: Sequence[Term], rank: int, size: int) -> list[Term]:
    """The terms that the GPU of that rank computes: of each factored term a slice of its components.

    The sum over all GPUs is the whole delta, for every matrix and whatever slice of its inputs or outputs a GPU has.
    Slices of the vectors would not do: rotation mixes their entries.

    Raises:
        DeltacomeError: if there are sign terms, which have no components.
    """
    if size == 1:
        return list(terms)
    if any(isinstance(term, Sign) for term in terms):
        raise DeltacomeError("a BitDelta cannot be split among several GPUs; serve it on one, or merge it instead")
    factored = [term for term in terms if isinstance(term, Factored)]
    found = []
    for term in factored:
        count = len(term.scale)
        first, last = rank * count // size, (rank + 1) * count // size
        if first < last:
            found.append(_cut(term, first, last))
    if factored and not found:  # all take part in the sum
        nothing = _cut(factored[0], 0, 1)
        found.append(replace(nothing, scale=torch.zeros_like(nothing.scale)))
    return [*found, *(term for term in terms if not isinstance(term, Factored))]


def _cut(term: Factored, first: int, last: int) -> Factored:
    """The components from `first` to before `last`."""
    own, groups = slice(first, last), term.groups
    if groups is not None:
        fields = (groups.u_scale, groups.u_zero, groups.v_scale, groups.v_zero)
        groups = Groups(groups.size, *(tensor[own] for tensor in fields))
    return replace(term, u=term.u[own], v=term.v[own], scale=term.scale[own], groups=groups)
