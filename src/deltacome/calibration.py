"""Second moments of the inputs of every linear layer, computed a decoder layer at a time.

The model is built without weights. A decoder layer has its weights only while the calibration data passes through it,
so memory holds one layer, the second moments of its linears and the hidden states of the data.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.checkpoint import Checkpoint
from deltacome.data import Encoder, Example
from deltacome.errors import DeltacomeError

TOKENS_AT_ONCE = 2048  # of the calibration data in one forward pass of a layer
LONGEST = 2048  # tokens of an example that are used, the paper's length

Read = Callable[[str], Tensor]


class CalibrationStream:
    """Takes examples through a model layer by layer, each layer's inputs coming through compressed layers.

    Args:
        checkpoint: the fine-tuned checkpoint.
        examples, encoder: the calibration data.

    Raises:
        DeltacomeError: if transformers cannot build the architecture, or its weights are not found by name.
    """

    def __init__(self, checkpoint: Checkpoint, examples: list[Example], encoder: Encoder) -> None:
        self.model = _skeleton(checkpoint)
        self.layers = _decoder_layers(self.model)
        prefix = self.model.base_model_prefix
        self.names = {name: _checkpoint_name(name, prefix, checkpoint) for name, _ in self.model.named_parameters()}
        self.prefixes = {id(module): name for name, module in self.model.named_modules()}
        self.ids, self.mask = _batch(examples, encoder)

    def run(
        self,
        wanted: Callable[[str], bool],
        read: Read,
        read_compressed: Read,
        on_layer: Callable[[dict[str, Tensor]], None],
    ) -> None:
        """Measure the linears.

        Args:
            wanted: whether the weight of a checkpoint name is to be measured; a layer without any is only passed.
            read: the fine-tuned weight of a checkpoint name, for the layer that is measured.
            read_compressed: the rebuilt weight of a checkpoint name, for all that lies before that layer.
            on_layer: gets the second moments E[x xT], float32 (inputs, inputs), of a layer's linears by checkpoint
                name and compresses them; called for each decoder layer in turn, and at last for an untied head.
        """
        self.wanted, self.read, self.read_compressed, self.on_layer = wanted, read, read_compressed, on_layer
        head = self.model.get_output_embeddings()
        own_head = isinstance(head, nn.Linear) and head.weight is not self.model.get_input_embeddings().weight
        inside = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        skipped = inside | ({id(head.weight)} if own_head else set())
        for name, parameter in list(self.model.named_parameters()):
            if id(parameter) not in skipped:
                _assign(self.model, name, read_compressed(self.names[name]).float())
        for layer in self.layers:
            layer.forward = partial(self._forward_layer, layer)
        with torch.inference_mode():
            output = self.model.base_model(input_ids=self.ids, attention_mask=self.mask.long(), use_cache=False)
            if own_head:
                hidden = output.last_hidden_state[self.mask]
                self.on_layer({self.names[f"{self.prefixes[id(head)]}.weight"]: hidden.T @ hidden / len(hidden)})

    def _forward_layer(self, layer: nn.Module, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        """In a decoder layer's place: measure, have it compressed, and go on with its compressed weights."""
        del layer.forward  # the class's own again
        prefix = self.prefixes[id(layer)]
        names = {name: self.names[f"{prefix}.{name}"] for name, _ in layer.named_parameters()}

        def weights(source: Read) -> dict[str, Tensor]:
            return {name: source(checkpoint_name).float() for name, checkpoint_name in names.items()}

        if any(map(self.wanted, names.values())):
            moments = _Moments(layer, self.mask)
            self._forward_rows(layer, weights(self.read), moments, hidden, arguments, options)
            self.on_layer({names[f"{name}.weight"]: moment for name, moment in moments.close().items()})
        return self._forward_rows(layer, weights(self.read_compressed), None, hidden, arguments, options)

    def _forward_rows(
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
    """Hooks that sum x xT over the inputs of each linear of a layer, padding left out."""

    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        self.mask, self.rows = mask, slice(None)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.handles = [
            module.register_forward_pre_hook(partial(self._add, name))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def _add(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        mask = self.mask[self.rows]
        x = x[mask] if x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
        self.counts[name] = self.counts.get(name, 0) + len(x)
        self.sums[name] = self.sums.get(name, 0) + x.T @ x

    def close(self) -> dict[str, Tensor]:
        """Remove the hooks; the means by the linear's name within the layer."""
        for handle in self.handles:
            handle.remove()
        return {name: total / max(self.counts[name], 1) for name, total in self.sums.items()}


def _skeleton(checkpoint: Checkpoint) -> Any:
    """The model without weights, its buffers (rotary frequencies) in place."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers initialises weights that are not there
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DeltacomeError(f"transformers cannot build {checkpoint.source} for calibration: {reason}") from error
    model.tie_weights()
    return model.eval()


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of modules that holds most of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def _checkpoint_name(name: str, prefix: str, checkpoint: Checkpoint) -> str:
    """A parameter's name in the checkpoint, which may have been saved with or without the base model's prefix."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in checkpoint.tensors:
            return candidate
    raise DeltacomeError(
        f"calibration cannot find the weights of {name} in {checkpoint.source}; compress it without --calibration"
    )


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _batch(examples: list[Example], encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Token ids (examples, longest) padded on the right, and the mask of what is no padding."""
    rows = [encoder.example(example)[0][:LONGEST] for example in examples]
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
