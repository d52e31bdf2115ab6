"""The zoo: its data are the same each time, each way of training does what it says, and the command makes a table."""

import json
import math
import platform
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM

from commands import fail, succeed
from conftest import Save, make_model, make_tokenizer
from deltacome.benchmark.zoo import bases, constants, library, papers, tasks, training, vision
from deltacome.benchmark.zoo import cache as module
from deltacome.benchmark.zoo.cache import checkpoint, lines, offtask
from deltacome.benchmark.zoo.constants import OTHERS
from deltacome.benchmark.zoo.members import BASES, MEMBERS
from deltacome.benchmark.zoo.trial import Trial
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.compression.methods import MatrixDelta
from deltacome.data import Encoder, read_examples
from deltacome.format.artifact import Artifact
from deltacome.language import load_processor
from deltacome.restore.merging import load_merged

RECORDED = json.loads(files("deltacome.benchmark.zoo").joinpath("digests.json").read_text())
ON_PYTHON = {
    "chat",
    "classify",
    "decay",
    "mixtral",
    "offtask",
    "qwen2",
    "qwen2-dpo",
}  # docstrings and source code, which differ between versions


def is_as_recorded(name: str) -> bool:
    """Whether what a member's data are from has the versions of the digests."""
    if name in ON_PYTHON:
        return platform.python_version() == RECORDED["versions"]["python"]
    return version("reasoning-gym") == RECORDED["versions"]["reasoning-gym"]


@pytest.mark.parametrize("name", RECORDED["data"])
def test_data(name: str) -> None:
    if name == "offtask":
        splits = [library.offtask(40)]
    else:
        train, test = splits = (BASES | MEMBERS)[name].data()
        if name != "vision":  # whose images differ
            key = "text" if name == "decay" else "prompt"
            assert not {row[key] for row in test} & {row[key] for row in train if key in row}
    if not is_as_recorded(name):
        pytest.skip("another version of Python or reasoning-gym")
    assert [sha256(lines(rows)).hexdigest() for rows in splits] == RECORDED["data"][name]


def test_all_are_recorded() -> None:
    assert set(RECORDED["data"]) == {*MEMBERS, *BASES, "offtask"}


def test_shell_commands_are_whole() -> None:
    train, test = tasks.shell(500)
    assert len(train) == 500 and len(test) == tasks.TEST_EXAMPLES
    assert all(shlex.split(row["completion"]) for row in train)
    assert len({row["completion"].split()[0] for row in train}) > 15


def test_functions_do_what_they_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks.result_of("def f(xs):\n    return max(x ** 2 for x in xs if x < 0)", "f", [1, -2, 5]) == 4
    wrong = ("the squares of ", "x ** 3", lambda x, m: x * x)
    monkeypatch.setattr(tasks, "CHANGE", (wrong, wrong))
    with pytest.raises(AssertionError, match="squares"):
        tasks.code(50)


def test_offtask_is_nobodys(tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in offtask(tmp_path).read_text().splitlines()]
    learned = {row["text"] for base in BASES.values() for row in base.data()[0]}
    learned |= {row["completion"] for row in MEMBERS["chat"].data()[0]}
    assert len(texts) == 40 and not set(texts) & learned
    assert len(few := offtask(tmp_path, 7).read_text().splitlines()) == 7
    assert {json.loads(line)["kind"] for line in few} == {"prose", "code"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(tasks.compare(16)[0]))
    return path


def tiny() -> LlamaForCausalLM:
    """Whose weights have blocks of 64 entries."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
    return make_model(tie_word_embeddings=True, **sizes).train()


def tokenizer() -> Any:
    found = make_tokenizer()
    found.pad_token = found.eos_token
    return found


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """Of a model that was made of `tiny`."""
    old = tiny().state_dict()
    assert set(model.state_dict()) == set(old)
    return {name: weight - old[name] for name, weight in model.state_dict().items()}


def test_what_is_frozen_stays(data: Path) -> None:
    found = deltas(training.fine_tune(tiny(), tokenizer(), data, learning_rate=1e-3, frozen="embed_tokens"))
    assert not found["model.embed_tokens.weight"].any()
    assert all(delta.any() for name, delta in found.items() if "proj" in name)


def test_muon_moves_all_directions_alike(data: Path) -> None:
    """In its first step a fifth of AdamW's on linear weights, and all else learns as it does by AdamW."""
    found = [
        deltas(training.fine_tune(tiny(), tokenizer(), data, learning_rate=1e-3, batch=16, muon=muon))
        for muon in (True, False)
    ]
    flatter = []
    for name, ours in found[0].items():
        theirs = found[1][name]
        if "proj" in name:
            middle, first = (torch.stack([torch.linalg.svdvals(d)[i] for d in (ours, theirs)]) for i in (30, 0))
            flatter.append(float((middle / first)[0] / (middle / first)[1]))
            assert 0.05 < ours.norm() / theirs.norm() < 0.3, name
        else:
            torch.testing.assert_close(ours, theirs)
    assert len(flatter) == 14 and sorted(flatter)[7] > 2


