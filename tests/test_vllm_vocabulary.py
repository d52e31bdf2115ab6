"""In vLLM, deltas with more or fewer tokens than their base, and with other languages; skipped where it is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from conftest import Save
from vllm_models import (
    Models,
    SamplingParams,
    Served,
    ask,
    make_adapter,
    make_delta,
    make_prompts,
    request,
    stop,
)

SIZES = {"base": 259, "a": 259, "grown": 262, "large": 330, "shrunk": 250, "peft": 259}


def resized(base: Path, size: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def add_resized(models: Models, save: Save, folder: Path, **options: Any) -> None:
    """Deltas with more tokens than the base, some of them outside what vLLM pads to, and one with fewer."""
    for seed, name in enumerate(("grown", "large", "shrunk"), 3):
        model = resized(models.base, SIZES[name])
        models.deltas[name] = make_delta(save, models.base, model, seed, folder / name, **options)
        models.add_model(name, models.deltas[name], folder)


def prompts_for(names: list[str], seed: int = 0) -> list[list[int]]:
    """With tokens that the models alone have."""
    sizes = [SIZES[name] for name in names]
    pairs = zip(sizes, make_prompts(len(names), seed), strict=True)
    return [[*(token % size for token in prompt), size - 1, *range(2, 5)] for size, prompt in pairs]


@pytest.mark.parametrize(
    "family, options, sizes",
    [
        ("llama", {}, {"tie_word_embeddings": True}),
        ("llama", {"embeddings": "exact"}, {"tie_word_embeddings": False}),
        ("gemma", {"method": "delta-come"}, {}),
        ("llama", {}, {"tie_word_embeddings": False, "num_attention_heads": 4, "hidden_size": 128, "ranks": 2}),
    ],
    ids=["tied", "exact", "gemma", "two-ranks"],
)
def test_other_vocabularies(
    family: str,
    options: dict[str, Any],
    sizes: dict[str, Any],
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = sizes.pop("ranks", 1)
    engine = {"hf_overrides": {"vocab_size": 330}, "tensor_parallel_size": ranks}
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    served = Served(save, tmp_path, family, options, engine, **sizes)
    try:
        add_resized(served, save, tmp_path, **options)
        served.deltas["peft"] = make_adapter(served, tmp_path / "peft")
        for names in (["grown", "base", "shrunk", "peft"], ["large", "a", "base", "grown"], ["shrunk", "large"]):
            served.check(names, prompts_for(names), 1e-2 if "embeddings" in options else 2e-3)
    finally:
        stop(served.llm)


@pytest.fixture(scope="module")
def served(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vocabularies")
    engine = {"hf_overrides": {"vocab_size": 300}, "max_logprobs": -1}
    served = Served(save, folder, "llama", {}, engine, tie_word_embeddings=True)
    add_resized(served, save, folder)
    yield served
    stop(served.llm)


def sampled(served: Served, name: str, **options: Any) -> Any:
    asked = SamplingParams(**{"max_tokens": 60, "ignore_eos": True, "temperature": 2, "seed": 1, **options})
    [output] = ask(served.llm, prompts_for([name]), served.requests([name]), asked)
    return output.outputs[0]


@pytest.mark.parametrize("name", ["base", "grown", "shrunk"])
def test_tokens_are_the_models_own_however_they_are_chosen(served: Served, name: str) -> None:
    tokens: set[int] = set()
    for options in ({}, {"top_p": 0.99}, {"top_k": 280}, {"repetition_penalty": 1.5, "presence_penalty": 1.0}):
        for seed in range(4):
            tokens.update(sampled(served, name, seed=seed, **options).token_ids)
    assert len(tokens) > 100 and max(tokens) < SIZES[name]
    last = SIZES[name] - 1
    assert list(sampled(served, name, max_tokens=2, logit_bias={last: 100.0}).token_ids) == [last, last]
    steps = sampled(served, name, max_tokens=2, logprobs=-1).logprobs
    for step in steps:
        assert {token for token, found in step.items() if found.logprob > -torch.inf} == set(range(SIZES[name]))


def test_answers_of_a_form(served: Served) -> None:
    for name in ("base", "grown", "shrunk"):
        form = StructuredOutputsParams(regex="(ab|cd)xy")
        assert sampled(served, name, structured_outputs=form, ignore_eos=False).text in ("abxy", "cdxy")


def test_tokens_that_a_model_has_not(served: Served) -> None:
    for name, token in (("base", 259), ("shrunk", 250), ("grown", 262), ("a", 261)):
        [adapter] = served.requests([name])
        with pytest.raises(VLLMValidationError, match=f"{token} is out of vocabulary"):
            ask(served.llm, [[5, token, 6]], [adapter], SamplingParams(max_tokens=1))
        for options in ({"allowed_token_ids": [5, token]}, {"logit_bias": {token: 1.0}}):
            with pytest.raises(VLLMValidationError, match="out-of-vocab token id"):
                ask(served.llm, [[5]], [adapter], SamplingParams(max_tokens=1, **options))
    served.check(["base", "grown"], prompts_for(["base", "grown"]))


def test_more_tokens_than_there_is_room_for(served: Served) -> None:
    advice = (
        r"has 330 rows, and vLLM was started with room for 300; start it with --hf-overrides '{\"vocab_size\": 330}'"
    )
    with pytest.raises(Exception, match=advice):
        served.llm.llm_engine.add_lora(request("large", served.deltas["large"]))
    served.check(["base", "grown"], prompts_for(["base", "grown"]))
