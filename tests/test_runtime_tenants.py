"""Deltas that are added, replaced and removed, and those that are refused."""

import copy
import gc
import shutil
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Save, fine_tune, make_any, make_model
from deltacome import DeltacomeError, compress, load
from tenants import IDS, tenants_of

pytest_plugins = ["tenants"]


def test_bytes_are_those_of_the_artifact(save: Save, tmp_path: Path) -> None:
    model = make_model(hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4, vocab_size=9000)
    base = save(model, "base")
    fine_tune(model, size=0.2)
    compress(base, save(model, "finetuned"), tmp_path / "delta", ratio=4)
    tenant = load(base, {"a": tmp_path / "delta"}).deltas["a"]
    # An embedding's V is kept in float32, which is much of a model as small as this, and 5 % of one of 135M.
    assert tenant.artifact.bytes * 0.8 < tenant.bytes < tenant.artifact.bytes * 1.5


def test_adding_replacing_and_removing(model: Any, two: Any) -> None:
    _, deltas, _ = two
    with torch.no_grad():
        b = model(IDS[:1], tenants=["b"]).logits
        model.add_delta("a", deltas[1])
        assert torch.equal(model(IDS[:1], tenants=["a"]).logits, b)
    model.remove_delta("a")
    assert list(model.deltas) == ["b"]
    with pytest.raises(DeltacomeError, match="no tenant 'a'; those loaded are: b"):
        model(IDS[:1], tenants=["a"])
    with pytest.raises(DeltacomeError, match="no tenant 'a'"):
        model.remove_delta("a")


@pytest.mark.parametrize("tenants", [[], ["a"], ["a"] * 7])
def test_wrong_number_of_tenants(model: Any, tenants: list[str]) -> None:
    with pytest.raises(DeltacomeError, match="tenants for a batch of 6 rows"):
        model(IDS, tenants=tenants)
    with pytest.raises(DeltacomeError, match="tenants for a batch of 6 rows"):
        model.generate(IDS, tenants=tenants, max_new_tokens=1)


def test_delta_of_another_base(model: Any, save: Save, tmp_path: Path) -> None:
    _, (delta, _) = tenants_of(save, tmp_path, lambda: make_model(seed=7))
    with pytest.raises(DeltacomeError, match="is not the base of"):
        model.add_delta("a", delta)
    assert set(model.deltas) == {"a", "b"}
    model(IDS[:1], tenants=["a"])


def test_broken_delta(model: Any, two: Any, tmp_path: Path) -> None:
    _, deltas, _ = two
    broken = shutil.copytree(deltas[0], tmp_path / "broken")
    weights = broken / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DeltacomeError, match="SHA-256 differs"):
        model.add_delta("c", broken)
    assert set(model.deltas) == {"a", "b"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried 8 bytes")])
def test_no_memory_for_a_delta(model: Any, two: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    _, deltas, _ = two
    monkeypatch.setattr("deltacome.runtime.tenants.load_tenant", fail)
    with pytest.raises(DeltacomeError, match="not enough memory"):
        model.add_delta("c", deltas[0])
    assert set(model.deltas) == {"a", "b"}


def test_memory_is_freed(model: Any, two: Any) -> None:
    _, deltas, _ = two
    model.generate(IDS[:1], tenants=["a"], max_new_tokens=2, pad_token_id=1)
    old = weakref.ref(next(iter(model.deltas["a"].changes.values())))
    model.add_delta("a", deltas[0])
    gc.collect()
    assert old() is None


def test_other_kinds_of_linear_layers_are_refused(two: Any) -> None:
    class Doubling(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    base, deltas, _ = two
    model = load(base)
    layer = model.model.layers[0].mlp
    layer.up_proj = Doubling(60, 109, bias=False)
    with pytest.raises(DeltacomeError, match="up_proj is a Doubling, whose deltas cannot be served"):
        model.add_delta("a", deltas[0])
    assert not model.deltas


def test_a_fine_tune_that_computes_otherwise_is_refused(save: Save, tmp_path: Path) -> None:
    base = save(make_model(), "base")
    tuned = make_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, max_position_embeddings=1024)
    fine_tune(tuned)
    compress(base, save(tuned, "tuned"), tmp_path / "delta", ratio=4)
    with pytest.raises(DeltacomeError, match=r"rope_theta is 500000\.0 in the fine-tuned model"):
        load(base, {"a": tmp_path / "delta"})
    tuned = make_model(max_position_embeddings=1024)  # which changes nothing in what is computed
    fine_tune(tuned)
    compress(base, save(tuned, "longer"), tmp_path / "longer", ratio=4)
    assert "a" in load(base, {"a": tmp_path / "longer"}).deltas


def test_a_parameter_of_attention_itself_is_refused(save: Save, tmp_path: Path) -> None:
    base, tuned = (make_any("gpt_oss") for _ in range(2))
    fine_tune(tuned)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.sinks.add_(1)
    folder = save(base, "base")
    compress(folder, save(tuned, "tuned"), tmp_path / "delta", ratio=4)
    with pytest.raises(DeltacomeError, match=r"changes model\.layers\.1\.self_attn\.sinks.*merge it instead"):
        load(folder, {"a": tmp_path / "delta"})


@pytest.mark.parametrize("make", [make_model, partial(make_any, "mixtral")], ids=["llama", "mixtral"])
def test_a_copy_of_the_model_lives_on_its_own(save: Save, tmp_path: Path, make: Callable[[], Any]) -> None:
    base, deltas = tenants_of(save, tmp_path, make)
    model = load(base, {"a": deltas[0]})
    with torch.no_grad():
        expected = model(IDS[:2], tenants=["a", None]).logits
        copied = copy.deepcopy(model)
        model.remove_delta("a")
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(IDS[:2], tenants=["a", None]).logits, expected)
        copied.add_delta("b", deltas[1])
        assert list(copied.deltas) == ["a", "b"] and not model.deltas
        assert not torch.equal(copied(IDS[:2], tenants=["b", None]).logits, expected)
