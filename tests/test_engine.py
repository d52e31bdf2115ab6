"""The running batch: whatever joins and leaves, every answer is what the merged model says alone."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import deltacome
from conftest import Save, fine_tune, make_other, make_tokenizer
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.restore.merging import load_merged, open_checked
from deltacome.runtime.batch import Batch
from deltacome.runtime.tenant import Change, Tenant
from deltacome.serve.engine import rows as engine_rows
from deltacome.serve.engine.attention import attention
from deltacome.serve.engine.cache import join, new_cache
from deltacome.serve.engine.rows import cache_positions, partition
from deltacome.serve.engine.sampling import Sampling, likelihood, sample
from deltacome.serve.engine.scheduler import Engine, Limits, QueueFullError
from deltacome.serve.engine.sequence import Event, Sequence
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
    assert not engine.batches


def test_a_full_cache_puts_sequences_back(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    put_back = []
    plain = Engine._put_back
    monkeypatch.setattr(Engine, "_put_back", lambda self, sequence: (put_back.append(sequence), plain(self, sequence)))
    long_answers = [number for number, answer in enumerate(served.alone) if len(answer) == NEW_TOKENS]
    numbers = sorted(long_answers, key=lambda number: len(served.prompts[number]))[:3]
    room = 3 * (len(served.prompts[numbers[-1]]) + 4)
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(cache=room))
    engine.submit([ask(served, number, answers) for number in numbers])
    widest = 0
    while not engine.is_idle:
        engine.step()
        widest = max(widest, sum(len(rows.sequences) * rows.length for rows in engine.batches))
    assert put_back and widest <= room
    assert [answers[number] for number in numbers] == [served.alone[number] for number in numbers]


@pytest.mark.parametrize("step", [1, -1])
def test_short_rows_carry_no_padding_of_long_ones(served: SimpleNamespace, step: int) -> None:
    """They have a cache of their own, and room where there would be none for the padding."""
    counts = {}
    for spare in (20, 10**6):
        answers: dict[int, list[int]] = {}
        engine = Engine(served.model, Limits(cache=400, prompt=1000))
        engine.spare = spare
        engine.submit([ask(served, number, answers) for number in range(12)[::step]])
        beside = caches = 0
        while not engine.is_idle:
            engine.step()
            caches = max(caches, len(engine.batches))
            if any(rows.length > 60 for rows in engine.batches):
                beside = max(beside, len(engine.running))
            for rows in engine.batches:
                assert sum(rows.length - sequence.read for sequence in rows.sequences) <= spare
            assert sum(rows.length * len(rows.sequences) for rows in engine.batches) <= 400
        assert [answers[number] for number in range(12)] == served.alone
        counts[spare] = beside, caches
    assert counts[20][0] > counts[10**6][0] and counts[20][1] > 2 and counts[10**6][1] == 1


def test_padding_is_spared_by_what_it_costs(served: SimpleNamespace) -> None:
    """Where reading it takes longer than reading the weights once more."""
    engine = Engine(served.model, Limits())
    assert math.isinf(engine.spare)
    engine.submit([ask(served, 1, {})])
    engine.step()
    config = served.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(parameter.nbytes for parameter in served.model.parameters())
    assert engine.spare == weights / (config.num_hidden_layers * 2 * heads * size * 4)


def test_which_rows_share_a_cache(served: SimpleNamespace) -> None:
    sequences = []
    for length in (9, 100, 1, 95, 10, 98):
        sequences.append(ask(served, 0, {}))
        sequences[-1].tokens = [5] * length
    for spare, expected, size in (
        (10, [[100, 98, 95], [10, 9, 1]], 330),
        (0, [[100], [98], [95], [10], [9], [1]], 313),
        (math.inf, [[100, 98, 95, 10, 9, 1]], 600),
    ):
        found = partition(sequences, spare)
        assert [[len(sequence.tokens) for sequence in group] for group in found] == expected
        assert cache_positions(sequences, spare) == size


def test_what_is_prepared_serves_every_step_of_the_same_rows(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits())
    numbers = [number for number, answer in enumerate(served.alone) if len(answer) == NEW_TOKENS][:2]
    engine.submit([ask(served, number, answers) for number in numbers])
    while len(engine.running) < 2:
        engine.step()
    engine.step()
    batch = engine.batches[0].batch
    engine.step()
    assert engine.batches[0].batch is batch is not None
    finish(engine)
    assert not engine.batches  # or it would keep tenants alive


def test_who_asks_much_holds_up_nobody_who_asks_little(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    ended: list[int] = []
    engine = Engine(served.model, Limits(rows=1))
    for number, owner in ((0, "x"), (3, "x"), (6, "x"), (9, "x"), (1, "x"), (2, "y")):
        sequence, note = ask(served, number, answers, owner=owner), ended.append
        plain = sequence.notify

        def notify(event: Event, number: int = number, plain: Any = plain, note: Any = note) -> None:
            plain(event)
            if event.finish:
                note(number)

        sequence.notify = notify
        engine.submit([sequence])
    finish(engine)
    assert ended == [0, 1, 2, 3, 6, 9]  # of x and one tenant, of another tenant, of y, and then the rest
    assert [answers[number] for number in ended] == [served.alone[number] for number in ended]


def test_an_answer_of_one_token_leaves_the_rows_as_they_are(served: SimpleNamespace) -> None:
    """Nothing joins, so nothing is copied."""
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(prompt=128))
    long, other = [number for number, answer in enumerate(served.alone) if len(answer) == NEW_TOKENS][:2]
    engine.submit([ask(served, long, answers)])
    while not engine.batches:  # its prompt may be read in parts
        engine.step()
    (rows,), short = engine.batches, ask(served, other, answers)
    short.max_tokens = 1
    engine.submit([short])
    engine.step()
    assert answers[other] == served.alone[other][:1] and engine.batches == [rows]
    finish(engine)
    assert answers[long] == served.alone[long]


def test_a_long_prompt_holds_nobody_up(served: SimpleNamespace) -> None:
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(prompt=8))
    engine.submit([ask(served, 4, answers), ask(served, 2, answers)])  # 90 tokens and 1
    for _ in range(5):
        engine.step()
    assert len(answers[2]) >= 3 and not answers[4]
    finish(engine)
    assert answers[4] == served.alone[4]


def test_a_long_prompt_goes_by_small_parts_while_others_wait(served: SimpleNamespace) -> None:
    """And by large ones while nobody does."""
    parts: list[int] = []
    forward = Engine._forward
    for others in ((), (2,)):
        answers: dict[int, list[int]] = {}
        engine = Engine(served.model, Limits(prompt=16))
        engine.submit([ask(served, number, answers) for number in (*others, 4)])  # 1 token, and 90
        parts.clear()

        def noting(self: Engine, batch: Batch, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
            if ids.shape[1] > 1:
                parts.append(ids.shape[1])
            return forward(self, batch, ids, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "_forward", noting)
            finish(engine)
        assert answers[4] == served.alone[4]
        assert parts[0] == (4 if others else 16) and sum(parts) == 90


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


def told(sequence: Sequence) -> list[Event]:
    """The events of a sequence from now on."""
    events: list[Event] = []
    sequence.notify = events.append
    return events


class GuiltyError(Exception):
    """What one sequence of the tests does to whatever batch it is in."""


def guilty(step: str) -> Callable[[Sequence], None]:
    """Let a sequence fail in the forward pass that reads its prompt or makes its tokens, or behind it, by its text."""

    def fail(*_: object) -> None:
        raise GuiltyError

    def apply(sequence: Sequence) -> None:
        if step == "text":
            sequence.text.add = fail  # type: ignore[method-assign, assignment]
        elif step == "told":
            sequence.notify = fail
        elif step == "token":
            sequence.tokens[-1] = 10**6

    return apply


@pytest.mark.parametrize("limits", [Limits(), Limits(prompt=300), Limits(prompt=7)], ids=str)
@pytest.mark.parametrize("step", ["prompt", "step", "text", "told", "token", "nan"])
def test_a_guilty_row_fails_alone(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, step: str, limits: Limits
) -> None:
    """Whatever goes wrong for one sequence, every other answer in its batch is what it is without it."""
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, limits)
    sequences = [ask(served, number, answers) for number in range(12)]
    # One of the first delta's, whose answer is no end token at once: it must come to all the places where it can fail.
    culprit = ask(served, next(number for number in range(1, 12, 3) if len(served.alone[number]) > 1), {})
    events = told(culprit)
    broken = Tenant("broken", None, served.tenants[1].changes)
    guilty(step)(culprit)
    forward = Engine._forward

    def fail(self: Engine, batch: Batch, ids: torch.Tensor, *arguments: object) -> torch.Tensor:
        """As a kernel might: not before it has written keys and values of other rows."""
        logits = forward(self, batch, ids, *arguments)  # type: ignore[arg-type]
        if broken in batch.tenants:
            if step == "nan":
                logits[batch.tenants.index(broken)] = torch.nan
            elif (step == "prompt") == (ids.shape[1] > 1):
                raise GuiltyError
        return logits

    if step in ("prompt", "step", "nan"):
        culprit.tenant = broken
        monkeypatch.setattr(Engine, "_forward", fail)
    engine.submit([*sequences[:5], culprit, *sequences[5:]])
    finish(engine)
    assert [answers[number] for number in range(12)] == served.alone
    assert step == "told" or [event.finish for event in events if event.finish] == ["failed"]
    assert not engine._begun and not engine.batches


@pytest.mark.parametrize("place", ["prompt", "step", "join"])
def test_a_batch_too_large_for_the_memory_makes_sequences_wait(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def limited(function: Callable[..., Any], rows: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if rows(*arguments) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return function(*arguments)

        return call

    if place == "join":
        plain = engine_rows.join
        monkeypatch.setattr(
            engine_rows, "join", limited(plain, lambda parts, _: sum(len(rows) for _, rows, _ in parts))
        )
    else:
        is_prompt = place == "prompt"
        plain = Engine._forward
        limit = limited(plain, lambda _, batch, ids, *__: len(batch) if (ids.shape[1] > 1) == is_prompt else 0)
        monkeypatch.setattr(Engine, "_forward", limit)
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(prompt=300))
    engine.submit([ask(served, number, answers) for number in range(12)])
    rooms = []
    engine.on_step = lambda engine: rooms.append(engine.room)
    finish(engine)
    assert [answers[number] for number in range(12)] == served.alone
    assert rooms[-1] == engine.limits.cache  # the next batch tries anew
    assert place == "prompt" or min(rooms) < engine.limits.cache


@pytest.mark.parametrize("part", ["linear", "embed", "exact"])
def test_a_delta_that_is_not_numbers_fails_alone(served: SimpleNamespace, part: str) -> None:
    """Its rows share every kernel with the others' rows, which must not read them."""

    def broken(change: Change) -> Change:
        if part == "exact":
            return replace(change, exact={key: value * torch.nan for key, value in change.exact.items()})
        if part == "embed":
            return replace(change, vectors=tuple(vectors * torch.nan for vectors in change.vectors))
        packed = (
            replace(own, terms=tuple(replace(term, scale=term.scale * torch.nan) for term in own.terms))
            for own in change.packed
        )
        return replace(change, packed=tuple(packed))

    changes = {name: broken(change) for name, change in served.tenants[1].changes.items()}
    culprit = ask(served, 4, {})
    culprit.tenant = Tenant("broken", None, changes)
    events = told(culprit)
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(prompt=300))
    engine.submit([culprit, *(ask(served, number, answers) for number in range(12))])
    finish(engine)
    assert [event.finish for event in events] == ["failed"]
    assert [answers[number] for number in range(12)] == served.alone


