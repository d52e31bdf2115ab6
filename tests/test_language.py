"""Where answers end, model by model, and fine-tunes that came without a tokenizer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from commands import fail, succeed
from conftest import Save, fine_tune, make_model, make_tokenizer
from deltacome import DeltacomeError, compress, load, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder, pad
from deltacome.language import end_tokens, up_to_end
from deltacome.runtime.conversation import Conversation
from deltacome.serve.server import build
from serving import CHAT, OTHER_TEMPLATE, client, serving

PROMPTS = [list(range(start, start + length)) for start, length in ((30, 9), (90, 5), (150, 7))]
NEW_TOKENS = 30


def set_ends(folder: Path, config: Any, generation_config: Any) -> None:
    """Name end tokens in config.json, and in generation_config.json, which is removed if there are none."""
    for name, ends in (("config.json", config), ("generation_config.json", generation_config)):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": ends}))
    if generation_config is None:
        (folder / "generation_config.json").unlink()


def answers(model: Any, prompt: list[int], **options: Any) -> list[list[int]]:
    """Greedy, alone."""
    output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, **options)
    return output[:, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def ending(save: Save, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base and two deltas of it whose answers end at other tokens, named in one file or the other.

    Each one ends at a token that another of them says before its own end.
    """
    folder = tmp_path_factory.mktemp("ending")
    sources = [save(make_model(initializer_range=0.2), "base")]
    for seed in (1, 2):
        model = make_model(initializer_range=0.2)
        fine_tune(model, seed, size=0.4)
        sources.append(save(model, "tuned"))

    def rebuilt(round: str) -> tuple[dict[str, Path], list[Any]]:
        deltas, merged = {}, [sources[0]]
        for name, source in zip("ab", sources[1:], strict=True):
            deltas[name], out = folder / f"{name}-{round}", folder / f"merged-{name}-{round}"
            compress(sources[0], source, deltas[name], ratio=4)
            merge(sources[0], deltas[name], out, dtype=torch.float32)
            merged.append(out)
        return deltas, [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in merged]

    _, models = rebuilt("endless")
    first, second, third = (
        answers(model, prompt, eos_token_id=None)[0] for model, prompt in zip(models, PROMPTS, strict=True)
    )
    set_ends(sources[0], first[20], None)
    set_ends(sources[1], None, [second[12], third[3]])
    set_ends(sources[2], [third[16], first[2]], None)
    deltas, models = rebuilt("ending")
    return SimpleNamespace(base=sources[0], deltas=deltas, models=models)


def cut(row: list[int], ends: Any) -> list[int]:
    """Up to the first end token, which is kept."""
    ends = ends if isinstance(ends, list) else [ends]
    return row[: next((place + 1 for place, token in enumerate(row) if token in ends), None)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_each_row_ends_at_its_own_models_tokens(ending: SimpleNamespace, options: dict[str, Any]) -> None:
    """As the merged models do, each alone."""
    ids, mask = pad(PROMPTS, left=True)
    model = load(ending.base, ending.deltas)
    output = model.generate(
        ids, attention_mask=mask, tenants=[None, "a", "b"], do_sample=False, max_new_tokens=NEW_TOKENS, **options
    )[:, ids.shape[1] :]
    assert output.min() >= 0
    kept = []
    for merged, prompt, found in zip(ending.models, PROMPTS, output.view(3, -1, output.shape[1]).tolist(), strict=True):
        ends = merged.generation_config.eos_token_id
        expected = [cut(row, ends) for row in answers(merged, prompt, **options)]
        assert [cut(row, ends) for row in found] == expected
        kept.append(len(expected[0]))
    assert options or len(set(kept)) > 1


def test_an_end_token_that_is_given_ends_every_row(ending: SimpleNamespace) -> None:
    ids, mask = pad(PROMPTS, left=True)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    model = load(ending.base, ending.deltas)
    output = model.generate(ids, attention_mask=mask, tenants=[None, "a", "b"], eos_token_id=None, **options)
    assert output.shape[1] == ids.shape[1] + NEW_TOKENS
    for merged, prompt, row in zip(ending.models, PROMPTS, output[:, ids.shape[1] :].tolist(), strict=True):
        assert [row] == answers(merged, prompt, eos_token_id=None)


def test_chat_and_server_end_where_the_models_do(ending: SimpleNamespace) -> None:
    """Two of the three name their ends in config.json alone; the files of their tokenizers are the same."""
    tokenizer = make_tokenizer()
    prompt = Encoder(tokenizer).prompt(({"role": "user", "content": CHAT[0]["content"]},))
    endless = [answers(model, prompt, eos_token_id=None)[0] for model in ending.models]
    ends = [model.generation_config.eos_token_id for model in ending.models]
    expected = [
        tokenizer.decode(up_to_end(row, {1, *(own if isinstance(own, list) else [own])}), skip_special_tokens=True)
        for row, own in zip(endless, ends, strict=True)
    ]
    model = load(ending.base, ending.deltas)
    conversation = Conversation(model, Checkpoint(ending.base), [None, "a", "b"])
    assert conversation.say(CHAT[0]["content"], NEW_TOKENS) == expected
    with serving(build(ending.base, ending.deltas, name="base")) as address:
        api = client(address)
        for name, text in zip(("base", "a", "b"), expected, strict=True):
            answer = api.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=NEW_TOKENS)
            assert answer.choices[0].message.content == text