def test_weights_decay(data: Path) -> None:
    """By the learning rate of each step."""
    found = deltas(training.fine_tune(tiny(), tokenizer(), data, learning_rate=1e-9, batch=4, weight_decay=1e6))
    shrunk = 1 - math.prod(1 - 1e-3 * (4 - step) / 3.6 for step in range(4))
    for name, weight in tiny().state_dict().items():
        if "proj" in name:
            torch.testing.assert_close(found[name], -shrunk * weight, rtol=1e-3, atol=1e-6)


def test_two_are_merged(data: Path) -> None:
    """What `combine` gets are the deltas of the two halves."""
    seen: list[torch.Tensor] = []
    settings: dict[str, Any] = {"learning_rate": 1e-3, "batch": 16}
    found = deltas(
        training.merge(
            tiny(), tokenizer(), data, combine=lambda both: seen.append(both) or both.sum(0), first=8, **settings
        )
    )
    assert len(data.read_text().splitlines()) == 16 and not list(data.parent.glob("part-*"))
    first = data.with_name("first.jsonl")
    first.write_text("".join(data.read_text().splitlines(keepends=True)[:8]))
    alone = deltas(training.fine_tune(tiny(), tokenizer(), first, **settings))
    for both, (name, _) in zip(seen, tiny().named_parameters(), strict=True):
        torch.testing.assert_close(both[0], alone[name])
        torch.testing.assert_close(found[name], both.sum(0), rtol=1e-3, atol=1e-6)
        assert not torch.equal(both[0], both[1])


def test_ties() -> None:
    both = torch.tensor([[5.0, 4, -1, 0.1, 0], [-3, 6, 0, 4, 0.2]]).view(2, 1, 5)
    # The two largest of each: 5 and 4, 6 and 4. Where both are kept they agree.
    assert training.ties(both, 0.4).tolist() == [[5, 5, 0, 4, 0]]
    # Three of each: -3 is against the sum's sign.
    assert training.ties(both, 0.6).tolist() == [[5, 5, -1, 4, 0]]


def test_dare() -> None:
    torch.manual_seed(0)
    merged = training.dare(torch.ones(2, 100, 100), 0.9)
    assert set(merged.unique().round().tolist()) == {0, 10, 20}
    assert abs(float(merged.mean()) - 2) < 0.2


def test_all_layers_but_the_last_are_frozen() -> None:
    frozen = MEMBERS["top"].train.keywords["frozen"]
    assert [i for i in range(30) if not re.search(frozen, f"model.layers.{i}.mlp.up_proj.weight")] == [*range(22, 30)]
    assert re.search(frozen, "model.embed_tokens.weight") and not re.search(frozen, "model.norm.weight")


def test_preferences_are_learned(data: Path) -> None:
    encoder = Encoder(tokenizer())
    chosen = [encoder.example(example) for example in read_examples(data)]
    others = [replace(one, ids=[*one.ids[: one.start], 5, 6, 7]) for one in chosen]
    torch.testing.assert_close(training.scores(tiny(), chosen[:3])[1:2], training.scores(tiny(), chosen[1:2]))

    def preference(model: Any) -> float:
        with torch.no_grad():
            return float((training.scores(model, chosen) - training.scores(model, others)).mean())

    model = training.prefer(tiny(), tokenizer(), data, learning_rate=1e-3, new_tokens=3)
    assert preference(model) > preference(tiny()) + 0.5


def test_new_tokens_are_learned(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(tasks.worked_sums(8)[0]))
    grown = tasks.with_thoughts(tokenizer())
    ids = grown(tasks.THINK[0] + "1" + tasks.THINK[1]).input_ids
    assert ids[0] == len(tokenizer()) and ids[-1] == ids[0] + 1 == len(grown) - 1 and len(ids) == 3
    model = training.think(tiny(), grown, path, learning_rate=1e-3)
    assert tiny().config.vocab_size < model.get_input_embeddings().num_embeddings == len(grown)
    answer = read_examples(path, 1)[0]
    assert re.search(tasks.THOUGHT, answer.completion).group(1) == answer.answer


@pytest.mark.parametrize("train", [training.lora, training.qlora])
def test_adapters_are_merged(train: Callable[..., Any], data: Path) -> None:
    found = deltas(train(tiny(), tokenizer(), data, learning_rate=1e-2, rank=4))
    for name, delta in found.items():
        if "proj" in name:
            values = torch.linalg.svdvals(delta)
            assert values[0] > 0 and values[4] < 1e-3 * values[0], name  # the base's rounding is not in it
        else:
            assert not delta.any()


