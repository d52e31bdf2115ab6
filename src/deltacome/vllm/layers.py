"""The layers that take the place of vLLM's for LoRA: they hold what an adapter brings as it is, packed.

vLLM's own copy adapters into buffers of `max_loras` times the largest rank. Here a slot has the adapter's own tensors,
and `change` adds to each row what its adapter's do.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, rms_norm

from deltacome.errors import DeltacomeError
from deltacome.runtime.kernels import kernels_for
from deltacome.runtime.tenant import embed
from deltacome.vllm import internals
from deltacome.vllm.changes import Gains, Part
from deltacome.vllm.rows import Rows, Step

Content = tuple[Part | None, ...] | Gains


class Layer:
    """What all have in common: a content per slot, for the rows of the running step.

    A subclass comes before a class of vLLM's. `change(y, x)` changes the rows of y, in place, as their adapters have
    it; x is the layer's input, where that matters. `factors(lora_a, lora_b)` makes of LoRA's factors, as vLLM's
    `set_lora` has them, content of the layer.
    """

    step: Step
    name: str

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """As vLLM's, without buffers."""
        self.slots: list[Content | None] = [None] * max_loras

    def join(self, name: str, step: Step) -> None:
        """Take the module's name, and the step that all layers of a model share."""
        self.name, self.step = name, step
        self.kernels = kernels_for(step.device.type)

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot, with LoRA's factors or, in place of the first, with a delta's content."""
        self.slots[index] = self.take(lora_a if lora_b is None else self.factors(lora_a, lora_b))

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.slots[index] = None

    def take(self, content: Content) -> Content:
        """The content on the layer's device."""
        device = self.step.device
        if isinstance(content, Gains):
            return content.to(device)
        return tuple(None if part is None else part.to(device) for part in content)

    def contents(self, rows: Rows) -> list[tuple[Any, Tensor]]:
        """The contents of the step's adapters, with their rows."""
        return [(self.slots[slot], numbers) for slot, numbers in rows.by_slot.items() if self.slots[slot] is not None]


def apply_change(layer: Any, y: Tensor, x: Tensor | None) -> None:
    """`layer.change`, by an operator that torch.compile does not look into."""
    if torch.compiler.is_compiling():
        torch.ops.deltacome.change(y, x, layer.name)
    else:
        layer.change(y, x)


def define_operator() -> torch.library.Library:
    """Define `torch.ops.deltacome.change`, for as long as the library lives."""
    library = torch.library.Library("deltacome", "DEF")
    library.define("change(Tensor(a!) y, Tensor? x, str layer) -> ()")
    library.impl("change", lambda y, x, layer: internals.running_layer(layer).change(y, x), "CompositeExplicitAutograd")
    torch.library.register_fake("deltacome::change", lambda y, x, layer: None, lib=library)
    return library


@dataclass(frozen=True)
class _Slice:
    """Some outputs of a layer.

    first: the first of them in the layer's here, and of_whole: in those of all GPUs. outputs: how many the whole slice
    has, and own: which of these this GPU has, None for all. products: chains of matrices with the rows that go through
    them. biases: what is added, with its rows.
    """

    first: int
    of_whole: int
    outputs: int
    own: Tensor | None
    products: list[tuple[tuple[Tensor, ...], Tensor]]
    biases: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Job:
    """What a step does for a layer. work: the kernels', for all slices at once. outputs: of all GPUs."""

    slices: list[_Slice]
    work: Any
    outputs: int


