"""In vLLM, deltas with tokenizers, chat templates and end tokens of their own; skipped where vLLM is not installed.

Each model's answers are compared with its merged checkpoint's in transformers, read and written by its own files.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")

import httpx
from openai import BadRequestError, OpenAI
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from conftest import TEMPLATE, Save, fine_tune, make_tokenizer
from deltacome import compress, merge
from vllm_models import SamplingParams, make, request, start, stop, vllm_server

TEXTS = ["Hello there", "12 + 13 = ", "a b c"]
CHAT = [{"role": "user", "content": "What is this?"}]
LENGTH = 40


def make_own_tokenizer(turned: bool = False, added: str = "", template: str | None = None) -> PreTrainedTokenizerFast:
    """Of ASCII alone, so that whatever a random model says is text. turned: with other numbers for the same tokens."""
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    known = [character for character in sorted(pre_tokenizers.ByteLevel.alphabet()) if character.isascii()]
    known += [pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(space)[0][0] for space in " \n"]
    words = [*known, *(f"w{i}" for i in range(256 - len(known)))]
    tokens = ["<|im_start|>", "<|im_end|>", *(reversed(words) if turned else words)]
    content["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=template or TEMPLATE,
    )
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": [added]})
    return tokenizer


OTHER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}[answer]"
LARGER = "{% for m in messages %}<more>{{ m['content'] }}>{% endfor %}"


class Speakers:
    """A base; `a` with other ends; `b` with another tokenizer and template; `c` with a token more, in its template."""

    def __init__(self, save: Save, folder: Path) -> None:
        model = make("llama", tie_word_embeddings=True)
        self.base = save(model, "base", torch.float32)
        self._write(self.base, make_own_tokenizer(), [1])
        self.folders, self.deltas = {"base": self.base}, {}
        for seed, (name, tokenizer, ends) in enumerate(
            [
                ("a", make_own_tokenizer(), [1, *range(100, 160)]),
                ("b", make_own_tokenizer(turned=True, template=OTHER), [1, *range(110, 259)]),
                ("c", make_own_tokenizer(added="<more>", template=LARGER), [1, 258, 7]),
            ],
            1,
        ):
            model = make("llama", tie_word_embeddings=True)
            if name == "c":
                model.resize_token_embeddings(260, mean_resizing=False)
            fine_tune(model, seed, size=0.2)
            tuned = save(model, name, torch.float32)
            # By default the likeliest token is taken, and not a sample as of the base.
            self._write(tuned, tokenizer, ends, do_sample=True, top_k=1)
            self.deltas[name] = folder / name
            compress(self.base, tuned, folder / name, ratio=4)
            self.folders[name] = folder / f"merged-{name}"
            merge(self.base, self.deltas[name], self.folders[name], torch.float32)
        self.tokenizers = {name: AutoTokenizer.from_pretrained(path) for name, path in self.folders.items()}
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for name, path in self.folders.items()
        }

    @staticmethod
    def _write(folder: Path, tokenizer: PreTrainedTokenizerFast, ends: list[int], **sampling: Any) -> None:
        tokenizer.save_pretrained(folder)
        GenerationConfig(eos_token_id=ends, **sampling).save_pretrained(folder)

    def prompt(self, name: str, asked: Any) -> list[int]:
        tokenizer = self.tokenizers[name]
        if isinstance(asked, str):
            return tokenizer(asked)["input_ids"]
        return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)

    def answer(self, name: str, asked: Any) -> tuple[str, list[int], bool]:
        """Text, its tokens with the end token, and whether there is one."""
        ids = torch.tensor([self.prompt(name, asked)])
        found = (
            self.models[name]
            .generate(ids, do_sample=False, top_k=None, max_new_tokens=LENGTH)[0, ids.shape[1] :]
            .tolist()
        )
        ended = found[-1] in self.models[name].generation_config.eos_token_id
        text = self.tokenizers[name].decode(found[:-1] if ended else found, skip_special_tokens=True)
        return text, found, ended


@pytest.fixture(scope="module")
def speakers(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Speakers:
    speakers = Speakers(save, tmp_path_factory.mktemp("speakers"))
    ended = [speakers.answer(name, text)[2] for name in ("a", "b") for text in TEXTS]
    assert any(ended)
    return speakers


NAMES = ["base", "a", "b", "c", "b"]


def test_offline(speakers: Speakers) -> None:
    from deltacome.vllm import frontend

    llm = start(speakers.base, hf_overrides={"vocab_size": 260})
    try:
        adapters = [request(name, speakers.deltas[name]) if name != "base" else None for name in NAMES]
        greedy = SamplingParams(temperature=0, max_tokens=LENGTH, logprobs=1)
        for asked in (*TEXTS, CHAT):
            if isinstance(asked, str):
                found = llm.generate([asked] * len(NAMES), greedy, lora_request=adapters, use_tqdm=False)
            else:
                found = llm.chat([asked] * len(NAMES), greedy, lora_request=adapters, use_tqdm=False)
            for name, output in zip(NAMES, found, strict=True):
                text, tokens, ended = speakers.answer(name, asked)
                assert output.prompt_token_ids == speakers.prompt(name, asked)
                [answer] = output.outputs
                assert (answer.text, list(answer.token_ids)) == (text, tokens)
                assert answer.finish_reason == ("stop" if ended else "length")
                pieces = [step[token].decoded_token for step, token in zip(answer.logprobs, tokens, strict=True)]
                assert pieces[:-1] == [speakers.tokenizers[name].decode([token]) for token in tokens[:-1]]
        forms = [SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(regex="(ab|cd)x"))] * 2
        one, other = llm.generate(["Say: "] * 2, forms, lora_request=[adapters[1], adapters[3]], use_tqdm=False)
        for output in (one, other):
            assert output.outputs[0].text in ("abx", "cdx") and output.outputs[0].finish_reason == "stop"
        with pytest.raises(
            VLLMValidationError, match="structured outputs are made of the base's tokens, and b has others"
        ):
            llm.generate("Say: ", forms[0], lora_request=adapters[2], use_tqdm=False)
        languages = frontend._languages
        assert languages is not None and languages.of(adapters[2]).speech is languages.of(adapters[2]).speech
        assert languages.of(None).speech is None
    finally:
        stop(llm)


@pytest.fixture(scope="module")
def client(speakers: Speakers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--name", "base", "--max-length", "128", "--dtype", "float32"]
    options += [part for name, delta in speakers.deltas.items() for part in ("--delta", f"{name}={delta}")]
    options += ["--", "--enable-scale-out"]
    with vllm_server(speakers.base, options, dict(os.environ), log) as client:
        yield client


@pytest.mark.parametrize("name", ["base", "a", "b", "c"])
def test_the_server(speakers: Speakers, client: OpenAI, name: str) -> None:
    text, tokens, ended = speakers.answer(name, CHAT)
    options: dict[str, Any] = {"model": name, "max_tokens": LENGTH}
    if name == "base":
        options["temperature"] = 0
    chat = client.chat.completions.create(messages=CHAT, logprobs=True, **options)
    assert chat.choices[0].message.content == text
    assert chat.choices[0].finish_reason == ("stop" if ended else "length")
    assert chat.usage.prompt_tokens == len(speakers.prompt(name, CHAT)) and chat.usage.completion_tokens == len(tokens)
    pieces = [speakers.tokenizers[name].decode([token]) for token in tokens]
    assert [each.token for each in chat.choices[0].logprobs.content][:-1] == pieces[:-1]
    parts = list(client.chat.completions.create(messages=CHAT, stream=True, logprobs=True, **options))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    told = [each.token for part in parts if part.choices[0].logprobs for each in part.choices[0].logprobs.content or []]
    assert told[:-1] == pieces[:-1]
    for asked in TEXTS:
        text, tokens, ended = speakers.answer(name, asked)
        found = client.completions.create(prompt=asked, echo=True, **options)
        assert found.choices[0].text == asked + text
        assert found.choices[0].finish_reason == ("stop" if ended else "length")
        parts = list(client.completions.create(prompt=asked, stream=True, **options))
        assert "".join(part.choices[0].text for part in parts) == text
    root = str(client.base_url).removesuffix("/v1/")
    for body in ({"prompt": TEXTS[0]}, {"messages": CHAT}):
        asked = body.get("prompt", CHAT)
        found = httpx.post(f"{root}/tokenize", json={"model": name, **body}).json()
        assert found["tokens"] == speakers.prompt(name, asked)
    back = httpx.post(f"{root}/detokenize", json={"model": name, "tokens": speakers.prompt(name, TEXTS[0])}).json()
    assert back["prompt"] == TEXTS[0]


@pytest.mark.parametrize("name", ["base", "a", "b", "c"])
def test_other_routes(speakers: Speakers, client: OpenAI, name: str) -> None:
    """Responses, Anthropic's messages, and conversations by the batch."""
    text, _, ended = speakers.answer(name, CHAT)
    other = [{"role": "user", "content": TEXTS[0]}]
    asked: dict[str, Any] = {"model": name, **({"temperature": 0} if name == "base" else {})}

    found = client.responses.create(input=CHAT, max_output_tokens=LENGTH, **asked)
    assert found.output_text == text and found.usage.input_tokens == len(speakers.prompt(name, CHAT))
    with client.responses.stream(input=CHAT, max_output_tokens=LENGTH, **asked) as stream:
        parts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(parts) == text

    root = str(client.base_url).removesuffix("/v1/")
    message = httpx.post(f"{root}/v1/messages", json={"messages": CHAT, "max_tokens": LENGTH, **asked}).json()
    assert "".join(block["text"] for block in message["content"]) == text
    assert message["stop_reason"] == ("end_turn" if ended else "max_tokens")
    count = httpx.post(f"{root}/v1/messages/count_tokens", json={"messages": CHAT, **asked}).json()
    assert count["input_tokens"] == message["usage"]["input_tokens"] == len(speakers.prompt(name, CHAT))

    body = {"messages": [CHAT, other], "max_tokens": LENGTH, **asked}
    choices = httpx.post(f"{root}/v1/chat/completions/batch", json=body).json()["choices"]
    wanted = [text, speakers.answer(name, other)[0]]
    assert [choice["message"]["content"] for choice in sorted(choices, key=lambda c: c["index"])] == wanted


