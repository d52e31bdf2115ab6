"""A base with two compressed fine-tunes of it, and what their merged models are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import Save, fine_tune, make_model, train
from deltacome import compress, load, merge

Two = tuple[Path, list[Path], list[PreTrainedModel]]
IDS = torch.randint(2, 259, (6, 9), generator=torch.Generator().manual_seed(5))


def tenants_of(
    save: Save, tmp_path: Path, make: Callable[[], PreTrainedModel], **options: Any
) -> tuple[Path, list[Path]]:
    """A base and two compressed fine-tunes of it, one changed at random and one trained."""
    base = save(make(), "base")
    deltas = []
    for seed in (1, 2):
        model = make()
        if seed == 1:
            fine_tune(model, seed, size=0.2)
        else:
            train(model)
        compress(base, save(model, "finetuned"), tmp_path / f"delta{seed}", ratio=4, **options)
        deltas.append(tmp_path / f"delta{seed}")
    return base, deltas


def merged(base: Path, delta: Path, out: Path) -> PreTrainedModel:
    merge(base, delta, out, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def make_two(save: Save, folder: Path) -> Two:
    """A base, two deltas of it, and the models of base and deltas."""
    base, deltas = tenants_of(save, folder, lambda: make_model(tie_word_embeddings=True))
    models = [merged(base, delta, folder / f"merged{i}") for i, delta in enumerate(deltas)]
    return base, deltas, [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), *models]


@pytest.fixture(scope="module")
def two(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return make_two(save, tmp_path_factory.mktemp("two"))


@pytest.fixture
def model(two: Two) -> Any:
    base, deltas, _ = two
    return load(base, {"a": deltas[0], "b": deltas[1]})
