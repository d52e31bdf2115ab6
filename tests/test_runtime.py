"""Many tenants in one batch, against merged models alone."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import deltacome
from conftest import CONFIGS, SIZES, Save, fine_tune, make_any, make_model
from deltacome import DeltacomeError, compress, load, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoded, Encoder
from deltacome.evaluate.metrics import answer
from deltacome.runtime import modules
from deltacome.runtime.conversation import Conversation
from deltacome.runtime.kernels import cpu
from tenants import IDS, merged, tenants_of

pytest_plugins = ["tenants"]

NAMES = ["a", None, "b", "b", None, "a"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gpt2", *CONFIGS])
def test_logits_are_those_of_the_merged_models(family: str, save: Save, tmp_path: Path) -> None:
    base, deltas = tenants_of(save, tmp_path, lambda: make_any(family))
    model = load(base, {"a": deltas[0], "b": deltas[1]})
    expected = {None: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    for name, delta in zip("ab", deltas, strict=True):
        expected[name] = merged(base, delta, tmp_path / f"merged-{name}")
    with torch.no_grad():
        logits = model(IDS, tenants=NAMES).logits
        for row, name in enumerate(NAMES):
            alone = expected[name](IDS[row : row + 1]).logits[0]
            assert torch.allclose(logits[row], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
        plain = model(IDS).logits
        assert torch.allclose(plain, expected[None](IDS).logits, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    differences = [(logits[row] - logits[1]).abs().max() for row in (0, 2)]
    assert min(differences) > 0.01  # the tenants are not the base


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_the_kernels_of_a_gpu(
    family: str, save: Save, tmp_path: Path, gpu_kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter. q, k and v are computed at once, and so are gate and up."""
    computed = []
    compute = gpu_kernels.SharedWork.compute
    monkeypatch.setattr(gpu_kernels.SharedWork, "compute", lambda work, x: computed.append(x.shape) or compute(work, x))
    base, deltas = tenants_of(save, tmp_path, lambda: make_any(family))
    model = load(base, {"a": deltas[0], "b": deltas[1]})
    names, ids = ["a", None, "b", "a"], IDS[:4, :2]
    with torch.no_grad():
        for _ in range(2):
            logits = model(ids, tenants=names).logits
        for row, name in enumerate(names):
            folder = None if name is None else deltas["ab".index(name)]
            alone = load(base, {}) if folder is None else merged(base, folder, tmp_path / f"merged-{row}")
            expected = alone(ids[row : row + 1]).logits[0]
            assert torch.allclose(logits[row], expected, atol=1e-3 * float(expected.abs().max()))
    layers = model.config.num_hidden_layers
    assert len(computed) == (2 * 2 * layers if family == "llama" else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "delta-come"},
        {"method": "delta-come", "scale": "minmax"},
        {"method": "bitdelta"},
        {"method": "low-rank"},
        {"embeddings": "exact"},
        {"fold_norms": True},
    ],
    ids=str,
)
def test_every_kind_of_term(options: dict[str, Any], save: Save, tmp_path: Path) -> None:
    if options.get("method") == "bitdelta":
        base = save(make_model(), "base")
        other = make_model()
        fine_tune(other, size=0.2)
        delta = tmp_path / "delta"
        compress(base, save(other, "finetuned"), delta, method="bitdelta")
    else:
        base, (delta, _) = tenants_of(save, tmp_path, make_model, **options)
    model = load(base, {"a": delta})
    alone = merged(base, delta, tmp_path / "merged")
    with torch.no_grad():
        logits = model(IDS[:2], tenants=["a", None]).logits
        assert torch.allclose(logits[0], alone(IDS[:1]).logits[0], rtol=1e-4, atol=1e-3)


def test_greedy_answers_are_those_of_the_merged_models(model: Any, two: Any) -> None:
    _, _, models = two
    expected = dict(zip((None, "a", "b"), models, strict=True))
    together = model.generate(IDS, tenants=NAMES, max_new_tokens=12, do_sample=False, pad_token_id=1)
    for row, name in enumerate(NAMES):
        alone = expected[name].generate(IDS[row : row + 1], max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
        assert torch.equal(together[row, : len(alone)], alone)


def test_neighbors_do_not_matter(model: Any) -> None:
    order = [3, 5, 0, 4, 1, 2]
    with torch.no_grad():
        logits = model(IDS, tenants=NAMES).logits
        permuted = model(IDS[order], tenants=[NAMES[i] for i in order]).logits
        others = model(IDS, tenants=["a", "a", "b", "a", "a", "b"]).logits
    assert torch.allclose(permuted, logits[order], rtol=1e-5, atol=1e-4)
    assert torch.allclose(others[[0, 2]], logits[[0, 2]], rtol=1e-5, atol=1e-4)


def test_beams_and_several_answers(model: Any, two: Any) -> None:
    _, _, models = two
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(IDS[:2], tenants=["b", "a"], **options)
    alone = models[2].generate(IDS[:1], **options)
    assert torch.equal(together[:2, : alone.shape[1]], alone)


TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "head_dim": 20}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40}
QWEN_VISION: dict[str, Any] = {**VISION, "num_heads": 2, "out_hidden_size": 60, "patch_size": 4, "depth": 2}
QWEN: dict[str, Any] = {"image_token_id": 258, "vision_start_token_id": 256, "vision_end_token_id": 257}