class Linear(Layer):
    """Before any of vLLM's linear layers for LoRA."""

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        super().create_lora_weights(max_loras, lora_config, model_config)
        self._enable_aux_cuda_stream = False  # which works on vLLM's buffers
        self.splits_input = isinstance(self.base_layer, internals.RowParallelLinear) and self.tp_size > 1
        if self.n_slices == 1:
            self.output_slices = (self.output_size,)

    def factors(self: Any, lora_a: Any, lora_b: Any) -> Content:
        if not isinstance(lora_a, list):
            lora_a, lora_b = [lora_a] * self.n_slices, self._cut(lora_b)
        elif len(lora_b) != self.n_slices:
            lora_a, lora_b = self.expand_packed_lora(lora_a, lora_b)
        pairs = zip(lora_a, lora_b, strict=True)
        return tuple(None if a is None or b is None else Part(matrices=(a, b)) for a, b in pairs)

    def _cut(self: Any, lora_b: Tensor) -> list[Tensor]:
        return [lora_b] if self.n_slices == 1 else list(lora_b.split(self.base_layer.output_sizes))

    def take(self: Any, content: Content) -> Content:
        assert isinstance(content, tuple)
        return Layer.take(self, tuple(None if part is None else self._own(i, part) for i, part in enumerate(content)))

    def _own(self: Any, index: int, part: Part) -> Part:
        """Of a part's dense tensors what this GPU has; components were shared out when the delta was read."""
        if self.tp_size == 1:
            return part
        matrices, bias = part.matrices, part.bias
        if self.splits_input:
            bias = bias if self.tp_rank == 0 else None  # the sum over GPUs has it once
            matrices = tuple(self.slice_lora_a(m) if i == 0 else m for i, m in enumerate(matrices))
        else:
            lengths = [len(tensor) for tensor in (*matrices[-1:], bias) if tensor is not None]
            outputs = self.own_outputs(index, lengths[0]) if lengths else None
            if outputs is not None:
                bias = None if bias is None else bias[outputs]
                matrices = (*matrices[:-1], matrices[-1][outputs]) if matrices else ()
        return Part(part.packed, (), matrices, bias)

    def own_outputs(self: Any, index: int, count: int) -> Tensor | None:
        """Which of the outputs of a slice this GPU computes, None for all: vLLM's own slicing, of their numbers."""
        if self.tp_size == 1 or self.splits_input or isinstance(self.base_layer, internals.ReplicatedLinear):
            return None
        numbers = torch.arange(count)[:, None]
        if self.n_slices == 1:
            return self.slice_lora_b(numbers)[:, 0]
        numbers_of = [numbers if i == index else None for i in range(self.n_slices)]
        return self.slice_lora_b(numbers_of)[index][:, 0]

    def _apply_lora_to_output(self: Any, x: Tensor, output: Tensor) -> Tensor:
        apply_change(self, output, x)
        return output

    def change(self: Any, y: Tensor, x: Any) -> None:
        job: _Job | None = self.step.tokens.prepared(self.name, self._job)
        if job is None:
            return
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        for part in job.slices:
            for matrices, rows in part.products:
                product = x[rows]
                for matrix in matrices:
                    product = product @ matrix.T.to(product.dtype)
                y[rows, part.first : part.first + product.shape[1]] += product
            for bias, rows in part.biases:
                y[rows, part.first : part.first + len(bias)] += bias.to(y.dtype)
        if job.work is None:
            return
        inputs = internals.gather(x) if self.splits_input else x
        if self.tp_size == 1 or self.splits_input:  # the layer sums its outputs over GPUs itself
            job.work.add(y, inputs)
            return
        whole = torch.zeros(len(y), job.outputs, device=y.device)
        job.work.add(whole, inputs)
        whole = internals.all_reduce(whole)
        for part in job.slices:
            mine = whole[:, part.of_whole : part.of_whole + part.outputs]
            mine = mine if part.own is None else mine[:, part.own]
            y[:, part.first : part.first + mine.shape[1]] += mine.to(y.dtype)

    def _job(self: Any) -> _Job | None:
        contents = self.contents(self.step.tokens)
        slices: list[_Slice] = []
        deltas: list[tuple[Any, Tensor]] = []
        firsts: list[int] = []
        first = of_whole = 0
        for index, width in enumerate(self.output_slices):
            parts = [(content[index], rows) for content, rows in contents if content[index] is not None]
            packed = [(block, rows) for part, rows in parts for block in part.packed]
            outputs = packed[0][0].shape[0] if packed else width
            own = self.own_outputs(index, outputs)
            part_of_step = _Slice(
                first,
                of_whole,
                outputs,
                None if own is None else own.to(self.step.device),
                [(part.matrices, rows) for part, rows in parts if part.matrices],
                [(part.bias, rows) for part, rows in parts if part.bias is not None],
            )
            if parts:
                slices.append(part_of_step)
            deltas += packed
            firsts += [first if self.tp_size == 1 else of_whole] * len(packed)
            first, of_whole = first + width, of_whole + outputs
        if not slices:
            return None
        return _Job(slices, self.kernels.Work(deltas, firsts) if deltas else None, of_whole)


