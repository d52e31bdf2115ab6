"""The running batch: whatever joins and leaves, every answer is what the merged model says alone."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deltacome
from conftest import Save, fine_tune, make_other, make_tokenizer
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.restore.merging import load_merged, open_checked
from deltacome.serve.engine.cache import join, new_cache
from deltacome.serve.engine.sampling import Sampling, choose, likelihood
from deltacome.serve.engine.scheduler import Engine, Event, Limits, QueueFullError, Sequence
from deltacome.serve.engine.text import TextStream

NEW_TOKENS = 10


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def served(request: pytest.FixtureRequest, save: Save, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base with two deltas, and what each one's merged model answers alone to prompts of many lengths."""
    folder, family = tmp_path_factory.mktemp("engine"), request.param
    base = save(make_other(family, initializer_range=0.2), "base")
    deltas = {}
    for seed, name in ((1, "a"), (2, "b")):
        model = make_other(family, initializer_range=0.2)
        fine_tune(model, seed, size=0.4)
        deltas[name] = folder / name
        deltacome.compress(base, save(model, name), deltas[name], ratio=8)
    model = deltacome.load(base, deltas)
    checkpoint = Checkpoint(base)
    models = [model] + [load_merged(checkpoint, open_checked(checkpoint, delta))[0] for delta in deltas.values()]
    tenants = [None, *model.deltas.values()]
    torch.manual_seed(5)
    prompts = [torch.randint(2, 259, (length,)).tolist() for length in (3, 40, 1, 17, 90, 5, 5, 64, 2, 33, 7, 12)]
    alone = []
    for number, prompt in enumerate(prompts):
        output = models[number % 3].generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1, pad_token_id=1
        )
        alone.append(output[0, len(prompt) :].tolist())
    assert len({tuple(answer) for answer in alone}) > 9
    return SimpleNamespace(model=model, tenants=tenants, prompts=prompts, alone=alone)


def ask(served: SimpleNamespace, number: int, answers: dict[int, list[int]], **options: object) -> Sequence:
    """The sequence of a prompt, which notes its tokens."""
    answers[number] = []

    def notify(event: Event) -> None:
        if event.token is not None:
            answers[number].append(event.token)

    return Sequence(
        served.tenants[number % 3],
        list(served.prompts[number]),
        NEW_TOKENS,
        {1},
        Sampling(temperature=0),
        TextStream(make_tokenizer(), []),
        notify,
        **options,  # type: ignore[arg-type]
    )


def finish(engine: Engine) -> None:
    for _ in range(1000):
        engine.step()
        if engine.is_idle:
            return
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(rows=3),
        Limits(prompt=7),  # most prompts are read in parts, in turns
        Limits(prompt=300),  # several are read together
        Limits(cache=150),  # sequences are put back when others grow
        Limits(rows=1),
    ],
    ids=str,
)
def test_answers_are_those_of_the_merged_models_alone(served: SimpleNamespace, limits: Limits) -> None:
    for step in (1, -1):
        answers: dict[int, list[int]] = {}
        engine = Engine(served.model, limits)
        engine.submit([ask(served, number, answers) for number in range(12)[::step]])
        finish(engine)
        assert [answers[number] for number in range(12)] == served.alone


def test_sequences_join_and_leave_at_any_step(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(prompt=16))
    for number in range(12):
        engine.submit([ask(served, number, answers)])
        engine.step()
        engine.step()
    cancelled: dict[int, list[int]] = {}
    other = ask(served, 4, cancelled)
    engine.submit([other])
    engine.step()
    engine.cancel([other])
    finish(engine)
    assert [answers[number] for number in range(12)] == served.alone
    assert len(cancelled[4]) < NEW_TOKENS
    assert engine.cache is None and not engine.running