@pytest.mark.parametrize("keeps", [(), ("chat_template.jinja",)], ids=str)
def test_a_fine_tune_without_a_tokenizer_has_the_bases(
    save: Save, tmp_path: Path, examples: Path, keeps: tuple[str, ...]
) -> None:
    """For calibration, answers, evaluation and the server; a template of its own counts."""
    base, model = save(make_model(), "base"), make_model()
    fine_tune(model, size=0.3)
    tuned = save(model, "tuned")
    (tuned / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    for path in tuned.iterdir():
        if path.name.startswith("tokenizer") or (path.suffix == ".jinja" and path.name not in keeps):
            path.unlink()
    delta = tmp_path / "delta"
    method = ("--method", "delta-come", "--calibration", examples)
    succeed("compress", base, tuned, "-o", delta, "--ratio", 4, *method)
    merge(base, delta, tmp_path / "merged", dtype=torch.float32)
    assert not (tmp_path / "merged" / "tokenizer.json").exists()  # what is merged is what was fine-tuned
    tokenizer = make_tokenizer()
    if keeps:
        tokenizer.chat_template = OTHER_TEMPLATE
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    prompt = Encoder(tokenizer).prompt(({"role": "user", "content": "Hello there"},))
    expected = tokenizer.decode(up_to_end(answers(merged, prompt, eos_token_id=None)[0], {1}), skip_special_tokens=True)
    text = succeed("generate", base, "--delta", delta, "--prompt", "Hello there", "--max-new-tokens", NEW_TOKENS)
    assert text == expected + "\n"
    with serving(build(base, {"a": delta})) as address:
        answer = client(address).chat.completions.create(model="a", messages=CHAT, temperature=0, max_tokens=NEW_TOKENS)
        assert answer.choices[0].message.content == expected
    rows = json.loads(
        succeed(
            "evaluate",
            base,
            "--finetuned",
            tuned,
            "--delta",
            delta,
            "--data",
            examples,
            "-o",
            tmp_path / "e.json",
            "--json",
        )
    )
    assert [row["name"] for row in rows] == ["base", "fine-tuned", "delta"]


def test_without_any_tokenizer_it_is_said(save: Save, tmp_path: Path) -> None:
    base, model = save(make_model(), "base"), make_model()
    fine_tune(model, size=0.3)
    tuned = save(model, "tuned")
    for path in [*base.glob("tokenizer*"), *tuned.glob("tokenizer*")]:
        path.unlink()
    compress(base, tuned, tmp_path / "delta", ratio=4)
    fail("transformers cannot load the tokenizer of", "generate", base, "--delta", tmp_path / "delta", "--prompt", "x")


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b'{"eos_token_id": [[1]]}',
        b'{"eos_token_id": "a"}',
        b'{"eos_token_id": 1.5}',
        b'{"eos_token_id": {"a": 1}}',
        b'{"text_config": [1]}',
        b'{"a":' * 100_000,
        b"\xff",
    ],
    ids=lambda text: repr(text[:25]),
)
def test_end_tokens_that_are_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(DeltacomeError, match=r"config\.json names no end token that can be read"):
        end_tokens(tmp_path / "generation_config.json", tmp_path / "config.json")