def test_a_step_that_fails_whatever_its_rows_ends_all_answers(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of those being read, of those running, and none of those that wait."""
    answers: dict[int, list[int]] = {}
    engine = Engine(served.model, Limits(prompt=8, rows=3))
    sequences = [ask(served, number, answers) for number in (4, 2, 0, 1)]
    events = [told(sequence) for sequence in sequences[:3]]
    engine.submit(sequences)
    engine.step()

    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_next_to_read", fail)
        engine.step()
    assert [found[-1].finish for found in events] == ["failed"] * 3
    finish(engine)
    assert answers[1] == served.alone[1] and not engine._begun


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
    joined = join([(caches[0], [1], 3), (caches[1], [2, 0], 70)], 69)
    keys = joined.layers[1].keys
    assert keys.shape == (3, 1, 69, 4)
    assert torch.equal(keys[0, :, -3:], caches[0].layers[1].keys[1]) and not keys[0, :, :-3].any()
    assert torch.equal(keys[1:], caches[1].layers[1].keys[[2, 0], :, 1:])
    assert torch.equal(joined.layers[0].values[2], caches[1].layers[0].values[0, :, 1:])
    more = torch.randn(3, 1, 100, 4)
    keys, values = joined.update(more, more, 0)
    assert keys.shape[2] == values.shape[2] == joined.get_seq_length() == 169
    assert torch.equal(keys[:, :, 69:], more)


@pytest.mark.parametrize("tokens", [1, 5])
def test_heads_that_share_keys(tokens: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, tokens, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 4)
    mask = torch.rand(2, 1, tokens, 9) < 0.7
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    found, _ = attention(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape == (2, tokens, 6, 4) and found.is_contiguous()
    assert torch.allclose(found, expected, atol=1e-6)


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
    return [sample(logits, sampling, generator) for _ in range(count)]


def test_sampling() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -torch.inf, 2.5])
    for temperature in (1e-7, 1e-40, 5e-324):
        assert draw(Sampling(temperature, seed=1), logits, 20) == [1] * 20
    ties = torch.tensor([1.0, 3.0, 3.0])
    assert set(draw(Sampling(1e-40, seed=1), ties, 50)) == {1, 2}
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
