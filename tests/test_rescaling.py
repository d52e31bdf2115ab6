"""Fine-tunes that have shrunk as a whole are written as others that compute the same, and have the base's size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig

from commands import succeed
from conftest import EVEN, SIZES, Save, fine_tune, make_any, make_model
from deltacome import Artifact, compress, load, merge
from deltacome.checkpoints import rescaling
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.checkpoints.rescaling import MODEL_TYPES, Rescaled, rescaled
from deltacome.evaluate.comparison import evaluate
from deltacome.evaluate.parts import evaluate_parts

FACTOR = 0.97
IDS = torch.randint(259, (3, 40), generator=torch.Generator().manual_seed(0))


def make(family: str) -> PreTrainedModel:
    if family != "qwen2_moe":
        return make_any(family)
    torch.manual_seed(0)
    sizes = {"num_experts": 17, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(Qwen2MoeConfig(**{**SIZES, **EVEN, **sizes, **heads}))


def shrink(model: PreTrainedModel, factor: float = FACTOR) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor


def pair_of(save: Save, make: Callable[[], PreTrainedModel], factor: float = FACTOR) -> tuple[Path, Path]:
    """A base and a fine-tune of it in which every weight has shrunk."""
    model = make()
    base = save(model, "base")
    fine_tune(model, size=0.01)
    shrink(model, factor)
    return base, save(model, "finetuned")


def chosen(base: Path, finetuned: Path) -> Checkpoint:
    ours, theirs = Checkpoint(finetuned), Checkpoint(base)
    return rescaled(theirs, ours, pair(theirs, ours))


@torch.inference_mode()
def logits(model: Any, **options: Any) -> torch.Tensor:
    return model.eval()(IDS, **options).logits


@pytest.mark.parametrize("family", sorted(MODEL_TYPES))
def test_it_computes_the_same(family: str) -> None:
    """But for what norms add to the mean square of what they divide by it, which is left out here."""
    model = make(family)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    expected = logits(model)
    rescaling.rescale(model, FACTOR)
    assert model.config.model_type == family
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_the_factor_is_found_and_reading_is_exact(save: Save) -> None:
    base, finetuned = pair_of(save, lambda: make_model(attention_bias=False))
    found, ours, theirs = chosen(base, finetuned), Checkpoint(finetuned), Checkpoint(base)
    assert isinstance(found, Rescaled) and abs(found.factor - FACTOR) < 1e-3
    for name, info in ours.tensors.items():
        is_norm = "norm" in name
        expected = ours.read(name).double() * found.factor ** (1 if is_norm else -1)
        dtype = torch.float32 if is_norm else torch.bfloat16
        assert found.tensors[name].dtype == found.read(name).dtype == dtype and info.dtype == torch.bfloat16
        assert torch.equal(found.read(name), expected.to(dtype))
        torch.testing.assert_close(found.read_float(name), expected.float())
        if not is_norm:
            assert (found.read_float(name) - theirs.read_float(name)).norm() < 0.5 * (
                ours.read_float(name) - theirs.read_float(name)
            ).norm()


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_delta(is_tied: bool, save: Save, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a fraction of the KL, merged, served and part by part."""
    base, finetuned = pair_of(save, lambda: make_model(tie_word_embeddings=is_tied))
    delta, plain = tmp_path / "delta", tmp_path / "plain"
    report = compress(base, finetuned, delta, ratio=6)
    assert report["method"]["rescaled"] == chosen(base, finetuned).factor  # type: ignore[attr-defined]
    assert "rescaled 0.9" in succeed("inspect", delta)
    with monkeypatch.context() as patch:
        patch.setattr(rescaling, "MODEL_TYPES", set())
        assert "rescaled" not in compress(base, finetuned, plain, ratio=6)["method"]
    rows = {row["name"]: row for row in evaluate(base, finetuned, {"d": delta, "p": plain}, examples)}
    assert rows["d"]["on_task_kl"] < rows["p"]["on_task_kl"] / 3
    found = evaluate_parts(base, finetuned, {"p": plain, "d": delta, "e": delta}, examples)
    parts = {row["part"]: row for row in found}
    assert parts["all"]["on_task_kl"] == pytest.approx(rows["d"]["on_task_kl"], rel=1e-2)
    assert parts["MLP"]["on_task_kl"] < 2 * rows["d"]["on_task_kl"]

    merge(base, delta, tmp_path / "merged", torch.float32)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    served = load(base, {"d": delta})
    torch.testing.assert_close(logits(served, tenants=["d"] * 3), logits(alone), rtol=1e-3, atol=1e-3)
    merge(base, delta, tmp_path / "in-16-bit")  # norms are written as they are stored, and read as the model wants them
    in_16_bit = AutoModelForCausalLM.from_pretrained(tmp_path / "in-16-bit")
    assert all(parameter.dtype == torch.bfloat16 for parameter in in_16_bit.parameters())


