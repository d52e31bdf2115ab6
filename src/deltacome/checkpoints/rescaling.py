"""A fine-tuned model that has shrunk or grown as a whole, written with weights as large as its base's.

Weight decay takes the same share of every weight, again and again. That part of a delta is the base itself, which no
few components hold. But RMS norms do not see how large their inputs are: with all matrices divided by a factor, and
norms multiplied by it for what the layers behind them lose, a model computes the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import Pair
from deltacome.weights import is_embedding

# Models of which this is so: an RMS norm before every block and before the head, and none on what blocks give.
MODEL_TYPES = {"llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}
# What stays, as outputs of the matrices before them do: vectors of layers that read a norm.
KEPT = {f"{name}_proj.bias" for name in ("q", "k", "v", "qkv")} | {"q_norm.weight", "k_norm.weight"}
LEAST_GAIN = 0.1  # of the energy of the deltas
LARGEST_CHANGE = 0.1  # of the size; what has changed more is no fine-tune of this base
SAMPLED, ROWS = 8, 4096  # linear weights that are looked at, and rows of each


class Rescaled(Checkpoint):
    """A fine-tuned checkpoint with its matrices divided by `factor`, and its norms multiplied by it.

    Norms are float32 (`tensors` says so): in 16 bit most of a small factor would be lost.

    Raises:
        DeltacomeError: as `Checkpoint`.
    """

    def __init__(self, source: str | Path, factor: float) -> None:
        super().__init__(source)
        self.factor = factor
        for name, info in self.tensors.items():
            if _power(name, len(info.shape)) == 1:
                self.tensors[name] = replace(info, dtype=torch.promote_types(info.dtype, torch.float32))

    def read(self, name: str) -> Tensor:
        """One tensor, in its dtype."""
        value = super().read(name)
        power = _power(name, value.ndim)
        return value if not power else value.double().mul_(self.factor**power).to(self.tensors[name].dtype)

    def read_float(self, name: str) -> Tensor:
        """One tensor as a float32 copy, not rounded before, checked for NaN and infinity."""
        value = super().read_float(name)
        return value.mul_(self.factor ** _power(name, value.ndim))


def rescaled(base: Checkpoint, finetuned: Checkpoint, pairs: Sequence[Pair]) -> Checkpoint:
    """The fine-tuned checkpoint; or, where deltas have less energy then, another one that computes the same.

    The factor is the median of what some of the linear weights' deltas would choose. Nothing is rescaled where a matrix
    is stored as it is, which would round it, or where embeddings have not shrunk with the rest.
    """
    fits = finetuned.config.get("model_type") in MODEL_TYPES and all(
        p.is_matrix or _power(p.name, len(p.shape)) == 1 or p.name.endswith(tuple(KEPT)) for p in pairs
    )
    matrices = [p for p in pairs if p.is_matrix and not is_embedding(p.name)]
    if not fits or not matrices:
        return finetuned
    linears = [_products(p, base, finetuned) for p in matrices[:: -(-len(matrices) // SAMPLED)]]
    # Rounded, for sums differ in their last bits from one number of threads to another, and the work is gone on with.
    factor = round(median(across / before if before else 1.0 for before, across, _ in linears), 6)
    if not 0 < abs(factor - 1) <= LARGEST_CHANGE:
        return finetuned
    embeddings = [_products(p, base, finetuned) for p in pairs if is_embedding(p.name)]
    is_better = _energy(linears, factor) < (1 - LEAST_GAIN) * _energy(linears, 1.0)
    if not is_better or _energy(embeddings, factor) > _energy(embeddings, 1.0):
        return finetuned
    return Rescaled(finetuned.source, factor)


def _products(p: Pair, base: Checkpoint, finetuned: Checkpoint) -> tuple[float, float, float]:
    """Of the first rows of a weight: the base's inner product with itself, with the fine-tuned one, and of that."""
    assert p.base_name is not None
    rows = min(p.rows, ROWS)
    before, after = base.read_float(p.base_name)[:rows].double(), finetuned.read_float(p.name)[:rows].double()
    return float((before * before).sum()), float((before * after).sum()), float((after * after).sum())


def _energy(products: Sequence[tuple[float, float, float]], factor: float) -> float:
    """That of deltas, the fine-tuned weights being divided by a factor."""
    return sum(after / factor**2 - 2 * across / factor + before for before, across, after in products)


def rescale(model: Any, factor: float) -> None:
    """Divide a model's matrices by a factor and multiply its norms by it, in place."""
    for name, parameter in model.named_parameters():
        parameter.data *= factor ** _power(name, parameter.ndim)


def _power(name: str, dimensions: int) -> int:
    """Of the factor, that a tensor is multiplied by."""
    if dimensions > 1:
        return -1
    return 1 if name.removesuffix(".weight").rpartition(".")[2] in NORMS else 0