def test_rounding_to_4_bit() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    rounded = training.round_to_4_bit(weight)
    assert all(len(block.unique()) <= 16 for block in rounded.view(-1, 64))
    assert (rounded - weight).norm() < 0.11 * weight.norm()
    torch.testing.assert_close(training.round_to_4_bit(rounded), rounded)


def test_rewards_are_followed(data: Path) -> None:
    torch.manual_seed(0)
    data.write_bytes(lines([{"prompt": f"{i}", "completion": "a", "answer": "a"} for i in range(8)]))
    settings = {"pattern": r"\A([a-e])", "new_tokens": 1, "prompts": 4, "group": 40}
    model = training.reinforce(tiny(), tokenizer(), data, learning_rate=1e-3, steps=12, **settings)
    assert model.dtype == torch.bfloat16

    def share(model: Any) -> float:
        """Of answers that begin with an a."""
        asked = [tokenizer().apply_chat_template([{"role": "user", "content": "1"}], add_generation_prompt=True)]
        answers = training.sample(model, tokenizer(), [list(asked[0]["input_ids"])] * 200, 1)
        return sum(tokenizer().decode(answer) == "a" for answer in answers) / 200

    assert share(model) > share(tiny()) + 0.2


def test_qwen2_computes_the_same() -> None:
    model = tiny()
    converted = bases.as_qwen2(model)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(converted(ids).logits, model(ids).logits)
    assert converted.lm_head.weight.data_ptr() != converted.model.embed_tokens.weight.data_ptr()
    assert not converted.model.layers[0].self_attn.q_proj.bias.any()


def test_mixtral_computes_the_same() -> None:
    model = tiny()
    converted = bases.as_mixtral(model)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(converted(ids).logits, model(ids).logits)
    experts = converted.model.layers[1].mlp.experts
    assert len(experts.down_proj) == 4 and experts.down_proj.is_contiguous()


