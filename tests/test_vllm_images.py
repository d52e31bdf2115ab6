"""In vLLM, deltas over vision-language models, with images in requests; skipped where vLLM is not installed.

Answers are compared with those of merged checkpoints in transformers.
"""

import base64
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")
if find_spec("torchvision") is None:
    pytest.skip("vLLM has no LLaVA without torchvision; `make test-vllm` installs it", allow_module_level=True)

from vllm.exceptions import VLLMValidationError

from conftest import Save, fine_tune
from deltacome.runtime.kernels import reference
from deltacome.vllm import internals, layers, manager
from deltacome.vllm.vocabulary import room_for
from vllm_models import LoRARequest, manager_of, request, runner_of, stop, vllm_server
from vllm_pictures import CHAT, PATCH, Pictured, Question, language_tower, make_processor, make_vision, picture, turned

FAMILIES = ["llava", "qwen2-vl", "qwen2.5-vl", "idefics3"]
# How names of the weights begin of what sees images, and of what joins it to the text.
PARTS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2-vl": ("model.visual", "model.visual.merger"),
    "qwen2.5-vl": ("model.visual", "model.visual.merger"),
    "idefics3": ("model.vision_model", "model.connector"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pictured(
    save: Save, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Pictured]:
    pictured = Pictured(save, tmp_path_factory.mktemp("pictured"), request.param).start()
    pictured.add_language("a", 1)
    pictured.add_language("b", 2)
    yield pictured
    stop(pictured.llm)


def test_a_mixed_batch_with_images(pictured: Pictured) -> None:
    names = ["a", "base", "b", "b", "a", "base"]
    questions = [pictured.question(seed, count) for seed, count in enumerate([1, 1, 1, 0, 2, 0])]
    answers = pictured.check(names, questions)
    others = pictured.check(["b", "a", "base", "a", "base", "b"], questions)
    assert all(one != other for one, other in zip(answers, others, strict=True))  # or nothing is said of deltas


def test_one_image_for_all(pictured: Pictured) -> None:
    """Of several models, and behind other prompts."""
    question = pictured.question(7)
    longer = question._replace(text=f"xyz{question.text}")
    pictured.check(["base", "a", "b", "a"], [question, question, question, longer])


def test_an_image_takes_nothing_of_its_tokens_embedding(pictured: Pictured) -> None:
    """The fine-tuned model has another embedding of the token that marks an image's places, and of no other."""
    name = "token"
    if name not in pictured.deltas:
        model = make_vision(pictured.family)
        with torch.no_grad():
            language_tower(model).embed_tokens.weight[PATCH] += 5 * torch.randn(128)
        pictured.add(name, model, embeddings="exact")
    question = pictured.question(9)
    expected = [pictured.models[of].get_input_embeddings().weight[PATCH] for of in (name, "base")]
    assert (expected[0] - expected[1]).norm() > 10
    [answer] = pictured.check([name], [question])
    assert [answer] == pictured.check(["base"], [question])
    text = question._replace(text=question.text[-5:], images=())
    pictured.check([name, "base"], [text, text])


@pytest.fixture(scope="module")
def seeing(pictured: Pictured) -> Pictured:
    """With a delta of everything, one of the towers alone, and one of what joins them to the text."""
    for seed, (name, part) in enumerate(zip(("all", "eyes", "join"), ("", *PARTS[pictured.family]), strict=True), 10):
        pictured.add_part(name, part, seed)
    return pictured


def test_towers_of_their_own(seeing: Pictured) -> None:
    question = seeing.question(3)
    names = ["all", "base", "eyes", "join", "a", "all"]
    answers = seeing.check(names, [question] * 6)
    assert len({tuple(answer) for answer in answers}) == 5
    others = [seeing.question(seed, count) for seed, count in enumerate([2, 1, 1, 0, 1, 1], 4)]
    seeing.check(names, others)
    seeing.check(names[::-1], others)


def encoded(pictured: Pictured) -> set[str]:
    """What vLLM calls the images whose embeddings it has."""
    return set(runner_of(pictured.llm).encoder_cache)


def test_who_shares_an_image(seeing: Pictured) -> None:
    """In the cache of images and in that of prefixes: all who see it as the base does, and nobody else."""
    question = seeing.question(20)
    question = question._replace(text=question.text + "abcdefgh" * 8)  # more than a block
    before = encoded(seeing)
    seeing.check(["base", "a", "b"], [question] * 3)
    [shared] = encoded(seeing) - before
    names = ["all", "eyes", "join"]
    seeing.check(names, [question] * 3)
    own = encoded(seeing) - before - {shared}
    assert len(own) == 3 and all(name.startswith(shared) for name in own)
    for name in ("base", *names):
        seeing.check([name], [question])
        [output] = seeing.ask([name], [question])
        assert output.num_cached_tokens > 0


def test_another_tower_in_the_same_place(seeing: Pictured, tmp_path: Path) -> None:
    question, place = seeing.question(21), tmp_path / "place"
    shutil.copytree(seeing.deltas["eyes"], place)
    adapter = LoRARequest("place", 901, str(place))
    seeing.check(["eyes"], [question], requests=[adapter])
    shutil.rmtree(place)
    shutil.copytree(seeing.deltas["join"], place)
    seeing.llm.llm_engine.add_lora(LoRARequest("place", 901, str(place), load_inplace=True))
    seeing.check(["join", "base"], [question, question], requests=[adapter, None])


def test_memory_is_that_of_what_is_packed(seeing: Pictured) -> None:
    size = sum(path.stat().st_size for path in seeing.deltas["eyes"].glob("*.safetensors"))
    adapter = request("eyes", seeing.deltas["eyes"])
    seeing.llm.llm_engine.add_lora(adapter)
    assert manager_of(seeing.llm).get_adapter(adapter.lora_int_id).bytes < 1.1 * size


def test_another_tokenizer(pictured: Pictured) -> None:
    """Its own text around images; what the base's processor writes for one is checked."""
    name, question = "turned", pictured.question(22)
    if name not in pictured.deltas:
        pictured.add_language(name, 3, processor=turned(make_processor(pictured.family)))
    processor = turned(make_processor(pictured.family))
    asked = [question, question._replace(text=question.text[-6:], images=())]
    for one in asked:
        if pictured.family == "idefics3" and one.images:
            with pytest.raises(VLLMValidationError, match="text around an image in its own tokens, and turned has"):
                pictured.ask([name], [one])
            continue
        [output] = pictured.ask([name], [one])
        inputs = processor(images=list(one.images) or None, text=one.text, return_tensors="pt")
        assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
        assert output.prompt_token_ids != pictured.inputs(one)["input_ids"][0].tolist()
    pictured.check(["base", "a"], [question, question])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "idefics3"])
