"""What moves the choice of tokens, what stands before an answer, and texts as tokens."""

from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

import deltacome
from conftest import make_tokenizer
from deltacome.serve.engine.sampling import Sampling, choose
from serving import CHAT, OTHER_TEMPLATE, post_json

pytest_plugins = ["serving"]


def test_scores_are_moved_as_openai_says() -> None:
    torch.manual_seed(0)
    logits, said = torch.randn(9), [3, 3, 5, 8, 3]
    before = logits.clone()
    for bias, frequency, presence in (({2: 1.5, 3: -2.0}, 0.0, 0.0), ({}, 0.7, -0.4), ({8: 9.0}, -2.0, 2.0)):
        expected = before.clone()
        for token in range(9):
            count = said.count(token)
            expected[token] += bias.get(token, 0.0) - count * frequency - (count > 0) * presence
        sampling = Sampling(0.0, bias=bias, frequency=frequency, presence=presence)
        assert not sampling.takes_the_likeliest
        assert choose(logits, sampling, sampling.generator(0), said, None) == int(expected.argmax())
        sampling = Sampling(1.3, seed=4, bias=bias, frequency=frequency, presence=presence)
        probabilities = torch.softmax(expected / 1.3, -1)
        generator, counts = sampling.generator(0), torch.zeros(9)
        for _ in range(4000):
            counts[choose(logits, sampling, generator, said, None)] += 1
        assert torch.allclose(counts / 4000, probabilities, atol=0.03)
    assert torch.equal(logits, before)  # log-probabilities are the model's own


def test_penalties_and_biases(api: OpenAI) -> None:
    def ask(**options: Any) -> Any:
        more: Any = {"max_tokens": 200, "temperature": 0, "logprobs": 1, "extra_body": {"ignore_eos": True}}
        return api.completions.create(model="a", prompt="Once", **more, **options).choices[0]

    plain = ask()
    tokens = plain.logprobs.tokens
    most = max({token for token in tokens if len(token) == 1}, key=tokens.count)
    number = str(make_tokenizer()(most).input_ids[0])
    assert len(set(tokens)) < 150  # it says the same again and again
    for options in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        found = ask(**options).logprobs
        assert found.token_logprobs[0] == plain.logprobs.token_logprobs[0]
        assert len(set(found.tokens)) > len(set(tokens))
    assert most in tokens and most not in ask(logit_bias={number: -100}).logprobs.tokens
    assert ask(logit_bias={"77": 100}).text == make_tokenizer().decode([77]) * 200
    assert ask(logit_bias={number: 0}).text == plain.text
    chat = api.chat.completions.create(model="b", messages=CHAT, max_tokens=3, logit_bias={"77": 100}, temperature=1)
    assert chat.choices[0].message.content == make_tokenizer().decode([77]) * 3


def test_the_newer_name_of_max_tokens(api: OpenAI) -> None:
    for options, expected in (({"max_tokens": 5}, 5), ({"max_completion_tokens": 6, "max_tokens": 9}, 6)):
        answer = api.chat.completions.create(model="a", messages=CHAT, extra_body={"ignore_eos": True}, **options)  # type: ignore[call-overload]
        assert answer.usage.completion_tokens == expected


def test_echo(api: OpenAI) -> None:
    options: Any = {"model": "a", "max_tokens": 6, "temperature": 0}
    prompts = ["One <|im_end|>", "Zwei — ü"]
    answers = [api.completions.create(**options, prompt=prompt).choices[0].text for prompt in prompts]
    tokens = [make_tokenizer()(prompt).input_ids for prompt in prompts]
    for given in (prompts, tokens):
        whole = api.completions.create(**options, prompt=given, echo=True, n=2)
        expected = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True) for _ in range(2)]
        assert [choice.text for choice in whole.choices] == expected
    found = ""
    for part in api.completions.create(**options, prompt=prompts[1], echo=True, stream=True):
        found += part.choices[0].text
    assert found == prompts[1] + answers[1]


