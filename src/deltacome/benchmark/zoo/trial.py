"""Approximations of a delta in memory: as many as one likes of one fine-tune, each measured by its KL."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from deltacome.benchmark import results
from deltacome.benchmark.zoo.cache import checkpoints, offtask
from deltacome.benchmark.zoo.members import MEMBERS
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.checkpoints.parameter_sources import ParameterSources
from deltacome.checkpoints.rescaling import Rescaled, rescale, rescaled
from deltacome.compression.budget import Budget
from deltacome.compression.matrices import count_layers, read_delta, sensitivity_of
from deltacome.compression.measuring import measure
from deltacome.compression.methods import MatrixDelta, Method
from deltacome.data import Encoded, read_examples
from deltacome.evaluate.comparison import load_for
from deltacome.evaluate.metrics import divergences
from deltacome.files import disk_errors
from deltacome.format.entries import WeightEntry, term_tensors
from deltacome.format.terms import Dense
from deltacome.progress import print_warning
from deltacome.version import __version__
from deltacome.weights import is_embedding, module_kind

LIMIT = 20  # examples and texts, if nobody says otherwise
TEXT_TOKENS = 80  # of an off-task text
AT_ONCE = 6  # approximations that are in memory, measured against one pass of the fine-tuned model

Weights = dict[str, Tensor]


class Trial:
    """A member of the zoo and its base; what is not approximated is the fine-tuned model's.

    matrices: the deltas by name, each (m, n) in float32, those that are zero left out.

    Args:
        limit: how many of the member's held-out examples, and at most how many off-task texts, are measured on.
    """

    def __init__(self, base: Path, member: Path, cache: Path, limit: int) -> None:
        self.base = Checkpoint(base)
        self.finetuned = rescaled(self.base, Checkpoint(member), pair(self.base, Checkpoint(member)))
        self.pairs = {p.name: p for p in pair(self.base, self.finetuned)}
        matrices = [p for p in self.pairs.values() if p.is_matrix]
        inputs, sensitivities = measure(self.finetuned, matrices, None, print_warning)
        layers = count_layers(p.name for p in matrices)
        self.matrices: dict[str, MatrixDelta] = {}
        for p in matrices:
            values, _ = read_delta(p, self.base, self.finetuned)
            if values.any():
                energy, mean = inputs.get(p.name, (None, None))
                self.matrices[p.name] = MatrixDelta(
                    values,
                    is_embedding(p.name),
                    energy=energy,
                    mean=mean,
                    sensitivity=sensitivity_of(p.name, sensitivities),
                    layers=layers[module_kind(p.name)],
                )
        examples = read_examples(member / "data" / "test.jsonl", limit)
        self.model, encoder = load_for(examples, self.finetuned, self.base, None)
        if isinstance(self.finetuned, Rescaled):
            rescale(self.model, self.finetuned.factor)
        self.encoded = {
            "on_task_kl": [encoder.example(example) for example in examples],
            "off_task_kl": [
                Encoded(encoder.example(text).ids[:TEXT_TOKENS]) for text in read_examples(offtask(cache, limit))
            ],
        }
        self.sources = ParameterSources(self.model, self.finetuned)

    def at(self, ratio: float) -> Iterator[tuple[str, MatrixDelta]]:
        """The matrices by name, at a ratio."""
        for name, delta in self.matrices.items():
            yield name, replace(delta, bits_per_weight=16 / ratio)

    def budget(self, method: Method, ratio: float) -> tuple[Budget, dict[str, WeightEntry]]:
        """The budget at a ratio, and what the weights that are no matrices take."""
        entries = {}
        for p in self.pairs.values():
            if not p.is_matrix:
                value = self.finetuned.read(p.name)
                same = p.base_name is not None and torch.equal(value, self.base.read(p.base_name))
                fields, _ = term_tensors([] if same else [Dense(value)], p.shape)
                entries[p.name] = WeightEntry(p.name, p.shape, p.dtype, p.base_name, **fields)
        return Budget(method, self.pairs, ratio, False), entries

    def weights(self, approximations: Weights) -> Weights:
        """The model's parameters with approximate deltas (m, n) by the matrices' names, which are changed in place."""
        for name, approximation in approximations.items():
            p = self.pairs[name]
            assert p.base_name is not None
            if p.rows < p.shape[0]:
                approximation[p.rows :] = self.finetuned.read_float(name)[p.rows :]
            approximation[: p.rows] += self.base.read_float(p.base_name)[: p.rows]

        def read(name: str) -> Tensor:
            return approximations[name] if name in approximations else self.finetuned.read_float(name)

        parameters = [name for name, _ in self.model.named_parameters()]
        return {
            name: self.sources.read(name, read)
            for name in parameters
            if not approximations.keys().isdisjoint(self.sources.of(name))
        }

    def measure(self, models: Iterable[Weights]) -> Iterator[dict[str, float]]:
        """`on_task_kl` and `off_task_kl` in nats a token, each with + `_error`, of every set of parameters."""
        remaining = iter(models)
        while chunk := list(islice(remaining, AT_ONCE)):
            rows: list[dict[str, float]] = [{} for _ in chunk]
            called = [partial(_call, self.model, weights) for weights in chunk]
            for figure, encoded in self.encoded.items():
                found = divergences(self.model, called, encoded, lambda _: None)
                for row, (kl, _) in zip(rows, found, strict=True):
                    row |= {figure: kl.value, f"{figure}_error": kl.error}
            yield from rows


Measure = Callable[[Trial], Iterable[results.Row]]


def measured(
    out: Path, members: Sequence[str], cache: str | Path | None, limit: int, settings: Any, measure: Measure
) -> list[results.Row]:
    """The rows of members, each with its `member`; a member's are kept in a file in `out`, and taken up from it.

    Args:
        members, cache: as of `checkpoints`. limit: as of `Trial`. settings: all else that the rows depend on.
        measure: gives the rows of a member that are missing.

    Raises:
        DeltacomeError: on an unknown member, a missing package or a full disk.
    """
    cache, folders = checkpoints(members, cache)
    rows: list[results.Row] = []
    with disk_errors(f"write {out}"):
        out.mkdir(exist_ok=True)
        for name, folder in folders.items():
            base = cache / MEMBERS[name].base
            models = [__version__, Checkpoint(base).stamp(), Checkpoint(folder).stamp()]
            path, digest = out / f"{name}.json", results.digest([models, limit, settings])
            found = results.stored(path, digest)
            if found is None:
                trial = Trial(base, folder, cache, limit)
                found = {"rows": [{"member": name, **row} for row in measure(trial)]}
                results.store(path, digest, found)
            rows += found["rows"]
    return rows


def _call(model: Any, parameters: dict[str, Tensor], **inputs: Any) -> Any:
    return functional_call(model, parameters, kwargs=inputs)
