"""The layers that take the place of vLLM's for LoRA: they hold what an adapter brings as it is, packed.

vLLM's own copy adapters into buffers of `max_loras` times the largest rank. Here a slot has the adapter's own tensors,
and `change` adds to each row what its adapter's do.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from deltacome.errors import DeltacomeError
from deltacome.runtime.kernels import kernels_for
from deltacome.runtime.kernels.packed import pack_blocks
from deltacome.runtime.tenant import embed
from deltacome.vllm import internals
from deltacome.vllm.changes import Gains, Part, Values, as_terms, share
from deltacome.vllm.rows import Rows, Step

Content = tuple[Part | None, ...] | Gains | Values


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
        if step.slots is not None:
            self.make_tables()

    def make_tables(self) -> None:
        """Make what a layer in CUDA graphs has of all slots, in places that stay."""

    def fill_tables(self, index: int) -> None:
        """Put there what is in a slot now."""

    def refusal(self, content: Content) -> str | None:
        """Why a delta's content, still on the CPU, cannot be there; None if it can."""
        return None

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot, with LoRA's factors or, in place of the first, with a delta's content."""
        self.put(index, self.take(lora_a if lora_b is None else self.factors(lora_a, lora_b)))

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.put(index, None)

    def put(self, index: int, content: Content | None) -> None:
        """Have a content in a slot, or none."""
        if content is not None or self.slots[index] is not None:
            self.slots[index] = content
            if self.step.slots is not None:
                self.fill_tables(index)

    def take(self, content: Content) -> Content:
        """The content on the layer's device."""
        device = self.step.device
        if isinstance(content, Gains | Values):
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


def define_operators() -> torch.library.Library:
    """Define `torch.ops.deltacome.change` and `change_experts`, for as long as the library lives."""
    library = torch.library.Library("deltacome", "DEF")
    for name, inputs in (("change", "Tensor? x"), ("change_experts", "Tensor x, Tensor weights, Tensor chosen")):
        library.define(f"{name}(Tensor(a!) y, {inputs}, str layer) -> ()")
        library.impl(name, _change, "CompositeExplicitAutograd")
        torch.library.register_fake(f"deltacome::{name}", lambda *given: None, lib=library)
    return library


def _change(y: Tensor, *given: Any) -> None:
    *inputs, layer = given
    internals.running_layer(layer).change(y, *inputs)


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
        return tuple(None if a is None or b is None else self._of_factors(a, b) for a, b in pairs)

    def _of_factors(self: Any, a: Tensor, b: Tensor) -> Part:
        if self.step.slots is None:
            return Part(matrices=(a, b))
        terms = share(as_terms(a.cpu(), b.cpu()), self.tp_rank, self.tp_size)
        return Part(pack_blocks(terms, (len(b), a.shape[1]), self.step.device))

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

    def widths(self: Any) -> tuple[int, ...]:
        """Outputs of each slice, those of all GPUs."""
        base = self.base_layer
        if not isinstance(base, internals.QKVParallelLinear):
            return tuple(base.output_sizes) if self.n_slices > 1 else (base.output_size,)
        keys = base.total_num_kv_heads
        sizes = base.total_num_heads * base.head_size, keys * base.head_size, keys * base.v_head_size
        return sizes if self.n_slices > 1 else (sum(sizes),)

    def make_tables(self: Any) -> None:
        widths = self.widths()
        columns = [sum(widths[:i]) for i in range(len(widths))]
        self.work = self.kernels.SlotWork(self.step.slots, columns, widths, self.base_layer.input_size)
        own = [self.own_outputs(i, width) for i, width in enumerate(widths)]
        self.own = [None if numbers is None else numbers.to(self.step.device) for numbers in own]
        # As a layer without a bias would need one for a few deltas only, they have none there.
        self.biases = None
        if getattr(self.base_layer, "bias", None) is not None:
            self.biases = torch.zeros(len(self.slots) + 1, sum(self.output_slices), device=self.step.device)

    def fill_tables(self: Any, index: int) -> None:
        parts = self.slots[index] or (None,) * self.n_slices
        for i, part in enumerate(parts):
            self.work.fill(i, index, () if part is None else part.packed)
        if self.biases is not None:
            for row, part in zip(self.biases[index].split(self.output_slices), parts, strict=True):
                if part is None or part.bias is None:
                    row.zero_()
                else:
                    row.copy_(part.bias)

    def refusal(self: Any, content: Any) -> str | None:
        for i, part in enumerate(content):
            if part is None:
                continue
            if part.matrices:
                return "its values are exact"
            if part.bias is not None and self.biases is None:
                return "the base has no bias there"
            found = self.work.refusal(i, part.packed)
            if found:
                return found
        return None

    @property
    def most_rank(self: Any) -> int:
        """Of LoRA's factors in a slot: `as_terms` makes three components of one."""
        return min(*self.widths(), self.base_layer.input_size) // 3

    def _change_in_graph(self: Any, y: Tensor, x: Tensor) -> None:
        """As `change`, with nothing that a CUDA graph would not do again for other tenants."""
        if not self.step.slots.used:
            return
        if self.biases is not None:
            y += self.biases.index_select(0, self.step.slots.of_rows[: len(y)]).to(y.dtype)
        inputs = internals.gather(x) if self.splits_input else x
        if self.tp_size == 1 or self.splits_input:  # the layer sums its outputs over GPUs itself
            self.work.add(y, inputs)
            return
        widths = self.widths()
        whole = torch.zeros(len(y), sum(widths), device=y.device)
        self.work.add(whole, inputs)
        parts = internals.all_reduce(whole).split(widths, dim=1)
        own = [part if own is None else part.index_select(1, own) for part, own in zip(parts, self.own, strict=True)]
        y += torch.cat(own, dim=1).to(y.dtype)

    def try_in_graph(self: Any, rows: int, dtype: torch.dtype) -> None:
        """Do once what a graph would have of the layer, for nothing."""
        inputs = self.base_layer.input_size // (self.tp_size if self.splits_input else 1)
        x, y = (
            torch.zeros(rows, size, dtype=dtype, device=self.step.device) for size in (inputs, sum(self.output_slices))
        )
        self._change_in_graph(y, x)

    def change(self: Any, y: Tensor, x: Any) -> None:
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if self.step.in_graph(len(y)):
            self._change_in_graph(y, x)
            return
        of_tokens = self.step.of_tokens(len(y))
        job: _Job | None = of_tokens.prepared(self.name, partial(self._job, of_tokens))
        if job is None:
            return
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

    def _job(self: Any, rows: Rows) -> _Job | None:
        contents = self.contents(rows)
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
                added[rows] = embed(part, self._known(part, ids[rows]), y.shape[1], self.kernels)
            y += internals.all_reduce(added).to(y.dtype)
        for (part,), rows in contents:
            if part.matrices:
                product = embedding(ids[rows], part.matrices[0])
                for matrix in part.matrices[1:]:
                    product = product @ matrix.T
                y[rows] += product.to(y.dtype)
            if part.rows is not None:  # of added tokens
                places = ids[rows] - (part.size - len(part.rows))
                added = part.rows[places.clamp(0, len(part.rows) - 1)].to(y.dtype)
                y[rows] = torch.where(places[:, None] >= 0, added, y[rows])

    def _known(self, part: Part, ids: Tensor) -> Tensor:
        """The token numbers, in place of those of exact rows some that the packed terms have."""
        return ids if part.size is None else ids.clamp(max=part.size - (0 if part.rows is None else len(part.rows)) - 1)