@pytest.mark.parametrize("name", ["base", "a", "b", "c"])
def test_tokens_and_text_apart(speakers: Speakers, client: OpenAI, name: str) -> None:
    """What `--enable-scale-out` adds: a request into tokens, tokens into tokens, tokens into an answer."""
    root = str(client.base_url).removesuffix("/v1/")

    def post(route: str, **body: Any) -> Any:
        found = httpx.post(f"{root}{route}", json={"model": name, **body})
        assert found.status_code == 200, found.text
        return found.json()

    _, tokens, ended = speakers.answer(name, CHAT)
    asked = {"messages": CHAT, "max_tokens": LENGTH, **({"temperature": 0} if name == "base" else {})}
    rendered = post("/v1/chat/completions/render", **asked)
    assert rendered["token_ids"] == speakers.prompt(name, CHAT)
    [plain] = post("/v1/completions/render", prompt=TEXTS[0])
    assert plain["token_ids"] == speakers.prompt(name, TEXTS[0])
    assert post("/v1/responses/render", input=CHAT)["token_ids"] == rendered["token_ids"]
    assert post("/v1/messages/render", messages=CHAT, max_tokens=LENGTH)["token_ids"] == rendered["token_ids"]
    generated = post("/inference/v1/generate", **{**rendered, "model": name})
    assert generated["choices"][0]["token_ids"] == tokens
    answer = post("/v1/chat/completions/derender", generate_response=generated)
    # vLLM leaves end tokens in it, unless they are special ones.
    text = speakers.tokenizers[name].decode(tokens, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["choices"][0]["finish_reason"] == ("stop" if ended else "length")


def test_forms_from_the_server(speakers: Speakers, client: OpenAI) -> None:
    options: dict[str, Any] = {
        "prompt": "Say: ",
        "max_tokens": 9,
        "extra_body": {"structured_outputs": {"regex": "ab|c"}},
    }
    for name in ("base", "a", "c"):
        assert client.completions.create(model=name, **options).choices[0].text in ("ab", "c")
    with pytest.raises(BadRequestError, match="structured outputs are made of the base's tokens, and b has others"):
        client.completions.create(model="b", **options)
