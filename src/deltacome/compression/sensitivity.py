"""What a unit of squared error in each weight costs in KL, to second order: by gradients, a decoder layer at a time.

An error E of a weight moves its layer's output by E x, and so KL(p || p') is half the mean of (gᵀ E x)², g being the
gradient of a token's log-probability with respect to that output and the token being drawn from p (Fisher information).
With the entries of g and x taken as uncorrelated and of one size each, that is half the sensitivity times |E|²:

    of a linear (m, n)     E[|g|²] / m · E[|x|²] / n
    of a head              E[(1 - Σ p²) |h|²] / (tokens · n), h being the last hidden state
    of an embedding        E[|g|²] / (tokens · n)

docs/methods.md derives it. Random tokens do for the sizes of weights against each other, so no data is needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.compression.calibration import CalibrationStream, Read

HEAD_TOKENS = 128  # whose logits are in memory


def measure_sensitivities(stream: CalibrationStream, read: Read, advance: Callable[[float], None]) -> dict[str, float]:
    """Sensitivities, in nats a token for a squared error of 2, by checkpoint name: of linears, embedding and head.

    Holds the hidden states between all layers, and one layer's weights at a time.

    Args:
        stream: of a few sequences without padding.
        read: a weight of a checkpoint name.
        advance: called with the weights of each layer that is measured.
    """
    model = stream.model
    calls: list[tuple[nn.Module, Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def forward(layer: nn.Module, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        del layer.forward  # the class's own again
        calls.append((layer, hidden.detach(), arguments, options))
        with torch.no_grad():
            output = stream.forward_rows(layer, _weights(stream, layer, read), None, hidden, arguments, options)
        if layer is stream.layers[-1]:
            last.append(_first(output).requires_grad_())
        return output

    last: list[Tensor] = []
    with torch.enable_grad():
        hidden = stream.forward(read, forward)
    embedding_name = stream.names[f"{stream.prefixes[id(model.get_input_embeddings())]}.weight"]
    head_name = embedding_name
    if stream.own_head is not None:
        head_name = stream.names[f"{stream.prefixes[id(stream.own_head)]}.weight"]
    weight = read(head_name).float()
    slope, energy = _through_head(hidden.detach().flatten(0, 1), weight)
    found = {head_name: energy / weight.numel()}
    del weight
    hidden.backward(slope.view_as(hidden))
    gradient = last[0].grad
    assert gradient is not None
    for layer, inputs, arguments, options in reversed(calls):
        weights = _weights(stream, layer, read)
        sums: dict[str, list[float]] = {}
        handles = [
            module.register_forward_hook(partial(_add, sums.setdefault(name, [0.0, 0.0, 0.0])))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        with torch.enable_grad():
            output = torch.func.functional_call(layer, weights, (inputs.requires_grad_(), *arguments), options)
            _first(output).backward(gradient)
        for handle in handles:
            handle.remove()
        gradient = inputs.grad
        assert gradient is not None
        for name, own in stream.names_of(layer).items():
            slopes, squares, count = sums.get(name.removesuffix(".weight"), (0.0, 0.0, 0.0))
            if name.endswith(".weight") and count:
                m, n = weights[name].shape
                found[own] = slopes / m * squares / (n * count) / stream.ids.numel()
        advance(sum(weight.numel() for weight in weights.values()))
    energy = float(gradient.square().sum()) / stream.ids.numel()
    found[embedding_name] = found.get(embedding_name, 0.0) + energy / stream.sizes[embedding_name]
    return found


def _weights(stream: CalibrationStream, layer: nn.Module, read: Read) -> dict[str, Tensor]:
    return {name: read(own).float() for name, own in stream.names_of(layer).items()}


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _add(sums: list[float], module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    """Add up the squares of a linear's gradients and inputs, and count its tokens."""

    def add_slopes(slope: Tensor) -> None:
        sums[0] += float(slope.square().sum())

    sums[1] += float(arguments[0].detach().square().sum())
    sums[2] += output.numel() // output.shape[-1]
    output.register_hook(add_slopes)


def _through_head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Gradients of the negative log-probabilities of drawn tokens with respect to the hidden states (count, n), and the
    mean of (1 - Σ p²) |h|²."""
    generator = torch.Generator().manual_seed(0)
    slopes, energy = [], 0.0
    for h in hidden.split(HEAD_TOKENS):
        p = (h @ weight.T).softmax(-1)
        energy += float(((1 - p.square().sum(1)) * h.square().sum(1)).sum())
        p[torch.arange(len(p)), torch.multinomial(p, 1, generator=generator)[:, 0]] -= 1
        slopes.append(p @ weight)
    return torch.cat(slopes), energy / len(hidden)