class Logits(Layer, internals.LogitsProcessorWithLoRA):
    """The output embedding, which vLLM computes in its logits processor.

    vocabulary: how many tokens the base has; vLLM has more where there is room for tenants that have added some.
    """

    sharded_to_full_mapping_gpu = None  # vLLM's way of putting an enlarged vocabulary in order
    vocabulary: int

    def factors(self, lora_a: Tensor, lora_b: Tensor) -> Content:
        return (Part(matrices=(lora_a, lora_b)),)

    def forward(self, lm_head: Any, hidden_states: Tensor, *rest: Any, **options: Any) -> Tensor | None:
        logits: Tensor | None = super().forward(lm_head, hidden_states, *rest, **options)
        rows, count = self.step.of_logits(len(hidden_states)), len(hidden_states)
        sizes = rows.prepared((self.name, count), partial(self._sizes, rows, count))
        if logits is not None and sizes is not None:
            has_not = torch.arange(logits.shape[1], device=logits.device) >= sizes[:, None]
            logits.masked_fill_(has_not, -torch.inf)
        return logits

    def _sizes(self, rows: Rows, count: int) -> Tensor | None:
        """How many tokens each row's model has, (count,); None if that is all for all."""
        contents = self.contents(rows) if rows.count == count else []  # of a trial run
        own = [(part.size, numbers) for (part,), numbers in contents if part.size is not None]
        if min([self.vocabulary, *(size for size, _ in own)]) >= self.base_layer.org_vocab_size:
            return None
        sizes = torch.full((count,), self.vocabulary, device=self.step.device)
        for size, numbers in own:
            sizes[numbers] = size
        return sizes

    def _get_logits(
        self, hidden_states: Tensor, lm_head: Any, embedding_bias: Tensor | None = None, skip_gather: bool = False
    ) -> Tensor | None:
        if skip_gather:
            raise NotImplementedError("logits of one GPU alone, with deltas of the output embedding")
        head = getattr(lm_head, "base_layer", lm_head)
        logits = self.base_layer._get_logits(hidden_states, head, embedding_bias)
        rows = self.step.of_logits(len(hidden_states))
        work, products, exact = rows.prepared(self.name, partial(self._work, rows))
        if work is None and not products and not exact:
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
        for first, weight, numbers in exact:
            if logits is not None:
                product = hidden_states[numbers] @ weight.T.to(hidden_states.dtype)
                logits[numbers, first : first + len(weight)] = product.to(logits.dtype)
        return logits

    def _work(self, rows: Rows) -> tuple[Any, list[tuple[Any, Tensor]], list[tuple[int, Tensor, Tensor]]]:
        """The kernels'; chains of matrices with their rows; and of added tokens the first, the weights and the rows."""
        parts = [(part, numbers) for (part,), numbers in self.contents(rows)]
        packed = [(block, numbers) for part, numbers in parts for block in part.packed]
        products = [(part.matrices, numbers) for part, numbers in parts if part.matrices]
        exact = [(part.size - len(part.rows), part.rows, numbers) for part, numbers in parts if part.rows is not None]
        return (self.kernels.Work(packed) if packed else None), products, exact


def linear_class(vllm_class: type) -> type:
    """The class that takes the place of one of vLLM's linear layers for LoRA."""
    return type(vllm_class.__name__, (Linear, vllm_class), {"__module__": __name__})