class Embedding(Layer, internals.VocabParallelEmbeddingWithLoRA):
    """The input embedding."""

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> Content:
        return (Part(matrices=(lora_a.T, lora_b)),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer.forward(x)
        apply_change(self, y, x)
        return y

    def change(self, y: Tensor, x: Any) -> None:
        contents = self.step.tokens.prepared(self.name, partial(self.contents, self.step.tokens))
        if not contents:
            return
        y, ids = y.view(-1, y.shape[-1]), x.reshape(-1).long()  # vLLM has them in 32 bit
        packed = [(part, rows) for (part,), rows in contents if part.packed]
        if packed:
            # One sum for all adapters: GPUs need not have them in the same slots.
            added = torch.zeros(y.shape, device=y.device)
            for part, rows in packed:
                added[rows] = embed(part, ids[rows], y.shape[1], self.kernels)
            y += internals.all_reduce(added).to(y.dtype)
        for (part,), rows in contents:
            if part.matrices:
                product = embedding(ids[rows], part.matrices[0])
                for matrix in part.matrices[1:]:
                    product = product @ matrix.T
                y[rows] += product.to(y.dtype)


class Logits(Layer, internals.LogitsProcessorWithLoRA):
    """The output embedding, which vLLM computes in its logits processor."""

    sharded_to_full_mapping_gpu = None  # vLLM's way of putting an enlarged vocabulary in order

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> Content:
        return (Part(matrices=(lora_a, lora_b)),)

    def _get_logits(
        self, hidden_states: Tensor, lm_head: Any, embedding_bias: Tensor | None = None, skip_gather: bool = False
    ) -> Tensor | None:
        if skip_gather:
            raise NotImplementedError("logits of one GPU alone, with deltas of the output embedding")
        head = getattr(lm_head, "base_layer", lm_head)
        logits = self.base_layer._get_logits(hidden_states, head, embedding_bias)
        rows = self.step.of_logits(len(hidden_states))
        work, products = rows.prepared(self.name, partial(self._work, rows))
        if work is None and not products:
            return logits
        if rows.count != len(hidden_states):
            raise DeltacomeError(f"logits of {len(hidden_states)} tokens where the step has {rows.count}")
        # In float32, as the sampler has them in the end: near 20, bfloat16 knows steps of 1/8.
        logits = None if logits is None else logits.float()
        if work is not None:
            added = torch.zeros(len(hidden_states), self.base_layer.org_vocab_size, device=hidden_states.device)
            work.add(added, hidden_states)
            added = internals.all_reduce(added)
            if logits is not None:
                logits += added
        for matrices, numbers in products:
            product = hidden_states[numbers]
            for matrix in matrices:
                product = product @ matrix.T.to(product.dtype)
            if logits is not None:
                logits[numbers, : product.shape[1]] += product
        return logits

    def _work(self, rows: Rows) -> tuple[Any, list[tuple[tuple[Tensor, ...], Tensor]]]:
        parts = [(part, numbers) for (part,), numbers in self.contents(rows)]
        packed = [(block, numbers) for part, numbers in parts for block in part.packed]
        products = [(part.matrices, numbers) for part, numbers in parts if part.matrices]
        return (self.kernels.Work(packed) if packed else None), products


class Norm(Layer, internals.BaseLayerWithLoRA):
    """A norm that adapters have their own of.

    The rows of adapters are normalized a second time, in float32: scaling what the base's norm gives would round twice.
    """

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_layer_norm = isinstance(base_layer, internals.LayerNorm)
        self.epsilon = base_layer.eps if self.is_layer_norm else base_layer.variance_epsilon
        self.offset = 1.0 if isinstance(base_layer, internals.GemmaRMSNorm) else 0.0

    def own(self, parameter: str) -> Tensor | None:
        """A parameter of the base's norm, on the CPU."""
        value = getattr(self.base_layer, parameter, None)
        return None if value is None else value.detach().cpu()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            y = self.base_layer(x)
            apply_change(self, y, x)
            return y
        total = x.float() + residual.float()  # before the base's norm, which may write over both
        y, residual = self.base_layer(x, residual)
        apply_change(self, y, total)
        return y, residual

    def change(self, y: Tensor, x: Any) -> None:
        rows = self.step.tokens
        values = rows.prepared((self.name, y.ndim), partial(self._values, rows, y.ndim))
        if values is None:
            return
        numbers, weight, bias = values
        normalize = layer_norm if self.is_layer_norm else rms_norm
        changed = normalize(x[numbers].float(), x.shape[-1:], eps=self.epsilon) * weight
        y[numbers] = (changed if bias is None else changed + bias).to(y.dtype)

    def _values(self, rows: Rows, dimensions: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Row numbers, and of each row the gains and the biases: (rows, 1, ..., n)."""
        contents = self.contents(rows)
        if not contents:
            return None
        counts = torch.tensor([len(numbers) for _, numbers in contents], device=self.step.device)

        def stack(values: list[Tensor]) -> Tensor:
            stacked = torch.stack(values).float().repeat_interleave(counts, dim=0)
            return stacked.view(len(stacked), *[1] * (dimensions - 2), -1)

        biases = [gains.bias for gains, _ in contents if gains.bias is not None]
        weight = stack([gains.weight for gains, _ in contents]) + self.offset
        return torch.cat([numbers for _, numbers in contents]), weight, stack(biases) if biases else None


def linear_class(vllm_class: type) -> type:
    """The class that takes the place of one of vLLM's linear layers for LoRA."""
    return type(vllm_class.__name__, (Linear, vllm_class), {"__module__": __name__})
