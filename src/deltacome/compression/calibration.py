"""Second moments, or energies, of the inputs of every linear layer, computed a decoder layer at a time.

The model is built without weights. A decoder layer has its weights only while the calibration data passes through it,
so memory holds one layer, the second moments of its linears and the hidden states of the data.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.checkpoints.architectures import auto_class
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.module_names import ModuleNames
from deltacome.data import Encoder, Example
from deltacome.errors import DeltacomeError, reason
from deltacome.hub import UNFIT_FILES
from deltacome.weights import OUTPUT_EMBEDDINGS

TOKENS_AT_ONCE = 2048  # in one forward pass of a layer
LONGEST = 2048  # tokens of an example that are used, the paper's length
RANDOM_TOKENS = (32, 128)  # sequences and their length: energies are means, which few tokens give well enough

Read = Callable[[str], Tensor]


class CalibrationStream:
    """Takes token sequences through a model layer by layer.

    Args:
        checkpoint: the fine-tuned checkpoint.
        ids, mask: the sequences, int64 and bool (sequences, length), and what of them is no padding.

    Raises:
        DeltacomeError: if transformers cannot build the architecture, or its weights are not found by name.
    """

    def __init__(self, checkpoint: Checkpoint, ids: Tensor, mask: Tensor) -> None:
        self.model = _skeleton(checkpoint)
        self.layers = _decoder_layers(self.model)
        self.names = _checkpoint_names(self.model, checkpoint)
        self.sizes = {self.names[name]: parameter.numel() for name, parameter in self.model.named_parameters()}
        self.prefixes = {id(module): name for name, module in self.model.named_modules()}
        head = self.model.get_output_embeddings()
        is_own = isinstance(head, nn.Linear) and head.weight is not self.model.get_input_embeddings().weight
        self.own_head = head if is_own else None  # untied
        self.ids, self.mask = ids, mask

    def energies(
        self, wanted: Callable[[str], bool], read: Read, advance: Callable[[float], None]
    ) -> dict[str, Tensor]:
        """E[x²] of the inputs x of each wanted linear, float32 (inputs,), by its checkpoint name.

        Args:
            read: a weight of a checkpoint name.
            advance: called with the weights of each linear that is measured.
        """
        found: dict[str, Tensor] = {}

        def keep(means: dict[str, Tensor]) -> None:
            found.update(means)
            advance(sum(self.sizes[name] for name in means))

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
                the inputs come through the fine-tuned layers, and energies are measured, see `energies`.
            on_layer: gets the second moments E[x xT], float32 (inputs, inputs), of a layer's linears by checkpoint
                name and compresses them; called for each decoder layer in turn, and at last for an untied head.
        """
        self.wanted, self.read, self.read_compressed, self.on_layer = wanted, read, read_compressed, on_layer
        with torch.inference_mode():
            hidden = self.forward(read_compressed or read, self._forward_layer)[self.mask]
            if self.own_head is not None and read_compressed is not None:
                name = f"{self.prefixes[id(self.own_head)]}.weight"
                self.on_layer({self.names[name]: hidden.T @ hidden / len(hidden)})

    def forward(self, read: Read, forward_layer: Callable[..., Any]) -> Tensor:
        """The last hidden states (sequences, length, hidden), the head being left out.

        Args:
            read: a weight of a checkpoint name, for what is no decoder layer.
            forward_layer: gets each decoder layer and its arguments, and gives its output.
        """
        inside = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        skipped = inside | (set() if self.own_head is None else {id(self.own_head.weight)})
        for name, parameter in list(self.model.named_parameters()):
            if id(parameter) not in skipped:
                _assign(self.model, name, read(self.names[name]).float())
        for layer in self.layers:
            layer.forward = partial(forward_layer, layer)
        output = self.model.base_model(input_ids=self.ids, attention_mask=self.mask.long(), use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _forward_layer(self, layer: nn.Module, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """In a decoder layer's place: measure, have it compressed, and go on with its compressed weights."""
        del layer.forward  # the class's own again
        names = self.names_of(layer)

        def weights(source: Read) -> dict[str, Tensor]:
            return {name: source(checkpoint_name).float() for name, checkpoint_name in names.items()}

        if any(map(self.wanted, names.values())):
            moments = _Moments(layer, self.mask, _energies if self.read_compressed is None else _second_moment)
            output = self.forward_rows(layer, weights(self.read), moments, hidden, arguments, options)
            self.on_layer({names[f"{name}.weight"]: moment for name, moment in moments.close().items()})
            if self.read_compressed is None:
                return output
        return self.forward_rows(layer, weights(self.read_compressed or self.read), None, hidden, arguments, options)

    def names_of(self, layer: nn.Module) -> dict[str, str]:
        """The checkpoint names of a layer's parameters, by their names within it."""
        prefix = self.prefixes[id(layer)]
        return {name: self.names[f"{prefix}.{name}"] for name, _ in layer.named_parameters()}

    def forward_rows(
        self,
        layer: nn.Module,
        weights: dict[str, Tensor],
        moments: "_Moments | None",
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
            some = _rows((hidden, *arguments), rows, batch), _rows(options, rows, batch)
            outputs.append(torch.func.functional_call(layer, weights, *some))
        if isinstance(outputs[0], tuple):
            return torch.cat([output[0] for output in outputs]), *outputs[-1][1:]
        return torch.cat(outputs)


class _Moments:
    """Hooks that sum `measure` over the tokens that pass each linear of a layer, padding left out."""

    def __init__(self, layer: nn.Module, mask: Tensor, measure: Callable[[Tensor], Tensor]) -> None:
        self.mask, self.rows, self.measure = mask, slice(None), measure
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = [
            module.register_forward_hook(partial(self._add, name))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def _add(self, name: str, module: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        mask = self.mask[self.rows]
        x = arguments[0]
        x = x[mask] if x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
        self.counts[name] = self.counts.get(name, 0) + len(x)
        self.sums[name] = self.sums.get(name, 0) + self.measure(x)

    def close(self) -> dict[str, Tensor]:
        """Remove the hooks; the means by the linear's name within the layer."""
        for handle in self.handles:
            handle.remove()
        return {name: total / max(self.counts[name], 1) for name, total in self.sums.items()}


def _second_moment(x: Tensor) -> Tensor:
    return x.T @ x


def _energies(x: Tensor) -> Tensor:
    return x.square().sum(0)


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The model without weights, its buffers (rotary frequencies) in place."""
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
    return model.eval()


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def _checkpoint_names(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's names of a model's parameters.

    It may have been saved with or without the base model's prefix, or, as vision-language models are, in other places.

    Raises:
        DeltacomeError: if it lacks a parameter.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, str] = {}
    prefix = model.base_model_prefix
    for name in shapes:
        renamed = OUTPUT_EMBEDDINGS if name in OUTPUT_EMBEDDINGS else ()  # transformers has given heads one name
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", *renamed):
            if candidate in checkpoint.tensors:
                found.setdefault(name, candidate)
    missing = shapes.keys() - found.keys()
    # Not where stacks of experts are missing, which a checkpoint may have one by one, in tens of thousands of tensors.
    if missing and not any(len(shapes[name]) == 3 and shapes[name][0] > 1 for name in missing):
        names = ModuleNames(model)
        for tensor in sorted(checkpoint.tensors.keys() - found.values()):
            with suppress(DeltacomeError):
                name = names.find(tensor)
                if name in missing and checkpoint.tensors[tensor].shape == shapes[name]:
                    found.setdefault(name, tensor)
    for name in shapes:
        if name not in found:
            raise DeltacomeError(
                f"no data can be taken through {checkpoint.source}, which has {name} in another form; compress it "
                "without --calibration"
            )
    return found


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


def _rows(value: Any, rows: slice, batch: int) -> Any:
    """Rows of every tensor that has the batch as its first dimension."""
    match value:
        case Tensor() if value.ndim and value.shape[0] == batch:
            return value[rows]
        case tuple() | list():
            return type(value)(_rows(part, rows, batch) for part in value)
        case dict():
            return {key: _rows(part, rows, batch) for key, part in value.items()}
    return value