def test_a_full_cache_puts_sequences_back(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    put_back = []
    plain = Engine._put_back
    monkeypatch.setattr(Engine, "_put_back", lambda self: (put_back.append(self.running[-1]), plain(self)))
    long_answers = [number for number, answer in enumerate(served.alone) if len(answer) == NEW_TOKENS]
    numbers = sorted(long_answers, key=lambda number: len(served.prompts[number]))[:3]
    room = 3 * (len(served.prompts[numbers[-1]]) + 4)
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(cache=room))
    engine.submit([ask(served, number, answers) for number in numbers])
    widest = 0
    while not engine.is_idle:
        engine.step()
        widest = max(widest, len(engine.running) * engine.length)
    assert put_back and widest <= room
    assert [answers[number] for number in numbers] == [served.alone[number] for number in numbers]


def test_what_is_prepared_serves_every_step_of_the_same_rows(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits())
    numbers = [number for number, answer in enumerate(served.alone) if len(answer) == NEW_TOKENS][:2]
    engine.submit([ask(served, number, answers) for number in numbers])
    while len(engine.running) < 2:
        engine.step()
    engine.step()
    batch = engine.batch
    engine.step()
    assert engine.batch is batch is not None
    finish(engine)
    assert engine.batch is None  # or it would keep tenants alive


def test_a_long_prompt_holds_nobody_up(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(prompt=8))
    engine.submit([ask(served, 4, answers), ask(served, 2, answers)])  # 90 tokens and 1
    for _ in range(5):
        engine.step()
    assert len(answers[2]) >= 3 and not answers[4]
    finish(engine)
    assert answers[4] == served.alone[4]


def test_deadline_and_full_queue(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    ends: list[Event] = []
    engine = Engine(served.model, Limits(waiting=2, rows=1))
    late = ask(served, 0, answers, deadline=time.monotonic() - 1)
    late.notify = ends.append
    engine.submit([late, ask(served, 1, answers)])
    with pytest.raises(QueueFullError):
        engine.submit([ask(served, 2, answers)])
    assert engine.seconds_to_wait() >= 1
    finish(engine)
    assert [event.finish for event in ends] == ["deadline"]
    assert answers[1] == served.alone[1]


def test_a_failing_step_ends_its_answers_and_no_others(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: dict[int, list[int]] = {}
    ends: list[Event] = []
    engine = Engine(served.model, Limits())
    failing = ask(served, max(range(12), key=lambda number: len(served.alone[number])), answers)
    failing.notify = ends.append
    engine.submit([failing])
    engine.step()

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_forward", fail)
        engine.step()
    assert ends[-1].finish == "failed" and engine.is_idle
    engine.submit([ask(served, 1, answers)])
    finish(engine)
    assert answers[1] == served.alone[1]


def test_the_engines_own_thread(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits())
    engine.start()
    for number in range(12):
        engine.submit([ask(served, number, answers)])
    until = time.monotonic() + 60
    while not engine.is_idle and time.monotonic() < until:
        time.sleep(0.01)
    engine.stop()
    assert not engine.is_alive
    assert [answers[number] for number in range(12)] == served.alone


def test_joined_caches_hold_the_rows_at_the_right() -> None:
    caches = []
    for rows, positions in ((2, 3), (3, 70)):
        cache = new_cache()
        for layer in range(2):
            x = torch.randn(rows, 1, positions, 4)
            cache.update(x, x + 1, layer)
        caches.append(cache)
    joined = join([(caches[0], [1]), (caches[1], [2, 0])], 69)
    keys = joined.layers[1].keys
    assert keys.shape == (3, 1, 69, 4)
    assert torch.equal(keys[0, :, -3:], caches[0].layers[1].keys[1]) and not keys[0, :, :-3].any()
    assert torch.equal(keys[1:], caches[1].layers[1].keys[[2, 0], :, 1:])
    assert torch.equal(joined.layers[0].values[2], caches[1].layers[0].values[0, :, 1:])
    more = torch.randn(3, 1, 100, 4)
    keys, values = joined.update(more, more, 0)
    assert keys.shape[2] == values.shape[2] == joined.get_seq_length() == 169
    assert torch.equal(keys[:, :, 69:], more)


def text_of(tokens: list[int], stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(make_tokenizer(), stop)
    parts = []
    for token in tokens:
        parts.append(stream.add(token))
        if stream.is_stopped:
            return parts, True
    return [*parts, stream.finish()], stream.is_stopped


def test_text_comes_in_whole_characters() -> None:
    text = "naïve — 数学 🎉 end"
    tokens = make_tokenizer()(text).input_ids
    parts, _ = text_of(tokens, [])
    assert "".join(parts) == text and "" in parts
    assert all("\ufffd" not in part for part in parts)
    parts, _ = text_of(tokens[:8], [])  # ends within a character: what the tokenizer makes of it
    assert "".join(parts) == make_tokenizer().decode(tokens[:8])


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["xyz", "e t"], "on"),
        ("aaab", ["aab"], "a"),
        ("one two", ["twos"], "one two"),  # only the beginning of a stop string
        ("数学です", ["学"], "数"),
        ("abc", ["c", "b"], "a"),
        ("abc", ["abc"], ""),
        ("xabcabcabd!", ["abcabd"], "xabc"),
        ("aaaaab", ["aaab"], "aa"),
        ("abcd", ["bcx", "cd", "d"], "ab"),  # of those that end at once, the longest
    ],
)
def test_stop_strings(text: str, stop: list[str], expected: str) -> None:
    parts, is_stopped = text_of(make_tokenizer()(text).input_ids, stop)
    assert "".join(parts) == expected
    assert is_stopped == (expected != text)


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self) -> None:
        self.tokenizer, self.decoded = make_tokenizer(), 0

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.decoded += len(tokens)
        return self.tokenizer.decode(tokens, **options)


