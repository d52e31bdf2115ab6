"""The pairing of a base's weights with those of its fine-tune."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.errors import DeltacomeError
from deltacome.weights import OUTPUT_EMBEDDINGS, is_embedding, is_matrix


@dataclass(frozen=True)
class Pair:
    """One weight of the fine-tuned checkpoint and the base's counterpart.

    base_name: None where the base has none. rows: leading rows that both have, and that a delta can add to.
    """

    name: str
    base_name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int

    @property
    def is_matrix(self) -> bool:
        """Whether a method compresses it: a floating-point matrix of some size with a counterpart in the base."""
        return self.base_name is not None and self.rows > 0 and self.dtype.is_floating_point and is_matrix(self.shape)


def pair(base: Checkpoint, finetuned: Checkpoint, renames: Mapping[str, str] | None = None) -> list[Pair]:
    """Match the weights of the two checkpoints by name.

    More or fewer rows than in the base (another vocabulary) and an output embedding that the base ties are understood,
    and so is a vision-language model on a plain language model: its language tower's names begin otherwise.

    Args:
        renames: beginnings of names in the fine-tuned checkpoint, and what stands for them in the base's. Without it
            such a beginning is looked for where it is needed.

    Raises:
        DeltacomeError: if the architectures or shapes are not those of a base and its fine-tune.
    """
    kinds = [checkpoint.config.get("model_type") for checkpoint in (base, finetuned)]
    text = finetuned.config.get("text_config")
    if renames is None and kinds[0] != kinds[1]:
        theirs = base.config.get("text_config")
        if isinstance(theirs, dict) and theirs.get("model_type") == kinds[1]:
            raise DeltacomeError(
                f"{finetuned.source} is a {kinds[1]} model, a language tower alone, and {base.source} is a {kinds[0]} "
                "model with other towers; save the base's language tower as a checkpoint of its own and give that"
            )
        if not isinstance(text, dict) or text.get("model_type") != kinds[0]:
            raise DeltacomeError(
                f"{finetuned.source} is a {kinds[1]} model and {base.source} a {kinds[0]} model; is this the right "
                "base? If it is, say how its names correspond to the base's (--map)"
            )
        renames = _found_renames(base, finetuned)
    if renames is None and _unmatched(base, finetuned, {}):
        renames = _found_renames(base, finetuned)
    pairs = []
    for name, info in sorted(finetuned.tensors.items()):
        base_name = _base_name(name, base, renames or {})
        if base_name is None and name.endswith(OUTPUT_EMBEDDINGS):
            base_name = base.input_embedding  # the base has no head of its own: it ties them
        rows = 0
        if base_name is not None:
            shape = base.tensors[base_name].shape
            rows = min(base.rows_to_add_to(base_name), info.shape[0]) if shape and info.shape else 0
            other_vocabulary = is_embedding(name) and len(shape) == 2 and shape[1:] == info.shape[1:]
            if shape != info.shape and not other_vocabulary:
                raise DeltacomeError(
                    f"{name} is {_by(info.shape)} in {finetuned.source} and {_by(shape)} in {base.source}; "
                    "is this the right base?"
                )
        pairs.append(Pair(name, base_name, info.shape, info.dtype, rows))
    # A head that the base ties is made of its embedding.
    missing = sorted(set(_unmatched(base, finetuned, renames or {})) - {p.base_name for p in pairs})
    if missing or not any(p.is_matrix for p in pairs):
        what = f"{len(missing)} of its weights are not in" if missing else "it shares no weights with"
        example = f" ({missing[0]} is one)" if missing else ""
        raise DeltacomeError(
            f"{base.source} cannot be the base of {finetuned.source}: {what} the fine-tuned checkpoint{example}; if it "
            "is, and only the names differ, say how (--map)"
        )
    return pairs


def _base_name(name: str, base: Checkpoint, renames: Mapping[str, str]) -> str | None:
    """The base's name for a weight: by the longest beginning that is renamed, else the same."""
    for old in sorted(renames, key=len, reverse=True):
        renamed = renames[old] + name.removeprefix(old)
        if name.startswith(old) and renamed in base.tensors:
            return renamed
    return name if name in base.tensors else None


def _unmatched(base: Checkpoint, finetuned: Checkpoint, renames: Mapping[str, str]) -> list[str]:
    """The base's matrices that the fine-tune has not, a head aside, which it may tie."""
    used = {_base_name(name, base, renames) for name in finetuned.tensors}
    matrices = {name for name, info in base.tensors.items() if is_matrix(info.shape)}
    return [name for name in matrices - used if not name.endswith(OUTPUT_EMBEDDINGS)]


def _found_renames(base: Checkpoint, finetuned: Checkpoint) -> dict[str, str]:
    """Changes of beginnings under which weights of the same shape have the same name, those of most weights first.

    Towers have layers of the same names, but fewer of them, and of other shapes; so the numbers of layers have to be
    in what stays, and a weight of the base is found once.
    """
    renames: dict[str, str] = {}
    while True:
        matched = {name: _base_name(name, base, renames) for name in finetuned.tensors}
        ends: dict[str, list[str]] = {}
        for name in base.tensors.keys() - set(matched.values()):
            parts = name.split(".")
            for start in range(len(parts) - 1):
                ends.setdefault(".".join(parts[start:]), []).append(name)
        counts: Counter[tuple[str, str]] = Counter()
        for name in (name for name, base_name in matched.items() if base_name is None):
            parts = name.split(".")
            known = (".".join(parts[start:]) for start in range(len(parts) - 1))
            end = next((end for end in known if end in ends), "")
            for other in ends.get(end, ()):
                change = name.removesuffix(end), other.removesuffix(end)
                is_numbered = any(part.isdigit() for part in ".".join(change).split("."))
                if base.tensors[other].shape == finetuned.tensors[name].shape and not is_numbered:
                    counts[change] += 1
        new = [change for change, _ in counts.most_common() if change[0] not in renames]
        if not new:
            return renames
        renames[new[0][0]] = new[0][1]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