def make_vision_language(family: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A random model, and a picture for each of two rows: its inputs besides the ids, where 258 stands for a patch."""
    torch.manual_seed(0)
    if family == "llava":
        vision = CLIPVisionConfig(**VISION, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=258)
        return LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(2, 3, 16, 16)}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 4, 4]}
    text = {**TEXT, "rope_parameters": rope, "pad_token_id": 0}
    inputs = {"pixel_values": torch.randn(2 * 16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    if family == "qwen2.5-vl":
        vision = {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN)
        ), inputs
    vision = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN)), inputs


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "qwen3-vl"])
def test_vision_language_model(family: str, save: Save, tmp_path: Path) -> None:
    tuned, inputs = make_vision_language(family)
    base = save(tuned, "base")
    fine_tune(tuned.model.language_model, size=0.2)
    compress(base, save(tuned, "tuned"), tmp_path / "delta", ratio=4)
    merge(base, tmp_path / "delta", tmp_path / "merged", dtype=torch.float32)
    alone = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    model = load(base, {"a": tmp_path / "delta"})
    ids = IDS[:2] % 255
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 256, 258, 257  # four patches
    if family != "llava":
        inputs["mm_token_type_ids"] = (ids == 258).long()
    with torch.no_grad():
        logits = model(input_ids=ids, **inputs, tenants=["a", None]).logits
        expected = alone(input_ids=ids, **inputs).logits
    assert torch.allclose(logits[0], expected[0], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits[1], expected[1], rtol=1e-4, atol=1e-1)


def test_a_batch_is_prepared_once_for_all_layers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU: other rows cost tables that are filled in one go, and none for a layer or a tenant."""
    filled: list[tuple[int, ...]] = []
    fill = cpu.fill_calls
    monkeypatch.setattr(
        cpu, "fill_calls", lambda numbers, *others: filled.append(numbers.shape[:2]) or fill(numbers, *others)
    )
    layers = sum(name.endswith("_proj") for name, _ in model.named_modules())
    with torch.no_grad():
        for names in (NAMES, NAMES, NAMES[::-1]):
            model(IDS, tenants=names)
    assert [shape[0] for shape in filled] == [2, 2, 2]  # a new batch each time, of two tenants
    assert all(shape[1] >= layers for shape in filled)


def test_other_small_modules_run_once_a_tenant(save: Save, tmp_path: Path) -> None:
    """torch's own RMSNorm takes no weight per row."""
    base, (delta, _) = tenants_of(save, tmp_path, make_model)
    model, alone = load(base), merged(base, delta, tmp_path / "merged")
    for of in (model, alone):
        norm = torch.nn.RMSNorm(60, eps=of.config.rms_norm_eps)
        norm.weight = of.model.norm.weight
        of.model.norm = norm
    model.add_delta("a", delta)
    with torch.no_grad():
        logits = model(IDS[:2], tenants=[None, "a"]).logits
        assert torch.allclose(logits[1], alone(IDS[1:2]).logits[0], rtol=1e-4, atol=1e-3)


def test_conversation(model: Any, two: Any) -> None:
    base, _, models = two
    conversation = Conversation(model, Checkpoint(base), ["a", None, "b"])
    answers = conversation.say("Hello", 8)
    again = conversation.say("And?", 8)
    encoder = Encoder(conversation.tokenizers[0])
    messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": answers[2]})
    ids = encoder.prompt((*messages, {"role": "user", "content": "And?"}))
    alone = answer(models[2], conversation.tokenizers[0], [Encoded(ids)], 8)[0]
    assert again[2] == alone
    conversation.reset()
    assert conversation.say("Hello", 8) == answers
    with pytest.raises(DeltacomeError, match="has room for 512; begin a new one"):
        conversation.say("x" * 600, 8)


def test_module_is_exported() -> None:
    assert deltacome.load is load


@pytest.mark.parametrize("slow", ["_linear", "_from_the_left"])
def test_the_faster_product_is_taken(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out once for a shape and a number of rows, and both give the same."""
    way, calls = getattr(modules, slow), []

    def slowly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        time.sleep(0.01)
        return way(x, weight)

    monkeypatch.setattr(modules, slow, slowly)
    monkeypatch.setattr(modules, "_faster", {})
    weight, bias = torch.randn(30, 20), torch.randn(30)
    for rows in (1, 2, 3, 7, 64, 65):
        x = torch.randn(rows, 20)
        for own in (bias, None):
            expected = torch.nn.functional.linear(x, weight, own)
            assert torch.allclose(modules._product(x, weight, own), expected, atol=1e-5)
    assert calls == [rows for rows in (2, 7, 64) for _ in range(modules.TIMED)]
    assert slowly not in modules._faster.values()