@pytest.mark.parametrize("character", ["\x80", "ã"], ids=["a part of none", "the first of three"])
def test_a_long_run_without_a_character_takes_linear_time(character: str) -> None:
    """Each token is decoded a few times, and the text is that of all of them at once."""
    tokenizer = Counting()
    alone = tokenizer.tokenizer.convert_tokens_to_ids({"\x80": "Ģ", "ã": "ã"}[character])
    tokens = [alone] * 1000 + make_tokenizer()("数 end").input_ids
    stream = TextStream(tokenizer, [])
    text = "".join(map(stream.add, tokens)) + stream.finish()
    assert text == tokenizer.tokenizer.decode(tokens) and text.endswith("数 end")
    assert tokenizer.decoded < 100 * len(tokens)


def test_no_more_is_held_back_than_may_be_a_stop_string() -> None:
    tokens = make_tokenizer()("a" * 500 + "c").input_ids
    stream = TextStream(make_tokenizer(), ["a" * 255 + "b"])
    parts = [stream.add(token) for token in tokens]
    assert parts == [""] * 255 + ["a"] * 245 + ["a" * 255 + "c"]


def draw(sampling: Sampling, logits: torch.Tensor, count: int) -> list[int]:
    generator = sampling.generator(0)
    return [choose(logits[None], [(sampling, generator)])[0] for _ in range(count)]


def test_sampling() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -torch.inf, 2.5])
    assert draw(Sampling(temperature=0), logits, 3) == [1, 1, 1]
    assert draw(Sampling(seed=7), logits, 50) == draw(Sampling(seed=7), logits, 50)
    assert draw(Sampling(seed=7), logits, 50) != draw(Sampling(seed=8), logits, 50)
    assert draw(Sampling(), logits, 50) != draw(Sampling(), logits, 50)
    assert set(draw(Sampling(top_p=0.4, seed=1), logits, 50)) == {1}
    assert set(draw(Sampling(top_p=0.7, seed=1), logits, 200)) == {1, 4}
    counts = torch.bincount(torch.tensor(draw(Sampling(temperature=2.0, seed=1), logits, 4000)), minlength=5)
    assert torch.allclose(counts / 4000, torch.softmax(logits / 2, 0), atol=0.03)
    found = likelihood(logits, 2, 3)
    expected = torch.log_softmax(logits.double(), 0)
    assert found.logprob == pytest.approx(float(expected[2]), abs=1e-5)
    assert [token for token, _ in found.top] == [1, 4, 2]
    rows = torch.stack([logits, logits.flip(0)])
    greedy = Sampling(temperature=0)
    assert choose(rows, [(greedy, greedy.generator(0))] * 2) == [1, 3]
