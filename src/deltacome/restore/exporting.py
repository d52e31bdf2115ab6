"""A compressed delta as a PEFT adapter: of each weight's delta the nearest one of LoRA's rank."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.module_names import ModuleNames
from deltacome.checkpoints.rebuilding import rebuild
from deltacome.compression.journal import Store
from deltacome.compression.svd import leading_components
from deltacome.errors import DeltacomeError, reason
from deltacome.files import write_safetensors
from deltacome.format.artifact import Artifact
from deltacome.format.entries import WeightEntry
from deltacome.format.terms import Factored, Term
from deltacome.hub import UNFIT_FILES
from deltacome.outputs import new_folder, refuse_existing
from deltacome.progress import bar, each
from deltacome.restore.merging import job_of, open_checked
from deltacome.weights import OUTPUT_EMBEDDINGS, is_matrix

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """LoRA's factors of one weight, b (m, rank) and a (rank, n), and how far `b a` is from the delta, squared.

    size: the squared Frobenius norm of the delta.
    """

    a: Tensor
    b: Tensor
    error: float
    size: float

    def tensors(self) -> dict[str, Tensor]:
        """All of it, see `_finished`."""
        return {"a": self.a, "b": self.b, "figures": torch.tensor([self.error, self.size], dtype=torch.float64)}


def export(
    base: str | Path, delta: str | Path, out: str | Path, *, max_rank: int = 256, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Write a PEFT adapter to the folder `out`: `adapter_model.safetensors` and `adapter_config.json`.

    What LoRA cannot express (norms, biases, added vocabulary rows) is left out and named.

    Args:
        max_rank: of every weight's factors; lower where the delta's own rank is.
        dtype: of the factors.

    Returns:
        `folder`, `bytes`, `rank` (the largest), `capped` (how many weights lost components), `error` (relative
        Frobenius error of all deltas together, what was left out not counted) and `left_out` (names).

    Raises:
        DeltacomeError: on a broken artifact, another base, or an output that exists; nothing is left behind then. After
            anything else that ends it early the same call goes on from the weights that are finished.
    """
    out = Path(out)
    refuse_existing(out)
    checkpoint = Checkpoint(base)
    artifact = open_checked(checkpoint, delta)
    model = _skeleton(checkpoint)
    names = ModuleNames(model)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    left_out, capped, error, size = [], 0, 0.0, 0.0
    job = {"export": [max_rank, str(dtype)], **job_of(checkpoint, artifact)}
    with new_folder(out, job) as folder:
        finished = Store(folder.parent)
        with bar("exporting", len(artifact.entries)) as advance:
            for entry, terms in each(artifact.all_terms(), advance):
                if not terms:
                    continue
                fits = entry.base is not None and is_matrix(entry.shape) and _is_layer(entry.name, names, model)
                if entry.base is not None and entry.shape and entry.shape[0] < checkpoint.tensors[entry.base].shape[0]:
                    fits = False  # a smaller vocabulary
                if not fits or entry.dense:
                    left_out.append(entry.name)
                if not fits:
                    continue
                adapter = _finished(entry.name, finished)
                if adapter is None:
                    adapter = _adapter(entry, terms, checkpoint, max_rank)
                    finished.save_intermediate(entry.name, adapter.tensors())
                capped += adapter.error > 1e-6 * adapter.size
                error, size = error + adapter.error, size + adapter.size
                for module, pair in _modules(names.find(entry.name), adapter, artifact, model).items():
                    ranks[module] = len(adapter.a)
                    tensors |= {f"{PREFIX}{module}.{name}": tensor.to(dtype) for name, tensor in pair.items()}
        specs = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
        write_safetensors(folder / "adapter_model.safetensors", specs, tensors.__getitem__)
        is_transposed = any(isinstance(module, Conv1D) for module in model.modules())
        config = {**_config(ranks, artifact.base_name), "fan_in_fan_out": is_transposed}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return {
        "folder": str(out),
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "rank": max(ranks.values(), default=0),
        "capped": capped,
        "error": round((error / size) ** 0.5, 6) if size else 0.0,
        "left_out": left_out,
    }


def _finished(name: str, store: Store) -> Adapter | None:
    """What an interrupted run has stored of a weight."""
    found = store.load_intermediate(name)
    return None if found is None else Adapter(found["a"], found["b"], *found["figures"].tolist())


def _adapter(entry: WeightEntry, terms: list[Term], base: Checkpoint, max_rank: int) -> Adapter:
    """The nearest factors of that rank to what the terms add to the base's rows."""
    assert entry.base is not None
    factored = [term for term in terms if isinstance(term, Factored)]
    if len(factored) == len(terms) and all(term.rows is None for term in factored):
        u, s, v, whole = _of_factors(factored, max_rank)
    else:
        weight = base.read(entry.base).float()
        difference = rebuild(entry, terms, base)[: len(weight)].float() - weight
        u, s, v = leading_components(difference, max_rank)
        whole = float(difference.square().sum())
    root = s.sqrt()
    return Adapter(v * root[:, None], u.T * root, max(whole - float(s.square().sum()), 0.0), whole)


def _of_factors(terms: list[Factored], rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """As `leading_components` of the sum of the terms, by way of a small matrix between orthonormal ones; its norm."""
    pairs = [term.vectors() for term in terms]
    left = torch.cat([u * term.scale.float()[:, None] for (u, _), term in zip(pairs, terms, strict=True)])
    right = torch.cat([v for _, v in pairs])
    (q, r), (p, t) = torch.linalg.qr(left.T), torch.linalg.qr(right.T)
    middle = r @ t.T
    u, s, v = leading_components(middle, rank)
    return u @ q.T, s, v @ p.T, float(middle.square().sum())


def _skeleton(base: Checkpoint) -> Any:
    """The base as transformers builds it, without weights: PEFT goes by the names and kinds of its modules."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(base.folder, trust_remote_code=False), trust_remote_code=False
            )
    except UNFIT_FILES as error:
        raise DeltacomeError(f"transformers cannot build the model of {base.source}: {reason(error)}") from error


def _is_layer(name: str, names: ModuleNames, model: Any) -> bool:
    """Whether PEFT has a layer for a weight; stacks of experts and their routers are no modules of torch's."""
    if names.find_expert(name) is not None:
        return False
    module, _, parameter = names.find(name).rpartition(".")
    return parameter == "weight" and isinstance(model.get_submodule(module), nn.Linear | nn.Embedding | Conv1D)


def _modules(parameter: str, adapter: Adapter, artifact: Artifact, model: Any) -> dict[str, dict[str, Tensor]]:
    """The tensors of PEFT's modules that a weight belongs to: two, if it is both embeddings."""
    name = parameter.removesuffix(".weight")
    module = model.get_submodule(name)
    a, b = (adapter.b.T, adapter.a.T) if isinstance(module, Conv1D) else (adapter.a, adapter.b)
    linear = {"lora_A.weight": a, "lora_B.weight": b}
    if not isinstance(module, nn.Embedding):
        return {name: linear}
    found = {name: {"lora_embedding_A": adapter.b.T, "lora_embedding_B": adapter.a.T}}
    head = model.get_output_embeddings()
    if head is not None and not any(other.endswith(OUTPUT_EMBEDDINGS) for other in artifact.entries):
        found[next(name for name, other in model.named_modules() if other is head)] = linear
    return found


def _config(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """`adapter_config.json`; alpha equals the rank everywhere, so that nothing is scaled."""
    rank = max(ranks.values(), default=1)
    pattern = {module: own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