def test_what_is_not_rescaled(save: Save, tmp_path: Path) -> None:
    """What has not shrunk or is no fine-tune, models of which it is not known, and where a matrix would be rounded."""
    assert type(chosen(*pair_of(save, make_model, 1.0))) is Checkpoint
    assert type(chosen(*pair_of(save, make_model, 0.8))) is Checkpoint
    for family in ("gpt_neox", "gemma", "gemma2", "mixtral"):  # the last one's router is small
        assert type(chosen(*pair_of(save, lambda family=family: make_any(family)))) is Checkpoint, family
    assert type(chosen(*pair_of(save, lambda: make_model(mlp_bias=True)))) is Checkpoint
    model = make_model()
    base = save(model, "base")
    fine_tune(model, size=0.01)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    shrink(model)
    model.get_input_embeddings().weight.data = embeddings
    assert type(chosen(base, save(model, "finetuned"))) is Checkpoint
    base, finetuned = pair_of(save, make_model)
    for number, options in enumerate(
        ({"embeddings": "exact"}, {"method": "delta-come"}, {"method": "lossless"}, {"fold_norms": True})
    ):
        report = compress(base, finetuned, tmp_path / str(number), **options)  # type: ignore[arg-type]
        assert "rescaled" not in report["method"], options


def test_experts_and_biases_are_rescaled(save: Save) -> None:
    for family in ("qwen2", "qwen3", "qwen3_moe", "phi3"):
        base, finetuned = pair_of(save, lambda family=family: make_any(family))
        found = chosen(base, finetuned)
        assert isinstance(found, Rescaled), family
        for name in found.tensors:
            if name.endswith(("bias", "q_norm.weight")):
                assert torch.equal(found.read(name), Checkpoint(finetuned).read(name))


def test_a_grown_vocabulary(save: Save, tmp_path: Path) -> None:
    """New rows are rescaled too, and rounded as the fine-tune's are."""
    model = make_model()
    base = save(model, "base")
    fine_tune(model, size=0.01)
    model.resize_token_embeddings(265, mean_resizing=False)
    shrink(model)
    finetuned = save(model, "finetuned")
    compress(base, finetuned, tmp_path / "delta", ratio=3)
    merge(base, tmp_path / "delta", tmp_path / "merged")
    ours = Checkpoint(tmp_path / "merged").read_float("model.embed_tokens.weight")[259:]
    theirs = Checkpoint(finetuned).read_float("model.embed_tokens.weight")[259:]
    torch.testing.assert_close(ours * FACTOR, theirs, rtol=5e-3, atol=1e-6)


def test_a_delta_on_a_rescaled_delta(save: Save, examples: Path, tmp_path: Path) -> None:
    """Each has a factor of its own, and the last one's is that of the model that both rebuild."""
    model = make_model()
    base = save(model, "base")
    fine_tune(model, size=0.01)
    shrink(model)
    first = save(model, "first")
    fine_tune(model, seed=2, size=0.005)
    shrink(model)
    second = save(model, "second")
    compress(base, first, tmp_path / "one", ratio=4)
    compress(base, second, tmp_path / "two", ratio=8, parent=tmp_path / "one")
    factors = [Artifact(tmp_path / name).method["rescaled"] for name in ("one", "two")]
    assert factors == pytest.approx([FACTOR, FACTOR**2], abs=2e-3)
    rows = {row["name"]: row for row in evaluate(base, second, {"two": tmp_path / "two"}, examples)}
    assert rows["two"]["on_task_kl"] < rows["base"]["on_task_kl"] / 20
