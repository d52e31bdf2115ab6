"""Deltas in one running vLLM, against merged checkpoints in transformers; skipped where vLLM is not installed."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import Save
from deltacome import load
from deltacome.restore.exporting import export
from vllm_models import (
    LoRARequest,
    Served,
    make,
    make_adapter,
    make_delta,
    make_prompts,
    manager_of,
    request,
    runner_of,
    start,
    stop,
)

IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


@pytest.fixture(scope="module")
def served(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(save, tmp_path_factory.mktemp("served"), "llama", {}, tie_word_embeddings=True)
    yield served
    stop(served.llm)


def test_a_mixed_batch_answers_as_the_merged_models(served: Served) -> None:
    names = ["a", "base", "b", "b", "a", "base", "b", "a", "a"]
    served.check(names, make_prompts(len(names)))
    served.check(names[::-1], make_prompts(len(names), seed=1))


def test_tenants_share_no_cached_blocks(served: Served, tmp_path: Path) -> None:
    prompt = make_prompts(1, seed=3)[0] + list(range(2, 66))

    def cached(adapter: LoRARequest | None, like: str) -> int:
        [count] = served.check([like], [prompt], requests=[adapter], of_prompts=False)
        return count

    place, a, b = tmp_path / "place", served.deltas["a"], served.deltas["b"]
    assert cached(None, "base") == 0 and cached(None, "base") > 0
    assert cached(request("a", a), "a") == cached(request("b", b), "b") == 0
    assert cached(None, "base") > 0 and cached(request("a", a), "a") > 0 and cached(request("b", b), "b") > 0
    shutil.copytree(a, place)
    assert cached(LoRARequest("moved", 101, str(a)), "a") == 0  # two names for one path
    assert cached(LoRARequest("moved", 102, str(b)), "b") == 0  # one name at another path
    assert cached(LoRARequest("x", 103, str(place)), "a") == 0 and cached(LoRARequest("x", 103, str(place)), "a") > 0
    shutil.rmtree(place)
    shutil.copytree(b, place)
    served.llm.llm_engine.add_lora(LoRARequest("x", 103, str(place), load_inplace=True))
    assert cached(LoRARequest("x", 103, str(place)), "b") == 0  # another one in the same place
    assert cached(LoRARequest("x", 103, str(place)), "b") > 0
    shutil.rmtree(place)
    shutil.copytree(a, place)
    served.llm.llm_engine.remove_lora(103)
    assert served.llm.llm_engine.add_lora(LoRARequest("x", 104, str(place)))  # loaded again under its name
    assert cached(LoRARequest("x", 104, str(place)), "a") > 0  # blocks of what it was at first
    assert cached(None, "base") > 0


def test_memory_is_that_of_the_embedded_engine(served: Served) -> None:
    served.check(["a", "b"], make_prompts(2))
    alone = load(served.base, served.deltas)
    wanted = sum(alone.deltas[name].bytes for name in ("a", "b"))
    found = sum(manager_of(served.llm).get_adapter(r.lora_int_id).bytes for r in served.requests(["a", "b"]))
    assert wanted / 2 < found <= 1.02 * wanted  # one copy


def test_more_deltas_than_slots(served: Served, save: Save, tmp_path: Path) -> None:
    for seed in (3, 4, 5):
        name = f"more{seed}"
        model = make("llama", tie_word_embeddings=True)
        served.deltas[name] = make_delta(save, served.base, model, seed, tmp_path / name)
        served.add_model(name, served.deltas[name], tmp_path)
    names = ["a", "more3", "more4", "more5", "b", "a", "more3", "base"]
    served.check(names, make_prompts(len(names)))
    assert len(manager_of(served.llm).list_adapters()) == 3


def test_replaced_in_place(served: Served, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(served.deltas["a"], place)
    served.deltas["x"], served.models["x"] = place, served.models["a"]
    served.check(["x", "b"], make_prompts(2))
    number = request("x", place).lora_int_id
    shutil.rmtree(place)
    shutil.copytree(served.deltas["b"], place)
    served.llm.llm_engine.add_lora(LoRARequest("x", number, str(place), load_inplace=True))
    served.models["x"] = served.models["b"]
    served.check(["x", "a"], make_prompts(2))


def test_a_delta_on_a_delta_beside_its_parent(served: Served, save: Save, tmp_path: Path) -> None:
    parent = served.deltas["a"]
    model = make("llama", tie_word_embeddings=True)
    name = "child"
    served.deltas[name] = make_delta(save, served.base, model, 9, parent.with_name(name), parent=parent)
    served.add_model(name, served.deltas[name], tmp_path)
    names = ["child", "a", "base", "child", "b"]
    served.check(names, make_prompts(len(names)))


def test_peft_adapters_in_the_same_batch(served: Served, tmp_path: Path) -> None:
    served.deltas["peft"] = make_adapter(served, tmp_path / "peft")
    names = ["peft", "a", "base", "peft", "b"]
    served.check(names, make_prompts(len(names)))


def test_exported_deltas(served: Served, tmp_path: Path) -> None:
    export(served.base, served.deltas["a"], tmp_path / "exported", max_rank=8, dtype=torch.float32)
    served.deltas["exported"] = tmp_path / "exported"
    model = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32).eval()
    tensors = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    for name, module in model.named_modules():
        start = f"base_model.model.{name}.lora_"
        if f"{start}embedding_A" in tensors:  # and the head's, which is the same parameter
            module.weight.data += (tensors[f"{start}embedding_B"] @ tensors[f"{start}embedding_A"]).T
        elif f"{start}A.weight" in tensors and name != "lm_head":
            module.weight.data += tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
    served.models["exported"] = model
    names = ["exported", "a", "base", "exported"]
    served.check(names, make_prompts(len(names)))


def test_a_delta_that_cannot_be_served_changes_nothing(served: Served, save: Save, tmp_path: Path) -> None:
    def fails(folder: Path, message: str) -> None:
        with pytest.raises(Exception, match=message):
            served.llm.llm_engine.add_lora(request("bad", folder))
        served.check(["a", "base"], make_prompts(2))

    other = save(make("llama", seed=7, tie_word_embeddings=True), "other", torch.float32)
    model = make("llama", seed=7, tie_word_embeddings=True)
    fails(make_delta(save, other, model, 1, tmp_path / "foreign"), "fingerprint differs")

    broken = tmp_path / "broken"
    shutil.copytree(served.deltas["a"], broken)
    content = bytearray((broken / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "delta.safetensors").write_bytes(content)
    fails(broken, "is a broken artifact")

    grown = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32)
    grown.resize_token_embeddings(262)
    fails(
        make_delta(save, served.base, grown, 1, tmp_path / "grown"),
        "has 262 rows, and vLLM was started with room for 259",
    )

    longer = make("llama", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    fails(make_delta(save, served.base, longer, 1, tmp_path / "longer"), "rope_theta is 500000.0 in the fine-tuned")


def test_a_folder_of_deltas(served: Served, tmp_path: Path) -> None:
    from deltacome.vllm.resolver import DeltaResolver

    (tmp_path / "deltas").mkdir()
    shutil.copytree(served.deltas["a"], tmp_path / "deltas" / "math")
    shutil.copytree(served.deltas["b"], tmp_path / "outside")
    (tmp_path / "deltas" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "deltas" / "empty").mkdir()
    resolver = DeltaResolver(tmp_path / "deltas")
    found = asyncio.run(resolver.resolve_lora("base", "math"))
    assert found is not None and found.lora_path == str((tmp_path / "deltas" / "math").resolve())
    for name in ("link", "empty", "none", "../outside", "/math", ".", "..", "", "math/../math", "a\0b"):
        assert asyncio.run(resolver.resolve_lora("base", name)) is None


def test_the_model_runner_is_the_one_asked_for(served: Served) -> None:
    names = [cls.__module__ for cls in type(runner_of(served.llm)).__mro__]
    assert ("vllm.v1.worker.gpu.model_runner" in names) == IS_V2


def test_what_vllm_must_not_be_asked_for(served: Served) -> None:
    with pytest.raises(Exception, match="leave out --fully-sharded-loras"):
        start(served.base, fully_sharded_loras=True)