def test_more_tokens(family: str, save: Save, tmp_path: Path) -> None:
    overrides = room_for(268, make_vision(family).config.to_dict())
    assert overrides == {"text_config": {"vocab_size": 268}}
    pictured = Pictured(save, tmp_path, family, hf_overrides=overrides)
    model = make_vision(family)
    model.resize_token_embeddings(266, mean_resizing=False)
    fine_tune(language_tower(model), 4, size=0.2)
    fine_tune(model.lm_head, 5, size=0.2)
    pictured.add("grown", model)
    pictured.start()
    try:
        names = ["grown", "base", "grown", "base"]
        pictured.check(names, [pictured.question(seed, count) for seed, count in enumerate([1, 1, 0, 0])])
        likely = {"logit_bias": {265: 100.0}, "allowed_token_ids": None, "max_tokens": 3}
        [output] = pictured.ask(["grown"], [pictured.question(5)], **likely)
        assert list(output.outputs[0].token_ids) == [265] * 3
        with pytest.raises(VLLMValidationError, match="out-of-vocab token id"):
            pictured.ask(["base"], [pictured.question(5)], **likely)
        pictured.check(["base"], [pictured.question(5)])
    finally:
        stop(pictured.llm)


ENGINES: dict[str, dict[str, Any]] = {
    "compiled": {"enforce_eager": False, "kernel_config": {"enable_jit_warmup": False}},
    "graphs": {},
    "two-ranks": {"tensor_parallel_size": 2},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_engines(engine: str, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "graphs":
        for module in (manager, layers):
            monkeypatch.setattr(module, "kernels_for", lambda device: reference)
        monkeypatch.setattr(internals, "graph_tokens", lambda config: 24)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if engine == "two-ranks" else "auto")
    pictured = Pictured(save, tmp_path, "llava", **ENGINES[engine]).start()
    try:
        pictured.add_language("a", 1)
        pictured.add_part("all", "", 10)
        other = "base" if engine == "two-ranks" else "all"
        questions = [pictured.question(seed, count) for seed, count in enumerate([1, 1, 1, 0, 2])]
        pictured.check(["a", "base", other, other, "a"], questions)
        if engine == "two-ranks":
            with pytest.raises(Exception, match="sees images, and vLLM runs with tensor parallelism, where"):
                pictured.llm.llm_engine.add_lora(request("all", pictured.deltas["all"]))
            pictured.check(["base", "a", "a", "a", "base"], questions)
    finally:
        stop(pictured.llm)


def test_the_server(save: Save, tmp_path: Path) -> None:
    """A chat with an image; `b` has a template of its own, `all` a tower."""
    pictured = Pictured(save, tmp_path, "llava")
    pictured.add_language("a", 1)
    own = make_processor("llava", CHAT.replace("assistant", "model"))
    pictured.add_language("b", 2, processor=own)
    pictured.add_part("all", "", 10)
    options = ["--name", "base", "--max-length", "192", "--dtype", "float32"]
    options += [part for name, delta in pictured.deltas.items() for part in ("--delta", f"{name}={delta}")]
    image = picture(5)
    image.save(data := BytesIO(), format="PNG")
    address = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "What is this?"}]
    more = {"return_token_ids": True, "ignore_eos": True, "allowed_token_ids": list(range(PATCH))}
    with vllm_server(pictured.base, options, dict(os.environ), tmp_path / "log") as client:
        for name in ("base", "a", "b", "all", "a"):
            role = "model" if name == "b" else "assistant"
            text = f"<|im_start|>user\n<image>What is this?<|im_end|>\n<|im_start|>{role}\n"
            prompt, answer = pictured.greedy(name, Question(text, (image,)))
            found = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": parts}], max_tokens=6, temperature=0, extra_body=more
            )
            assert found.prompt_token_ids == prompt
            assert found.choices[0].token_ids == answer