def test_echo_with_logprobs(api: OpenAI, folder: Path) -> None:
    """As lm-evaluation-harness asks for them: every token of the prompt but the first, over parts and in streams."""
    prompts, tokenizer = ["One — ü", "x" * 300, "y"], make_tokenizer()
    options: Any = {"model": "a", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2, "prompt": prompts}
    for _ in range(2):  # also when the beginning is in the prefix cache
        whole = api.completions.create(**options).choices
    model = deltacome.load(folder / "base", {"a": folder / "deltas/a"})
    streamed: dict[int, list[Any]] = {}
    for chunk in api.completions.create(**options, stream=True):
        streamed.setdefault(chunk.choices[0].index, []).append(chunk.choices[0])
    for index, (prompt, choice) in enumerate(zip(prompts, whole, strict=True)):
        found, ids = choice.logprobs, tokenizer(prompt).input_ids
        assert found is not None and choice.text.startswith(prompt)
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        with torch.no_grad():
            scores = model(torch.tensor([ids]), tenants=["a"]).logits[0].log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(scores, ids[1:], strict=False)]
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-3)
        likeliest = [max(top.values()) for top in found.top_logprobs[1:]]
        assert all(top >= own - 1e-4 for top, own in zip(likeliest, found.token_logprobs[1:], strict=True))
        assert len(found.tokens) == len(found.text_offset) == len(ids) + 3
        assert found.text_offset == sorted(found.text_offset) and found.text_offset[len(ids)] == len(prompt)
        parts = [part.logprobs for part in streamed[index] if part.logprobs]
        assert [value for part in parts for value in part.token_logprobs] == pytest.approx(
            found.token_logprobs, abs=1e-3
        )
        assert [value for part in parts for value in part.text_offset] == found.text_offset
        assert "".join(part.text for part in streamed[index]) == choice.text


@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_tokens_of_texts(address: str, api: OpenAI, model: str) -> None:
    status, found = post_json(
        address, "/tokenize", {"model": model, "prompt": "é<|im_end|>", "return_token_strs": True}
    )
    assert status == 200 and found["tokens"] == make_tokenizer()("é<|im_end|>").input_ids
    assert found["count"] == 3 and found["max_model_len"] == 512 and found["token_strs"][2] == "<|im_end|>"
    status, text = post_json(address, "/detokenize", {"model": model, "tokens": found["tokens"]})
    assert status == 200 and text == {"prompt": "é<|im_end|>"}
    status, found = post_json(address, "/tokenize", {"model": model, "messages": CHAT})
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OTHER_TEMPLATE if model == "b" else tokenizer.chat_template
    assert found["tokens"] == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True).input_ids
    usage = api.chat.completions.create(model=model, messages=CHAT, max_tokens=1).usage
    assert usage and usage.prompt_tokens == found["count"] and found["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "fields", "status", "said"),
    [
        ("/tokenize", {}, 400, "send either a prompt or messages"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, 400, "send either a prompt or messages"),
        ("/tokenize", {"prompt": "x", "model": "c"}, 404, "'c' does not exist"),
        ("/tokenize", {"messages": CHAT, "continue_final_message": True}, 400, "needs a last message"),
        ("/tokenize", {"prompt": 5}, 400, "prompt must be"),
        ("/detokenize", {"tokens": [259]}, 400, "tokens hold 259; this model has 259"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "c"}, 404, "'c' does not exist"),
    ],
)
def test_what_is_not_tokenized(address: str, path: str, fields: dict[str, Any], status: int, said: str) -> None:
    found, answer = post_json(address, path, {"model": "a", **fields})
    assert found == status and said in answer["error"]["message"]


def test_images_are_refused_by_name(api: OpenAI) -> None:
    image: Any = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:image/png,x"}}]
    with pytest.raises(openai.BadRequestError, match="images, audio and files are not supported"):
        api.chat.completions.create(model="a", messages=[{"role": "user", "content": image}])
    parts: Any = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    options: Any = {"model": "a", "max_tokens": 4, "temperature": 0}
    answers = [
        api.chat.completions.create(**options, messages=[{"role": "user", "content": content}]).choices
        for content in (parts, "Hello there")
    ]
    assert answers[0] == answers[1]
