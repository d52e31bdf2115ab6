"""What a compression is given: opened, refused where nothing can come of it, and looked at for what is odd."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from deltacome.checkpoints.adapter import Adapted, is_adapter
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.folding import Folded
from deltacome.checkpoints.pairing import Pair
from deltacome.checkpoints.rebuilt import Rebuilt
from deltacome.compression.budget import Budget
from deltacome.compression.calibration import batch
from deltacome.compression.executors import ExecutorName
from deltacome.compression.matrices import read_delta
from deltacome.compression.methods import Method
from deltacome.data import Encoder, read_examples
from deltacome.errors import DeltacomeError
from deltacome.format.lineage import MOST_PARENTS
from deltacome.format.manifest import MANIFEST, is_parent_name
from deltacome.language import load_tokenizer
from deltacome.weights import is_embedding

SUSPICIOUS_CHANGE = 0.5  # of the base's norm; a fine-tune changes a model by a few per cent
SAMPLED_WEIGHTS = 8
FEW = 1 / 4  # of the entries: where so few change, they do by a step or two
VALUE_BITS = 2  # of such an entry, besides its place
ALONE = ("bitdelta", "lossless")  # methods whose terms stand for a whole delta

Warn = Callable[[str], None]
Tokens = tuple[Tensor, Tensor]  # ids and mask, see `CalibrationStream`


def check_statistics(name: str, method: Method, has_data: bool, engine: ExecutorName) -> None:
    """Refuse calibration data that the method makes no use of, and a method that cannot do without."""
    if method.needs_calibration and not has_data:
        raise DeltacomeError(f"method {name} needs data with these settings; add --calibration FILE.jsonl")
    if method.statistics == "nothing" and has_data:
        raise DeltacomeError(f"method {name} makes no use of data with these settings; leave out --calibration")
    if engine != "local" and has_data and method.statistics == "second moments":
        raise DeltacomeError(f"method {name} goes through calibration data layer by layer; leave out --engine {engine}")


def check_child(method: str, chosen: Method, fold_norms: bool) -> None:
    """Refuse what a delta on a delta cannot have."""
    if method in ALONE or getattr(chosen, "groups", None):
        what = f"method {method}" if method in ALONE else "terms with a scale a group"
        raise DeltacomeError(f"{what} cannot be added to those of a parent; leave out --parent, or take another method")
    if fold_norms:
        raise DeltacomeError(
            "norms are folded on the base's own, not on a parent's; leave out --fold-norms or --parent"
        )


def open_finetuned(
    base: Checkpoint,
    finetuned: str | Path,
    exact_embeddings: bool,
    fold_norms: bool,
    renames: Mapping[str, str] | None,
) -> Checkpoint:
    """The fine-tuned side."""
    if is_adapter(finetuned):
        if fold_norms:
            raise DeltacomeError(f"norms cannot be folded in {finetuned}, a LoRA adapter; leave out --fold-norms")
        return Adapted(base, finetuned, renames)
    if (Path(finetuned) / MANIFEST).is_file():
        return Rebuilt(base, finetuned)
    return Folded(base, finetuned, exact_embeddings) if fold_norms else Checkpoint(finetuned)


def open_parent(base: Checkpoint, parent: str | Path, out: Path) -> Rebuilt:
    """What a new delta in `out` is made on."""
    rebuilt = Rebuilt(base, parent)
    artifact, name = rebuilt.artifact, rebuilt.delta_name
    if any(entry.sign or entry.group_size or entry.coded for a in artifact.chain for entry in a.entries.values()):
        raise DeltacomeError(
            f"{parent} has terms that no others can be added to, its method being {artifact.method['name']}; leave out "
            "--parent"
        )
    if any(a.method.get("folded_norms") for a in artifact.chain):
        raise DeltacomeError(f"{parent} has folded norms, on which no delta can be made; compress without --parent")
    if len(artifact.chain) > MOST_PARENTS:
        raise DeltacomeError(f"{parent} is under {MOST_PARENTS} other deltas already; flatten it first")
    if not is_parent_name(name):
        raise DeltacomeError(f"{parent} cannot be a parent by the name {name!r}; rename its folder")
    beside = out.absolute().parent / name
    if "/" not in name and not (beside.is_dir() and beside.samefile(artifact.folder)):
        raise DeltacomeError(
            f"a delta looks for its parent beside itself; write to {artifact.folder.parent / out.name}"
        )
    return rebuilt


def check_rows(parent: Checkpoint, finetuned: Checkpoint, pairs: Mapping[str, Pair]) -> None:
    """Refuse a vocabulary that is smaller than the parent's, whose terms are for all of its rows."""
    for p in pairs.values():
        if p.base_name is not None and p.shape < parent.tensors[p.base_name].shape:
            raise DeltacomeError(
                f"{p.name} has fewer rows in {finetuned.source} than in {parent.source}; compress without --parent"
            )


def read_tokens(
    base: Checkpoint, finetuned: Checkpoint, calibration: str | Path, count: int, chat_template: str | None
) -> Tokens:
    if isinstance(finetuned, Rebuilt):
        raise DeltacomeError(f"{finetuned.source} is a delta; merge it, and calibrate on that")
    examples = read_examples(calibration, count)
    tokenizer = load_tokenizer(finetuned.source, finetuned.tokenizer_folder, base.folder)
    return batch(examples, Encoder(tokenizer, chat_template))


def warn_of_odd_change(base: Checkpoint, finetuned: Checkpoint, budget: Budget, warn: Warn) -> None:
    """Look at a few matrices for a delta as large as the weights, the sign of a wrong base, or with few entries."""
    changed = total = 0.0
    matrices = budget.matrices
    entries: Counter[bool] = Counter()  # of all matrices and of those that are looked at: embeddings, and the others
    looked_at: Counter[bool] = Counter()
    differing: Counter[bool] = Counter()
    for p in matrices:
        entries[is_embedding(p.name)] += torch.Size(p.shape).numel()
    for p in matrices[:: max(1, len(matrices) // SAMPLED_WEIGHTS)]:
        delta, norm = read_delta(p, base, finetuned)
        changed, total = changed + float(delta.square().sum()), total + norm**2
        looked_at[is_embedding(p.name)] += delta.numel()
        differing[is_embedding(p.name)] += int(delta.count_nonzero())
    change = (changed / total) ** 0.5 if total else 0.0
    if change > SUSPICIOUS_CHANGE:
        warn(
            f"the delta is {change:.2f} times as large as the base's weights, where a fine-tune changes them by a "
            f"few per cent; is {base.source} the right base?"
        )
    shares = {kind: differing[kind] / count for kind, count in looked_at.items()}
    is_on_base = not isinstance(base, Rebuilt)
    if budget.ratio and is_on_base and any(shares.values()) and max(shares.values()) < FEW:
        known = sum(entries[kind] for kind in shares)
        share = sum(entries[kind] * share for kind, share in shares.items()) / known
        bits = sum(entries[kind] * _exact_bits(share) for kind, share in shares.items()) / known
        if bits < 16 / budget.ratio:
            warn(
                f"only some {100 * share:.2g} % of the weights differ from the base's; --lossless would keep every bit "
                f"of them in about 1/{16 / bits:.0f} of the bytes, for merging, not for serving"
            )


def _exact_bits(share: float) -> float:
    """What it takes to keep every bit of a matrix of which this share of the entries differs, in bits a weight."""
    places = -sum(p * math.log2(p) for p in (share, 1 - share) if p)
    return places + VALUE_BITS * share
