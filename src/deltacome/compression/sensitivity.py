"""What a unit of squared error in each weight costs in KL, to second order: by gradients, a decoder layer at a time.

An error E of a weight moves its layer's outputs by E x, and KL(p || p') is half the mean of (Σ gᵀ E x)², a sum over a
sequence's positions, g being the gradient of the sequence's log-probability with respect to the output and each token
being drawn from p (Fisher information). For an E whose entries are independent that is half the sensitivity times |E|²:

    of a linear (m, n)     E |Σ g xᵀ|² / (m n)
    of a head              E[(1 - Σ p²) |h|²] / (tokens · n), h being the last hidden state
    of an embedding        E[|g|²] / (tokens · n), its tokens being different ones

as means over positions, and then as the geometric mean over sequences: in some, gradients explode, as where an expert
is chosen by a hair, and a plain mean would be that of these alone.

docs/methods.md derives it. Random tokens do for the sizes of weights against each other, so no data is needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltacome.checkpoints.parameter_sources import Read
from deltacome.compression.calibration import CalibrationStream, Moments, Product, inputs_of, take_rows

HEAD_TOKENS = 128  # whose logits are in memory


def measure_sensitivities(
    stream: CalibrationStream,
    read: Read,
    advance: Callable[[float], None],
    sequences: int | None = None,
    inputs: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Sensitivities, in nats a token for a squared error of 2, by checkpoint name: of linears, embedding and head.

    Holds the hidden states between all layers, and one layer's weights at a time.

    Args:
        stream: of a few sequences without padding.
        read: a weight of a checkpoint name.
        advance: called with the weights of each layer, forwards and backwards.
        sequences: how many of the first are gone back through; all, if not given.
        inputs: gets what `CalibrationStream.inputs` gives of all linears, on the way forwards.
    """
    model, count = stream.model, len(stream.ids)
    chosen = slice(sequences)
    calls: list[tuple[nn.Module, Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def forward(layer: nn.Module, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        del layer.forward  # the class's own again
        own = take_rows((hidden.detach(), *arguments), chosen, count), take_rows(options, chosen, count)
        calls.append((layer, own[0][0], own[0][1:], own[1]))
        moments = Moments(stream.mask, inputs_of)
        weights = stream.weights(layer, read)
        with torch.no_grad(), stream.observing(layer, moments.add):
            output = stream.forward_rows(layer, weights, moments, hidden, arguments, options)
        measured.update(moments.means())
        advance(sum(weight.numel() for weight in weights.values()))
        if layer is stream.layers[-1]:
            last.append(_first(output).requires_grad_())
        return output

    last: list[Tensor] = []
    measured: dict[str, Tensor] = {}
    with torch.enable_grad():
        hidden = stream.forward(read, forward)
    if inputs is not None:
        inputs.update(measured)
    embedding_name = stream.name_of(model.get_input_embeddings())
    head_name = embedding_name if stream.own_head is None else stream.name_of(stream.own_head)
    weight = read(head_name).float().to(stream.device)
    slope, of_head = _through_head(hidden[chosen].detach(), weight)
    own_count, length = stream.ids[chosen].shape
    found = {head_name: of_head / weight.numel()}
    del weight
    hidden[chosen].backward(slope.view_as(hidden[chosen]))
    assert last[0].grad is not None
    gradient = last[0].grad[chosen]
    sums: dict[str, list[float]] = {}  # numbers: small tensors between large ones keep memory from being given back
    for layer, entering, arguments, options in reversed(calls):
        weights = stream.weights(layer, read)
        with torch.enable_grad(), stream.observing(layer, partial(_add, sums, own_count, length)):
            output = torch.func.functional_call(layer, weights, (entering.requires_grad_(), *arguments), options)
            _first(output).backward(gradient)
        gradient = entering.grad
        assert gradient is not None
        advance(sum(weight.numel() for weight in weights.values()))
    found |= {name: torch.tensor(own) / stream.tensors[name].elements / length for name, own in sums.items()}
    # Random tokens don't choose experts as others do, so those of a layer count alike.
    for stack in stream.sources.experts.values():
        for alike in zip(*stack, strict=True):
            mean = torch.stack([found.get(name, torch.zeros(own_count)) for name in alike]).mean(0)
            found |= dict.fromkeys(alike, mean)
    of_embedding = gradient.square().sum((1, 2)).cpu() / length / stream.tensors[embedding_name].elements
    found[embedding_name] = found.get(embedding_name, 0.0) + of_embedding
    return {name: float(own.double().log().mean().exp()) for name, own in found.items()}


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _add(sums: dict[str, list[float]], sequences: int, length: int, product: Product) -> None:
    """Add |Σ g xᵀ|² of each sequence, or of each token where a matrix gets them without their sequences."""
    x, tokens = product.x.detach(), product.tokens
    own = sums.setdefault(product.name, [0.0] * sequences)

    def add(g: Tensor) -> None:  # not holding `product`: outputs would hold themselves, and the layer's graph
        if x.ndim == 3:
            squares = ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
        else:
            places = torch.arange(len(x), device=x.device) if tokens is None else tokens
            each = x.square().sum(-1) * g.square().sum(-1)
            squares = x.new_zeros(sequences).index_add_(0, places // length, each)
        own[:] = [before + square for before, square in zip(own, squares.tolist(), strict=True)]

    product.y.register_hook(add)


def _through_head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the negative log-probabilities of drawn tokens with respect to the hidden states (sequences, length,
    n), one row a token, and each sequence's mean of (1 - Σ p²) |h|²."""
    generator = torch.Generator(hidden.device).manual_seed(0)
    slopes: list[Tensor] = []
    energies: list[float] = []
    for h in hidden.flatten(0, 1).split(HEAD_TOKENS):
        p = (h @ weight.T).softmax(-1)
        energies += ((1 - p.square().sum(1)) * h.square().sum(1)).tolist()
        # By the inverse of the distribution: `torch.multinomial` draws a number for each token of the vocabulary.
        places = torch.rand(len(p), 1, generator=generator, device=p.device)
        drawn = torch.searchsorted(p.cumsum(1), places).clamp_(max=p.shape[1] - 1)
        p.scatter_add_(1, drawn, -torch.ones_like(places))
        slopes.append(p @ weight)
    return torch.cat(slopes), torch.tensor(energies).view(hidden.shape[:2]).mean(1)
