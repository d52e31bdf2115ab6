"""Second moments, or energies and means, of the inputs of every linear layer, computed a decoder layer at a time.

The model is built without weights. A decoder layer has its weights only while the calibration data passes through it,
so memory holds one layer, the second moments of its linears and the hidden states of the data.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacome.checkpoints.architectures import auto_class
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.parameter_sources import ParameterSources, Read
from deltacome.data import Encoder, Example
from deltacome.device import CPU
from deltacome.errors import DeltacomeError, reason
from deltacome.experts import can_run, is_experts, run_experts
from deltacome.hub import UNFIT_FILES

TOKENS_AT_ONCE = 2048  # in one forward pass of a layer
LONGEST = 2048  # tokens of an example that are used, the paper's length
RANDOM_TOKENS = (32, 128)  # sequences and their length: energies are means, which few tokens give well enough
FEWEST_TOKENS = 32  # that an expert's inputs are measured on: fewer say little of its channels


@dataclass(frozen=True)
class Product:
    """A product of a matrix of the checkpoint: its inputs x (..., n) and its outputs y (..., m).

    tokens: which of the batch's tokens the rows are of, if they aren't all of them in order. is_transposed: whether the
    checkpoint has the matrix with the inputs' dimension first.
    """

    name: str
    x: Tensor
    y: Tensor
    tokens: Tensor | None = None
    is_transposed: bool = False


OnProduct = Callable[[Product], None]


class CalibrationStream:
    """Takes token sequences through a model layer by layer.

    Args:
        checkpoint: the fine-tuned checkpoint.
        ids, mask: the sequences, int64 and bool (sequences, length), and what of them is no padding.
        device: where the model is computed.

    Raises:
        DeltacomeError: if transformers cannot build the architecture, or its weights are not found by name.
    """

    def __init__(self, checkpoint: Checkpoint, ids: Tensor, mask: Tensor, device: torch.device = CPU) -> None:
        self.device = device
        self.model = _skeleton(checkpoint, device)
        self.layers = _decoder_layers(self.model)
        self.sources = ParameterSources(self.model, checkpoint)
        self.tensors = checkpoint.tensors
        self.prefixes = {id(module): name for name, module in self.model.named_modules()}
        head = self.model.get_output_embeddings()
        is_own = isinstance(head, nn.Linear) and head.weight is not self.model.get_input_embeddings().weight
        self.own_head = head if is_own else None  # untied
        self.ids, self.mask = ids.to(device), mask.to(device)

    def inputs(self, wanted: Callable[[str], bool], read: Read, advance: Callable[[float], None]) -> dict[str, Tensor]:
        """E[x²] and E[x] of the inputs x of each wanted linear, float32 (2, inputs), by its checkpoint name.

        Args:
            read: a weight of a checkpoint name.
            advance: called with the weights of each linear that is measured.
        """
        found: dict[str, Tensor] = {}

        def keep(means: dict[str, Tensor]) -> None:
            found.update(means)
            advance(sum(self.tensors[name].elements for name in means))

        self.run(wanted, read, None, keep)
        return found

    def run(
        self,
        wanted: Callable[[str], bool],
        read: Read,
        read_compressed: Read | None,
        on_layer: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """Measure the linears, each layer's inputs coming through compressed layers.

        Args:
            wanted: whether the weight of a checkpoint name is to be measured; a layer without any is only passed.
            read: the fine-tuned weight of a checkpoint name, for the layer that is measured.
            read_compressed: the rebuilt weight of a checkpoint name, for all that lies before that layer. Without it
                the inputs come through the fine-tuned layers, and what is measured is that of `inputs`.
            on_layer: gets the second moments E[x xT], float32 (inputs, inputs), of a layer's linears by checkpoint
                name and compresses them; called for each decoder layer in turn, and at last for an untied head.
        """
        self.wanted, self.read, self.read_compressed, self.on_layer = wanted, read, read_compressed, on_layer
        with torch.inference_mode():
            hidden = self.forward(read_compressed or read, self._forward_layer)[self.mask]
            if self.own_head is not None and read_compressed is not None:
                self.on_layer({self.name_of(self.own_head): hidden.T @ hidden / len(hidden)})

    def forward(self, read: Read, forward_layer: Callable[..., Any]) -> Tensor:
        """The last hidden states (sequences, length, hidden), the head being left out.

        Args:
            read: a weight of a checkpoint name, for what is no decoder layer.
            forward_layer: gets each decoder layer and its arguments, and gives its output.
        """
        inside = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        skipped = inside | (set() if self.own_head is None else {id(self.own_head.weight)})
        outside = [name for name, parameter in self.model.named_parameters() if id(parameter) not in skipped]
        for name in outside:
            _assign(self.model, name, self.sources.read(name, read).to(self.device))
        for layer in self.layers:
            layer.forward = partial(forward_layer, layer)
        output = self.model.base_model(input_ids=self.ids, attention_mask=self.mask.long(), use_cache=False)
        hidden: Tensor = output.last_hidden_state
        for name in outside:  # an embedding may be the largest weight of all
            _assign(self.model, name, torch.empty(0))
        return hidden

    def _forward_layer(self, layer: nn.Module, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """In a decoder layer's place: measure, have it compressed, and go on with its compressed weights."""
        del layer.forward  # the class's own again
        prefix = self.prefixes[id(layer)]
        names = {own for name, _ in layer.named_parameters(prefix) for own in self.sources.of(name)}
        if any(map(self.wanted, names)):
            moments = Moments(self.mask, inputs_of if self.read_compressed is None else _second_moment)
            with self.observing(layer, moments.add):
                output = self.forward_rows(layer, self.weights(layer, self.read), moments, hidden, arguments, options)
            self.on_layer(moments.means())
            if self.read_compressed is None:
                return output
        weights = self.weights(layer, self.read_compressed or self.read)
        return self.forward_rows(layer, weights, None, hidden, arguments, options)

    def name_of(self, module: nn.Module) -> str:
        """The checkpoint's name of a module's weight."""
        return self.sources.names[f"{self.prefixes[id(module)]}.weight"]

    def weights(self, layer: nn.Module, read: Read) -> dict[str, Tensor]:
        """A layer's parameters in float32, by their names within it."""
        prefix, names = self.prefixes[id(layer)], [name for name, _ in layer.named_parameters()]
        return {name: self.sources.read(f"{prefix}.{name}", read).to(self.device) for name in names}

    def forward_rows(
        self,
        layer: nn.Module,
        weights: dict[str, Tensor],
        moments: "Moments | None",
        hidden: Tensor,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        """The layer's output for the whole batch, a few rows at a time."""
        batch = hidden.shape[0]
        step = max(1, TOKENS_AT_ONCE // hidden.shape[1])
        outputs: list[Any] = []
        for start in range(0, batch, step):
            rows = slice(start, start + step)
            if moments is not None:
                moments.rows = rows
            some = take_rows((hidden, *arguments), rows, batch), take_rows(options, rows, batch)
            outputs.append(torch.func.functional_call(layer, weights, *some))
        if isinstance(outputs[0], tuple):
            return torch.cat([output[0] for output in outputs]), *outputs[-1][1:]
        return torch.cat(outputs)

    @contextmanager
    def observing(self, layer: nn.Module, on_product: OnProduct) -> Iterator[None]:
        """Meanwhile have `on_product` called with each product of a layer's linears and experts."""
        with ExitStack() as hooks:
            for name, module in layer.named_modules(prefix=self.prefixes[id(layer)]):
                if isinstance(module, nn.Linear):
                    hook = partial(_observe_linear, self.name_of(module), on_product)
                    hooks.callback(module.register_forward_hook(hook).remove)
                elif is_experts(module) and can_run(module) and f"{name}.down_proj" in self.sources.experts:
                    product = partial(self._observe, module, name, on_product)
                    module.forward = partial(run_experts, module, product=product)
                    hooks.callback(delattr, module, "forward")
            yield

    def _observe(
        self, module: Any, name: str, on_product: OnProduct, parameter: str, expert: int, x: Tensor, tokens: Tensor
    ) -> Tensor:
        """An expert's outputs, computed by the matrices that the checkpoint has of it."""
        weight: Tensor = getattr(module, parameter)[expert]
        names = self.sources.experts[f"{name}.{parameter}"][expert]
        if module.is_transposed:
            outputs = [x @ weight]
        else:
            outputs = [linear(x, part) for part in weight.split([self.tensors[own].shape[0] for own in names])]
        for own, y in zip(names, outputs, strict=True):
            on_product(Product(own, x, y, tokens, module.is_transposed))
        y = torch.cat(outputs, -1)
        return y + getattr(module, f"{parameter}_bias")[expert] if module.has_bias else y


class Moments:
    """Sums `measure` over the tokens that pass each matrix, padding left out."""

    def __init__(self, mask: Tensor, measure: Callable[[Tensor], Tensor]) -> None:
        self.mask, self.rows, self.measure = mask, slice(None), measure
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.fewest: dict[str, int] = {}

    def add(self, product: Product) -> None:
        """Add a product of the batch's `rows`."""
        if product.is_transposed:  # its columns are no inputs
            return
        name, x, mask = product.name, product.x, self.mask[self.rows]
        if product.tokens is not None:
            x = x[mask.flatten()[product.tokens]]
            self.fewest[name] = FEWEST_TOKENS
        elif x.shape[:2] == mask.shape:
            x = x[mask]
        else:
            x = x.reshape(-1, x.shape[-1])
            if len(x) == mask.numel():
                x = x[mask.flatten()]
        self.counts[name] = self.counts.get(name, 0) + len(x)
        self.sums[name] = self.sums.get(name, 0) + self.measure(x)

    def means(self) -> dict[str, Tensor]:
        """By the checkpoint's names, without the experts that too few tokens have passed."""
        counts = {name: count for name, count in self.counts.items() if count >= self.fewest.get(name, 0)}
        return {name: self.sums[name] / max(count, 1) for name, count in counts.items()}


def _observe_linear(
    name: str, on_product: OnProduct, module: nn.Linear, arguments: tuple[Tensor, ...], y: Tensor
) -> None:
    on_product(Product(name, arguments[0], y))


def _second_moment(x: Tensor) -> Tensor:
    return x.T @ x


def inputs_of(x: Tensor) -> Tensor:
    """The sums of squares of rows x (tokens, inputs) and of themselves, by input: (2, inputs)."""
    return torch.stack((x.square().sum(0), x.sum(0)))


def _skeleton(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The model without weights, its buffers (rotary frequencies) on the device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers initializes weights that are not there
            model = auto_class(config.model_type).from_config(config, dtype=torch.float32, trust_remote_code=False)
    except UNFIT_FILES as error:
        raise DeltacomeError(f"transformers cannot build {checkpoint.source} to calibrate: {reason(error)}") from error
    model.tie_weights()
    for module in model.modules():  # `model.to` would want the weights
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def random_tokens(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Uniformly random token ids and the mask that takes all of them: inputs as varied as the vocabulary, without data.

    Raises:
        DeltacomeError: if the configuration does not say how large the vocabulary is.
    """
    size = checkpoint.config.get("vocab_size") or checkpoint.config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise DeltacomeError(f"the configuration of {checkpoint.source} names no vocabulary size")
    ids = torch.randint(size, RANDOM_TOKENS, generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def batch(examples: list[Example], encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Token ids (examples, longest) padded on the right, and the mask of what is no padding."""
    rows = [encoder.example(example).ids[:LONGEST] for example in examples]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    return ids, mask


def take_rows(value: Any, rows: slice, batch: int) -> Any:
    """Rows of every tensor that has the batch as its first dimension."""
    match value:
        case Tensor() if value.ndim and value.shape[0] == batch:
            return value[rows]
        case tuple() | list():
            return type(value)(take_rows(part, rows, batch) for part in value)
        case dict():
            return {key: take_rows(part, rows, batch) for key, part in value.items()}
    return value