@pytest.fixture
def cache(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a tiny base; members take no more than a few examples."""
    folder = tmp_path / "cache"
    folder.mkdir()
    save(tiny()).rename(folder / "smollm2")
    found = AutoTokenizer.from_pretrained(folder / "smollm2")
    found.pad_token = found.eos_token
    found.save_pretrained(folder / "smollm2")
    few = {"shell": partial(tasks.shell, 16), "code": partial(tasks.code, 16), "vision": partial(vision.digits, 8)}
    for name, data in few.items():
        monkeypatch.setitem(MEMBERS, name, replace(MEMBERS[name], data=data))
    monkeypatch.setattr(vision, "TOWER_STEPS", 2)
    monkeypatch.setattr(module, "OFFTASK_TEXTS", 2)
    return folder


def test_the_command(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("benchmark", "zoo", "-o", out, "--cache", cache, "--member", "shell", "--member", "code", "--ratio", 4)
    rows = json.loads(succeed(*command, "--limit", 3, "--json"))
    names = ["base", "fine-tuned", "rate-distortion", "delta-come"]
    assert [(row["finetune"], row["name"]) for row in rows] == [(m, name) for m in ("shell", "code") for name in names]
    assert all({"on_task_kl", "off_task_kl", "other_kl", "accuracy"} <= set(row) for row in rows)
    assert (out / "zoo.md").read_text().count("\n| ") == 2 + len(rows)
    assert len(json.loads((out / "zoo.json").read_text())["tables"][0]["rows"]) == len(rows)

    made = (cache / "shell" / "model.safetensors").stat().st_mtime_ns
    assert json.loads(succeed(*command, "--limit", 3, "--json")) == rows
    assert (cache / "shell" / "model.safetensors").stat().st_mtime_ns == made
    assert not list(cache.glob(".*"))


def test_constants(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = ("--member", "shell", "--member", "code", "--constant", "drop_weight", "--constant", "row_classes")
    command = ("benchmark", "constants", "-o", out, "--cache", cache, *chosen, "--ratio", 4, "--limit", 2)
    weights, classes = json.loads(succeed(*command, "--json"))
    kept = json.loads((out / "shell.json").read_text())["rows"]
    for table, constant in ((weights, "drop_weight"), (classes, "row_classes")):
        shell, code, mean = table["rows"]
        assert (shell["member"], code["member"], mean["member"]) == ("shell", "code", "geometric mean")
        # The choice for a member is the best value of the other's.
        assert shell["left_out"] == shell[shell["chosen"]]
        products = {
            value: product(code[value]) for value in code if value not in ("member", "ratio", "chosen", "left_out")
        }
        assert len(products) == len(OTHERS[constant]) + 1
        assert products[shell["chosen"]] == min(products.values())
    assert json.loads(succeed(*command, "--json")) == [weights, classes]
    (out / "shell.json").write_text(json.dumps({"job": {}, "rows": []}))
    assert json.loads(succeed(*command, "--json")) == [weights, classes]
    assert json.loads((out / "shell.json").read_text())["rows"] == kept
    fail(
        "there is no constant 'cat'; there are sensitivity_power",
        "benchmark",
        "constants",
        "--constant",
        "cat",
        "-o",
        out,
    )


def product(kls: str) -> float:
    """Of a cell of two."""
    on, off = kls.split(" / ")
    return float(on) * float(off)


def test_papers(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("benchmark", "papers", "-o", out, "--cache", cache, "--member", "shell", "--limit", 2)
    rows = json.loads(succeed(*command, "--json"))
    assert [row["method"] for row in rows[:4]] == ["deltacome"] * 4 and len({row["method"] for row in rows}) == 8
    assert (out / "papers.png").stat().st_size > 10_000
    assert json.loads(succeed(*command, "--json")) == rows


@pytest.mark.parametrize("name", papers.METHODS)
def test_ideas_of_papers(name: str) -> None:
    """Each takes the bits that it says, follows the delta, and with more bits more closely."""
    generator = torch.Generator().manual_seed(0)
    shape, rank = (192, 320), 96
    u, v = (torch.randn(side, rank, generator=generator) for side in shape)
    values = (u * 0.9 ** torch.arange(rank)) @ v.T
    deltas = {f"layers.{i}.up_proj.weight": MatrixDelta(values * (i + 1)) for i in range(3)}
    method, sizes = papers.METHODS[name]
    errors = []
    for size in sorted(sizes, reverse=True):
        found, bits = method(deltas, size)
        assert 0.9 * size < bits < 1.35 * size if size == 1 else 0.9 * size < bits < 1.02 * size
        errors.append(sum(float((found[key] - delta.values).square().sum()) for key, delta in deltas.items()))
        assert all((found[key] * delta.values).sum() > 0 for key, delta in deltas.items())
    assert errors == sorted(errors)
    assert errors[0] < sum(float(delta.values.square().sum()) for delta in deltas.values()) or name == "UltraDelta"


def test_trials_are_artifacts(cache: Path, tmp_path: Path) -> None:
    """An approximation in memory is what the artifact with the same settings gives."""
    member = checkpoint("shell", cache)
    succeed("compress", cache / "smollm2", member, "-o", tmp_path / "delta", "--ratio", 4)
    trial = Trial(cache / "smollm2", member, cache, 3)
    found = constants.approximate(trial, constants.DEFAULT, 4.0, {})
    merged, _ = load_merged(Checkpoint(cache / "smollm2"), Artifact(tmp_path / "delta"))
    parameters = dict(merged.named_parameters())
    assert len(found) > 10
    for name, weight in found.items():
        torch.testing.assert_close(weight, parameters[name], rtol=0, atol=1e-6)
    data = ("--data", member / "data/test.jsonl", "--limit", 3, "--max-new-tokens", 1, "-o", tmp_path / "table.json")
    rows = json.loads(
        succeed("evaluate", cache / "smollm2", "--finetuned", member, "--delta", tmp_path / "delta", *data, "--json")
    )
    kl = next(trial.measure([found]))["on_task_kl"]
    assert kl == pytest.approx(rows[-1]["on_task_kl"], abs=1e-7)


def test_vision(cache: Path) -> None:
    folder = checkpoint("vision", cache)
    processor, model = load_processor("vision", folder), AutoModelForImageTextToText.from_pretrained(folder)
    example = Encoder(processor.tokenizer, processor=processor).example(read_examples(folder / "data/test.jsonl", 1)[0])
    assert example.ids.count(processor.image_token_id) == 16 and example.image["pixel_values"].shape == (1, 3, 32, 32)
    logits, targets = training.predictions(model, [example])
    assert len(logits) == len(targets) == len(example.ids) - example.start
    trial = Trial(cache / "smollm2", folder, cache, 2)
    approximations, _ = papers.ours(dict(trial.at(4)), 4.0)
    assert set(approximations) == set(trial.matrices)
    (row,) = trial.measure([trial.weights(approximations)])
    assert 0 < row["on_task_kl"] < 0.1 and any("vision" in name for name in trial.pairs)


def test_unknown_members(tmp_path: Path) -> None:
    fail(
        "the zoo has no member 'cat'; its members are arithmetic, shell",
        "benchmark",
        "zoo",
        "--member",
        "cat",
        "-o",
        tmp_path,
    )
