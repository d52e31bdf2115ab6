"""In vLLM, deltas over vision-language models, with images in requests; skipped where vLLM is not installed.

Answers are compared with those of merged checkpoints in transformers.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")
if find_spec("torchvision") is None:
    pytest.skip("vLLM has no LLaVA without torchvision; `make test-vllm` installs it", allow_module_level=True)

from conftest import Save
from vllm_models import stop
from vllm_pictures import PATCH, Pictured, language_tower, make_vision

FAMILIES = ["llava", "qwen2-vl", "qwen2.5-vl", "idefics3"]


@pytest.fixture(scope="module", params=FAMILIES)
def pictured(
    request: pytest.FixtureRequest, save: Save, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pictured]:
    pictured = Pictured(save, tmp_path_factory.mktemp("pictured"), request.param)
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
            language_tower(model).embed_tokens.weight[PATCH] += 5 * torch.randn(96)
        pictured.add(name, model, embeddings="exact")
    question = pictured.question(9)
    expected = [pictured.models[of].get_input_embeddings().weight[PATCH] for of in (name, "base")]
    assert (expected[0] - expected[1]).norm() > 10
    [answer] = pictured.check([name], [question])
    assert [answer] == pictured.check(["base"], [question])
    text = question._replace(text=question.text[-5:], images=())
    pictured.check([name, "base"], [text, text])
