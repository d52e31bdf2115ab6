"""Many tenants in one batch, against merged models alone."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
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
from conftest import CONFIGS, SIZES, Save, fine_tune, make_any, make_model, train
from deltacome import DeltacomeError, compress, load, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder
from deltacome.evaluate.metrics import answer
from deltacome.runtime.conversation import Conversation


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


@pytest.fixture(scope="module")
def two(save: Save, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[PreTrainedModel]]:
    """A base, two deltas of it, and the models of base and deltas."""
    folder = tmp_path_factory.mktemp("two")
    base, deltas = tenants_of(save, folder, lambda: make_model(tie_word_embeddings=True))
    models = [merged(base, delta, folder / f"merged{i}") for i, delta in enumerate(deltas)]
    return base, deltas, [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), *models]


@pytest.fixture
def model(two: Any) -> Any:
    base, deltas, _ = two
    return load(base, {"a": deltas[0], "b": deltas[1]})


IDS = torch.randint(2, 259, (6, 9), generator=torch.Generator().manual_seed(5))
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


def test_grown_vocabulary(save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=False), "base")
    grown = make_model(tie_word_embeddings=False)
    grown.resize_token_embeddings(262, mean_resizing=False)
    fine_tune(grown, size=0.2)
    compress(base, save(grown, "grown"), tmp_path / "grown", ratio=4)
    model = load(base, {"grown": tmp_path / "grown"})
    alone = merged(base, tmp_path / "grown", tmp_path / "merged")
    ids = IDS[:2].clone()
    ids[0, 3] = 261
    with torch.no_grad():
        logits = model(ids, tenants=["grown", None]).logits
        assert torch.allclose(logits[0], alone(ids[:1]).logits[0], rtol=1e-4, atol=1e-3)
    assert logits.shape[-1] == 262
    assert torch.isinf(logits[1, :, 259:]).all()
    with pytest.raises(DeltacomeError, match="token 261, which its tenant's vocabulary has not"):
        model(ids, tenants=[None, "grown"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["compress", "exact"])
@pytest.mark.parametrize("is_changed", [True, False])
def test_shrunk_vocabulary(tied: bool, embeddings: Any, is_changed: bool, save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=tied), "base")
    shrunk = make_model(tie_word_embeddings=tied)
    shrunk.resize_token_embeddings(250)
    if is_changed:
        fine_tune(shrunk, size=0.2)
    else:
        fine_tune(shrunk.model.layers, size=0.2)
    compress(base, save(shrunk, "shrunk"), tmp_path / "shrunk", ratio=4, embeddings=embeddings)
    model = load(base, {"shrunk": tmp_path / "shrunk"})
    alone = merged(base, tmp_path / "shrunk", tmp_path / "merged")
    ids = IDS[:2] % 250
    ids[1, 3] = 255
    with torch.no_grad():
        logits = model(ids, tenants=["shrunk", None]).logits
        assert torch.allclose(logits[0, :, :250], alone(ids[:1]).logits[0], rtol=1e-4, atol=1e-3)
        assert torch.equal(logits[1], model(ids).logits[1])
    assert torch.isinf(logits[0, :, 250:]).all() and torch.isfinite(logits[1]).all()
    with pytest.raises(DeltacomeError, match="token 255, which its tenant's vocabulary has not"):
        model(ids, tenants=[None, "shrunk"])


def test_embeddings_tied_in_the_base_alone(save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=True), "base")
    untied = make_model(tie_word_embeddings=True)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    fine_tune(untied, size=0.2)
    compress(base, save(untied, "untied"), tmp_path / "untied", ratio=4)
    model = load(base, {"untied": tmp_path / "untied"})
    alone = merged(base, tmp_path / "untied", tmp_path / "merged")
    with torch.no_grad():
        logits = model(IDS[:2], tenants=["untied", None]).logits
        assert torch.allclose(logits[0], alone(IDS[:1]).logits[0], rtol=1e-4, atol=1e-3)


def test_embeddings_tied_in_the_fine_tune_alone(save: Save, tmp_path: Path) -> None:
    base = save(make_model(tie_word_embeddings=False), "base")
    tied = make_model(tie_word_embeddings=True)
    fine_tune(tied)
    compress(base, save(tied, "tied"), tmp_path / "tied", ratio=4)
    with pytest.raises(DeltacomeError, match="ties its embeddings and its base does not"):
        load(base, {"tied": tmp_path / "tied"})


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


def test_bytes_are_those_of_the_artifact(save: Save, tmp_path: Path) -> None:
    def make() -> PreTrainedModel:
        return make_model(hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4, vocab_size=9000)

    base, (delta, _) = tenants_of(save, tmp_path, make)
    tenant = load(base, {"a": delta}).deltas["a"]
    assert tenant.artifact.bytes * 0.8 < tenant.bytes < tenant.artifact.bytes * 1.1


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


def test_tenants_come_and_go_while_others_run(model: Any, two: Any) -> None:
    """A call in one thread keeps its tenants, whatever another thread does with their names."""
    _, deltas, _ = two
    options = {"max_new_tokens": 25, "min_new_tokens": 25, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(IDS[:2], tenants=["a", "b"], **options)
    stop, errors = threading.Event(), []

    def churn() -> None:
        while not stop.is_set():
            model.add_delta("c", deltas[0])
            model.add_delta("b", deltas[1])
            model.remove_delta("c")
            try:
                model.remove_delta("a")
                errors.append("a was removed while it was in use")
            except DeltacomeError as error:
                errors.extend([] if "in use by a running call" in str(error) else [str(error)])

    with model._tenants.batch(["a"]):
        thread = threading.Thread(target=churn)
        thread.start()
        results = [model.generate(IDS[:2], tenants=["a", "b"], **options) for _ in range(4)]
        stop.set()
        thread.join()
    assert not errors
    assert all(torch.equal(result, expected) for result in results)


def test_two_threads_at_once(model: Any) -> None:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 1}
    jobs = [["a", "b"], ["b", None]]
    expected = [model.generate(IDS[:2], tenants=job, **options) for job in jobs]
    results: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        results[number] = model.generate(IDS[:2], tenants=jobs[number], **options)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], expected[number]) for number in (0, 1))


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


def test_conversation(model: Any, two: Any) -> None:
    base, _, models = two
    conversation = Conversation(model, Checkpoint(base), ["a", None, "b"])
    answers = conversation.say("Hello", 8)
    again = conversation.say("And?", 8)
    encoder = Encoder(conversation.tokenizers[0])
    messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": answers[2]})
    ids = encoder.prompt((*messages, {"role": "user", "content": "And?"}))
    alone = answer(models[2], conversation.tokenizers[0], [ids], 8)[0]
    assert again[2] == alone
    conversation.reset()
    assert conversation.say("Hello", 8) == answers
    with pytest.raises(DeltacomeError, match="has room for 512; begin a new one"):
        conversation.say("x" * 600, 8)


def test_module_is_exported() -> None:
    assert deltacome.load is load
