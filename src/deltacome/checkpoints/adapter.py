"""LoRA adapters as the fine-tuned side: a checkpoint whose weights are the base's plus the adapter's product."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoints.adapter_names import PREFIX, WHOLE_CHANGES, find_weight, split_name
from deltacome.checkpoints.adapter_settings import AdapterSettings, read_settings
from deltacome.checkpoints.checkpoint import Checkpoint, locate_checkpoint
from deltacome.checkpoints.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_weights, header, read_tensor, stamp
from deltacome.errors import DeltacomeError
from deltacome.files import sha256, sidecars_in
from deltacome.hub import name_of
from deltacome.weights import OUTPUT_EMBEDDINGS, is_embedding

ONLY_FOR_TRAINING = ".lora_velora_embed"
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # families with `Conv1D` for linear layers


def is_adapter(source: str | Path) -> bool:
    """Whether a folder or hub id is that of a PEFT adapter and no model."""
    folder = locate_checkpoint(source)
    return (folder / ADAPTER_CONFIG).is_file() and not ((folder / "config.json").is_file() and has_weights(folder))


class Adapted(Checkpoint):
    """A base with a LoRA adapter, as if it had been merged: W + (alpha / r) B A (Hu et al., 2021).

    Adapters that began with a part of the base (PiSSA, OLoRA) are converted: that part, which the base says, is taken
    from it. With DoRA, rows have the lengths that the adapter says. Trained tokens, `modules_to_save` and biases take
    the base's place.

    The weights have the base's dtype; `read_float` gives them unrounded. Tokenizer files are the adapter's where it has
    some.

    Args:
        renames: beginnings of names in the adapter, without PEFT's own, and the base's for them.

    Raises:
        DeltacomeError: if the adapter is broken, of another kind than LoRA, or does not fit the base.
    """

    def __init__(self, base: Checkpoint, source: str | Path, renames: Mapping[str, str] | None = None) -> None:
        self.source, self.base, self.adapter = str(source), base, locate_checkpoint(source)
        self.folder, self.config, self.renames = base.folder, base.config, renames or {}
        self._fingerprint = None
        self.settings: AdapterSettings = read_settings(self.adapter)
        self.file = next((self.adapter / name for name in ADAPTER_WEIGHTS if (self.adapter / name).is_file()), None)
        if self.file is None:
            raise DeltacomeError(f"{self.adapter} has no {ADAPTER_WEIGHTS[0]}; is the adapter's download complete?")
        self.changes: dict[str, dict[str, str]] = {}  # an adapter's tensors by part, by the base's weight
        self.biases: dict[str, str] = {}  # LoRA's own for B, by the base's bias
        self.whole: dict[str, str] = {}  # the adapter's tensor that takes the place of the base's
        self.tensors = dict(base.tensors)
        self.shapes = {name: info.shape for name, info in header(self.file).items()}
        for name in self.shapes:
            if not name.endswith(ONLY_FOR_TRAINING):
                self._place(name)
        self.sidecars()  # one that cannot be read is found out before the work
        self._check_settings()
        for weight, parts in self.changes.items():
            self._check(weight, parts)
        self._tie()

    @property
    def name(self) -> str:
        """The hub id, or the adapter folder's name."""
        return name_of(self.source, self.adapter)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is."""
        return self.adapter if (self.adapter / "tokenizer_config.json").is_file() else self.folder

    def sidecars(self) -> list[Path]:
        """The adapter's files where it has them, else the base's."""
        found = {path.name: path for path in (*sidecars_in(self.folder), *sidecars_in(self.adapter))}
        return [found[name] for name in sorted(found)]

    def stamp(self) -> list[Any]:
        """What its weights are made of."""
        assert self.file is not None
        return [
            self.base.stamp(),
            stamp([self.file]),
            sha256(self.adapter / ADAPTER_CONFIG),
            sorted(self.renames.items()),
        ]

    def read(self, name: str) -> Tensor:
        """One tensor, rounded to the base's dtype."""
        if name in self.changes or name in self.whole or name in self.biases:
            return self.read_float(name).to(self.tensors[name].dtype)
        return self.base.read(name)

    def read_float(self, name: str) -> Tensor:
        """One tensor as a float32 copy, not rounded before, checked for NaN and infinity."""
        tensor = self._tensor(self.whole[name]) if name in self.whole else self.base.read_float(self._of_base(name))
        if name in self.changes:
            tensor = self._changed(name, tensor)
        if name in self.biases:
            layer = self.biases[name].removesuffix(".lora_B.bias")
            tensor += self._tensor(self.biases[name]) * self._scaling(f"{layer}.lora_A.weight")
        self.check_finite(name, tensor)
        return tensor

    def _changed(self, weight: str, tensor: Tensor) -> Tensor:
        """A weight of the base, or what takes its place, with its parts put in; in place where that can be."""
        parts = {part: self._tensor(name) for part, name in self.changes[weight].items()}
        if "rows" in parts:
            return tensor.index_copy(0, torch.tensor(self._rows(weight)), parts["rows"])
        if "embedding_a" in parts:
            scaling = self._scaling(self.changes[weight]["embedding_a"])
            return tensor.add_((parts["embedding_b"] @ parts["embedding_a"]).T * scaling)
        turned = tensor.T if self._is_transposed(weight) else tensor  # a view
        scaling = self._scaling(self.changes[weight]["a"])
        if self.settings.subtracted is not None:
            turned -= _beginning(turned, len(parts["a"]), scaling, self.settings.subtracted)
        turned += (parts["b"] @ parts["a"]) * scaling
        if "magnitude" in parts:
            turned *= (parts["magnitude"] / turned.norm(dim=1))[:, None]
        return tensor

    def _scaling(self, first: str) -> float:
        """Of the product of two factors, given the name of the first."""
        module = first.removeprefix(PREFIX).rpartition(".lora_")[0]
        return self.settings.scaling(module, self.shapes[first][0])

    def _is_transposed(self, weight: str) -> bool:
        return self.config.get("model_type") in TRANSPOSED and not is_embedding(weight)

    def _rows(self, weight: str) -> list[int]:
        """The rows of an embedding that have been trained."""
        tokens = self.settings.tokens
        named = (rows for key, rows in tokens.items() if key and f".{weight}".endswith(f".{key}.weight"))
        return next(named, tokens.get("", []))

    def _of_base(self, weight: str) -> str:
        """The base's name for a weight: the input embedding's for a head that it ties."""
        return weight if weight in self.base.tensors else str(self.base.input_embedding)

    def _tie(self) -> None:
        """Drop what is for a head that the base ties, if it makes of it what it makes of the embedding."""
        embedding = self.base.input_embedding
        changed = {*self.changes, *self.whole}
        heads = [name for name in self.tensors if name.endswith(OUTPUT_EMBEDDINGS)]
        is_tied = not any(name in self.base.tensors for name in heads) or self.config.get("tie_word_embeddings") is True
        if embedding is None or not is_tied or not changed.intersection([embedding, *heads]):
            return
        if "rows" in self.changes.get(embedding, {}) and not changed.intersection(heads):
            return  # PEFT ties these, and saves them once
        if not heads and self.tensors[embedding].shape != self.base.tensors[embedding].shape:
            return  # as it does a grown embedding
        ours = self.read_float(embedding)
        theirs = self.read_float(heads[0]) if heads else self.base.read_float(embedding)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-6):
            head, other = (heads[0], "embedding") if changed.intersection(heads) else (embedding, "head")
            raise DeltacomeError(
                f"{self.source} changes {head}, which {self.base.source} ties to its {other}, in another way; "
                "merge it into a base with embeddings of their own and compress that"
            )
        for name in heads:
            self.changes.pop(name, None)
            self.whole.pop(name, None)
            if name not in self.base.tensors:
                del self.tensors[name]

    def _tensor(self, name: str) -> Tensor:
        assert self.file is not None
        return read_tensor(self.file, name).to(torch.float32, copy=True)

    def _place(self, name: str) -> None:
        """Find the base's weight that one of the adapter's tensors belongs to."""
        plain, part = split_name(name)
        weight, shape = self._find(plain), self.shapes[name]
        if part not in (None, "bias"):
            self.changes.setdefault(weight, {})[str(part)] = name
            return
        if shape != self.tensors[weight].shape:
            if part or not is_embedding(weight) or self.tensors[weight].shape[1:] != shape[1:]:
                raise DeltacomeError(f"{name} in {self.source} does not fit {weight} in {self.base.source}")
            self.tensors[weight] = replace(self.tensors[weight], shape=shape)  # a grown vocabulary
        (self.biases if part else self.whole)[weight] = name

    def _find(self, weight: str) -> str:
        """The base's name for a weight; its own for a head that the base ties."""
        found = find_weight(weight, self.base.tensors, self.renames)
        if found is None and weight.endswith(OUTPUT_EMBEDDINGS) and self.base.input_embedding is not None:
            # transformers has given some families' heads another name
            found = next((name for name in self.base.tensors if name.endswith(OUTPUT_EMBEDDINGS)), None)
            if found is None:
                self.tensors[weight] = self.base.tensors[self.base.input_embedding]
                return weight
        if found is None:
            raise DeltacomeError(
                f"{self.source} changes {weight}, which {self.base.source} has not; is it the adapter's base? If it "
                "is, say how the names correspond to the base's (--map)"
            )
        return found

    def _check_settings(self) -> None:
        """That the adapter has the tensors that its settings speak of, and no others."""
        linear = [parts for parts in self.changes.values() if "b" in parts]
        for name, said, found in (
            ("use_dora", self.settings.use_dora, all("magnitude" in parts for parts in linear) and bool(linear)),
            ("use_dora", self.settings.use_dora, any("magnitude" in parts for parts in self.changes.values())),
            ("lora_bias", self.settings.lora_bias, bool(self.biases)),
            ("trainable_token_indices", bool(self.settings.tokens), any("rows" in p for p in self.changes.values())),
        ):
            if said != found:
                raise DeltacomeError(
                    f"in {self.adapter / ADAPTER_CONFIG}, {name} is not what {self.file} has of it; it is broken, or "
                    "of a kind that only PEFT can merge"
                )

    def _check(self, weight: str, parts: dict[str, str]) -> None:
        """That the parts of a change are all there, and fit the weight."""
        if tuple(sorted(parts)) not in WHOLE_CHANGES:
            raise DeltacomeError(
                f"{self.source} has {' and '.join(sorted(parts))} alone of what changes {weight}; it is broken, or of "
                "a kind that only PEFT can merge"
            )
        expected = self.tensors[weight].shape
        if "rows" in parts:
            rows, shape = self._rows(weight), self.shapes[parts["rows"]]
            if shape != (len(rows), *expected[1:]) or any(not 0 <= row < expected[0] for row in rows):
                raise DeltacomeError(
                    f"{self.source} trains {len(rows)} rows of {weight} (trainable_token_indices), which do not fit "
                    f"the {' x '.join(map(str, expected))} in {self.base.source}; is it the adapter's base, with as "
                    "many tokens as in training?"
                )
            return
        first, second = (self.shapes[parts[part]] for part in sorted(parts)[:2])
        if self.settings.subtracted and ("embedding_a" not in parts) and weight in self.base.quantized:
            raise DeltacomeError(
                f"{self.source} took a part of {weight} from its base ({self.settings.subtracted}) before that was "
                f"quantized as in {self.base.source}; give the base in 16 bit"
            )
        fits = len(first) == len(second) == 2 and first[0] == second[1]
        made = (second[0], first[1]) if fits else ()
        if "embedding_a" in parts or self._is_transposed(weight):
            made = made[::-1]
        if made != expected or ("magnitude" in parts and self.shapes[parts["magnitude"]] != second[:1]):
            raise DeltacomeError(
                f"{self.source} changes {weight} by {' x '.join(map(str, second))} times "
                f"{' x '.join(map(str, first))}, and it is {' x '.join(map(str, expected))} in {self.base.source}; is "
                "it the adapter's base?"
            )


def _beginning(weight: Tensor, rank: int, scaling: float, how: str) -> Tensor:
    """What PEFT takes from a weight (m, n) before training, so that with the factors as they begin it is the same."""
    if how == "olora":
        q, r = torch.linalg.qr(weight)
        return scaling * q[:, :rank] @ r[:rank]
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]
