"""Norms folded into the linear layers that read them, so that a fine-tune keeps its base's norms.

For y = W (g x + β) + b behind a norm, with g₀ and β₀ the base's and r = g / g₀, the same y is W' (g₀ x + β₀) + b' with
W' = W diag(r) and b' = b + W (β − r β₀).
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.errors import DeltacomeError
from deltacome.weights import is_embedding

Readers = dict[str, tuple[str, ...]]

# All the linear layers that read a norm, by the last part of the norm's name: in the same block, or the head.
LLAMA: Readers = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "norm": ("lm_head",),
}
GPT_NEOX: Readers = {
    "input_layernorm": ("attention.query_key_value",),
    "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    "final_layer_norm": ("embed_out",),
}
READERS: dict[str | None, Readers] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt_neox": GPT_NEOX,
}
LARGEST_RATIO = 100  # of two gains; a column that grows by more is no fine-tune's and drowns the others' deltas
ROWS_AT_ONCE = 4096


class Folded(Checkpoint):
    """A fine-tuned checkpoint with the base's norms, and with weights behind them that give the same logits.

    A norm stays the fine-tuned one where folding would not be exact: if a layer behind it is stored as it is, wholly
    or in part (a tied, kept or grown head; a small matrix), or lacks the bias that a changed β needs; and if a ratio
    of its gains is not finite or above `LARGEST_RATIO`.

    Folded biases are float32 (`tensors` says so): in 16 bit they would be rounded, and nothing makes up for that.

    Args:
        exact_embeddings: the head is going to be stored as it is.

    Raises:
        DeltacomeError: if it is not known which layers read the norms of this `model_type`, or as `Checkpoint` and
            `pair` do.
    """

    def __init__(self, base: Checkpoint, source: str | Path, exact_embeddings: bool = False) -> None:
        super().__init__(source)
        self.base = base
        self.norms: dict[str, list[str]] = {}  # the tensors of each folded norm
        self.ratios: dict[str, Tensor] = {}  # r by the weights behind it
        self.shifts: dict[str, Tensor] = {}  # β − r β₀ by the biases behind it
        exact_head = exact_embeddings or self.config.get("tie_word_embeddings", False)
        compressed = {
            p.name
            for p in pair(base, self)
            if p.is_matrix and p.rows == p.shape[0] and not (exact_head and is_embedding(p.name))
        }
        model_type = self.config.get("model_type")
        if model_type not in READERS:
            raise DeltacomeError(
                f"norms can be folded in {', '.join(map(str, READERS))}, and {self.source} is a {model_type} model; "
                "leave out --fold-norms"
            )
        for name in list(self.tensors):
            block, _, norm = name.removesuffix(".weight").rpartition(".")
            readers = [
                reader if is_embedding(reader) else f"{block}.{reader}" for reader in READERS[model_type].get(norm, ())
            ]
            if readers and compressed.issuperset(f"{reader}.weight" for reader in readers):
                self._fold(name.removesuffix(".weight"), readers)

    def _fold(self, norm: str, readers: list[str]) -> None:
        """Fold a norm into the layers of those names, if it has changed and can be folded."""
        names = [name for name in (f"{norm}.weight", f"{norm}.bias") if name in self.tensors]
        if any(name not in self.base.tensors for name in names):
            return
        ours = [self.read(name).double() for name in names]
        theirs = [self._of_base(name).double() for name in names]
        if all(map(torch.equal, ours, theirs)):
            return
        ratio = ours[0] / theirs[0]
        shift = ours[1] - ratio * theirs[1] if len(names) == 2 else torch.zeros_like(ratio)
        if not bool((ratio.abs() <= LARGEST_RATIO).all() and shift.isfinite().all()):
            return
        biases = [f"{reader}.bias" for reader in readers] if shift.any() else []
        if any(bias not in self.tensors for bias in biases):
            return
        self.norms[norm] = names
        self.ratios |= {f"{reader}.weight": ratio for reader in readers}
        self.shifts |= dict.fromkeys(biases, shift)
        for bias in biases:
            info = self.tensors[bias]
            self.tensors[bias] = replace(info, dtype=torch.promote_types(info.dtype, torch.float32))

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype that `tensors` names."""
        if name in self.ratios or name in self.shifts:
            return self.read_as(name, torch.float64).to(self.tensors[name].dtype)
        return self._of_base(name) if self._is_folded_norm(name) else super().read(name)

    def read_float(self, name: str) -> Tensor:
        """One tensor in float32, checked for NaN and infinity; a folded weight is not rounded to its dtype before."""
        tensor = self.read_as(name, torch.float32)
        self.check_finite(name, tensor)
        return tensor

    def read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """A copy of one tensor in another dtype, weights being folded in that dtype and biases in float64."""
        if name in self.ratios:
            return super().read(name).to(dtype, copy=True).mul_(self.ratios[name].to(dtype))
        if name in self.shifts:
            behind = f"{name.removesuffix('bias')}weight"
            weight = super().read(behind)
            self.check_finite(behind, weight)
            moved = torch.cat([rows.double() @ self.shifts[name] for rows in weight.split(ROWS_AT_ONCE)])
            return (super().read(name).double() + moved).to(dtype)
        return self.read(name).to(dtype, copy=True)

    def _is_folded_norm(self, name: str) -> bool:
        return name in self.norms.get(name.rpartition(".")[0], ())

    def _of_base(self, name: str) -> Tensor:
        """The base's tensor as a rebuilt model has it."""
        return self.base.read(name).to(self.tensors[name].dtype)
