"""What prompts begin with is read once: answers are what they are without that, and no model finds another's."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

import deltacome
from conftest import SIZES, Save, fine_tune, make_other, make_tokenizer
from deltacome.runtime.tenant import Tenant
from deltacome.serve.engine import prefixes
from deltacome.serve.engine.cache import new_cache
from deltacome.serve.engine.prefixes import BLOCK, Prefixes
from deltacome.serve.engine.sampling import Sampling
from deltacome.serve.engine.scheduler import Engine, Limits
from deltacome.serve.engine.sequence import Event, Sequence
from deltacome.serve.engine.text import TextStream
from serving import client, make_app, metric, post_json, serving

pytest_plugins = ["serving"]
NEW_TOKENS = 12
WINDOW = 24  # much less than prompts have


def make_base(family: str) -> Any:
    if family in ("llama", "gpt_neox"):
        return make_other(family, initializer_range=0.2)
    options = {**SIZES, "num_key_value_heads": 1, "head_dim": 20, "pad_token_id": 0, "initializer_range": 0.2}
    options["tie_word_embeddings"] = False  # or each token is followed by itself
    config = {"mistral": MistralConfig, "gemma2": Gemma2Config}[family](**options, sliding_window=WINDOW)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "mistral", "gemma2"])
def served(request: pytest.FixtureRequest, save: Save, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base with two deltas, the base being the first of the tenants."""
    folder, family = tmp_path_factory.mktemp("prefixes"), request.param
    base = save(make_base(family), "base")
    deltas = {}
    for seed, name in ((1, "a"), (2, "b")):
        model = make_base(family)
        fine_tune(model, seed, size=0.4)
        deltas[name] = folder / name
        deltacome.compress(base, save(model, name), deltas[name], ratio=8)
    model = deltacome.load(base, deltas)
    return SimpleNamespace(model=model, tenants=[None, *model.deltas.values()])


class Asked:
    """A sequence with the tokens that it is given."""

    def __init__(self, tenant: Tenant | None, prompt: list[int], new_tokens: int = NEW_TOKENS, **options: Any) -> None:
        self.answer: list[int] = []
        self.events: list[Event] = []
        sampling, text = Sampling(temperature=0), TextStream(make_tokenizer(), [])
        self.sequence = Sequence(tenant, list(prompt), new_tokens, set(), sampling, text, self.note, **options)

    def note(self, event: Event) -> None:
        self.events.append(event)
        if event.token is not None:
            self.answer.append(event.token)


def finish(engine: Engine, *asked: Asked) -> int:
    """Answer them; the tokens that were read, those read again and padding counted, apart from the answers' own."""
    read = 0
    forward = engine._forward

    def counting(batch: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal read
        read += ids.numel() if ids.shape[1] > 1 else 0
        return forward(batch, ids, *rest)

    engine._forward = counting  # type: ignore[method-assign]
    engine.submit([one.sequence for one in asked])
    for _ in range(2000):
        engine.step()
        if engine.is_idle:
            del engine._forward
            return read
    raise AssertionError("the engine does not come to an end")


def draw(seed: int, *lengths: int) -> list[list[int]]:
    torch.manual_seed(seed)
    return [torch.randint(2, 259, (length,)).tolist() for length in lengths]


@pytest.fixture(scope="module")
def asked(served: SimpleNamespace) -> list[tuple[Tenant | None, list[int], list[int]]]:
    """Models, prompts that begin alike and are of several lengths, and the answers of an engine that keeps nothing."""
    system, *users = draw(0, 70, 5, 30, 1, 17, 64, 3, 40, 9)
    found = []
    for number, user in enumerate(users):
        tenant, prompt = served.tenants[number % 3], [*system[: 70 - 9 * (number % 3)], *user]
        finish(Engine(served.model, Limits(prefixes=0)), one := Asked(tenant, prompt))
        assert one.sequence.recalled == 0
        found += [(tenant, prompt, one.answer)] * 2
    return found


@pytest.mark.parametrize(
    "limits",
    [Limits(), Limits(prompt=7), Limits(prompt=300), Limits(cache=400), Limits(rows=1), Limits(prefixes=112)],
    ids=str,
)
def test_answers_are_those_without(served: SimpleNamespace, asked: list[Any], limits: Limits) -> None:
    """Prompts that begin alike, of several lengths, for several models, one after another and at once."""
    engine = Engine(served.model, limits)
    for step in (1, -1):
        found = [Asked(tenant, prompt) for tenant, prompt, _ in asked]
        finish(engine, *found[::step])
        assert [one.answer for one in found] == [answer for *_, answer in asked]
        assert engine.prefixes.tokens <= limits.prefixes
    recalled = [one.sequence.recalled for one in found]
    whole = [(len(prompt) - 1) // BLOCK * BLOCK for _, prompt, _ in asked]
    if limits.prefixes > 1000:
        assert recalled == whole
    assert any(recalled) and all(mine <= most for mine, most in zip(recalled, whole, strict=True))


def test_what_is_known_is_not_read(served: SimpleNamespace) -> None:
    (prompt,) = draw(1, 83)
    engine = Engine(served.model, Limits())
    assert finish(engine, Asked(None, prompt)) == 83
    assert finish(engine, Asked(None, prompt)) == 3
    assert finish(engine, Asked(None, [*prompt[:50], *draw(2, 20)[0]])) == 70 - 48
    assert finish(Engine(served.model, Limits(prefixes=0)), Asked(None, prompt)) == 83


def test_nobody_finds_what_another_has_read(served: SimpleNamespace) -> None:
    """Not another model, not another key, not the base, not a delta that has taken the name over."""
    base, a, b = served.tenants
    (prompt,) = draw(3, 60)
    expected = {}
    for tenant in served.tenants:
        finish(Engine(served.model, Limits(prefixes=0)), one := Asked(tenant, prompt))
        expected[tenant] = one.answer
    assert expected[a] != expected[b] != expected[base] != expected[a]
    engine = Engine(served.model, Limits())
    for tenant in (a, b, base, replace(b, name="a"), replace(a)):
        finish(engine, one := Asked(tenant, prompt))
        like = expected[b if tenant is not None and tenant.changes is b.changes else a if tenant else None]
        assert (one.sequence.recalled, one.answer) == (0, like)
        finish(engine, one := Asked(tenant, prompt))
        assert (one.sequence.recalled, one.answer) == (48, like)
    for owner, recalled in (("x", 0), ("y", 0), ("x", 48)):
        finish(engine, one := Asked(a, prompt, owner=owner))
        assert one.sequence.recalled == recalled


def test_the_tests_would_see_another_models_keys(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one tree for all of them the answers are others."""
    _, a, b = served.tenants
    (prompt,) = draw(3, 60)
    finish(Engine(served.model, Limits(prefixes=0)), alone := Asked(b, prompt))
    engine = Engine(served.model, Limits())
    plain = Prefixes._tree
    monkeypatch.setattr(Prefixes, "_tree", lambda self, sequence: plain(self, Asked(None, prompt).sequence))
    finish(engine, Asked(a, prompt))
    finish(engine, mixed := Asked(b, prompt))
    assert mixed.sequence.recalled == 48 and mixed.answer != alone.answer


def test_a_conversation_goes_on_where_it_was(served: SimpleNamespace) -> None:
    engine, plain = Engine(served.model, Limits()), Engine(served.model, Limits(prefixes=0))
    tokens: list[int] = []
    for turn, message in enumerate(draw(4, 30, 21, 40)):
        before = len(tokens) - 1  # the last token of an answer is not read before the next turn
        tokens += message
        finish(engine, one := Asked(served.tenants[1], tokens, 20))
        finish(plain, alone := Asked(served.tenants[1], tokens, 20))
        assert one.answer == alone.answer
        assert one.sequence.recalled == (before // BLOCK * BLOCK if turn else 0)
        tokens += one.answer


def test_long_prompts_that_begin_alike_are_read_once(served: SimpleNamespace) -> None:
    """They take turns, and each goes on where the others have come to."""
    system, *users = draw(5, 128, 8, 8, 8, 8)
    prompts = [[*system, *user] for user in users]
    asked = [Asked(served.tenants[2], prompt) for prompt in prompts]
    read = finish(Engine(served.model, Limits(prompt=32)), *asked)
    alone = [Asked(served.tenants[2], prompt) for prompt in prompts]
    assert finish(Engine(served.model, Limits(prompt=32, prefixes=0)), *alone) >= 4 * 136
    assert read < 128 + 4 * 32
    assert [one.answer for one in asked] == [one.answer for one in alone]


def test_a_long_prompt_that_is_nearly_known_joins_a_short_one(served: SimpleNamespace) -> None:
    """Read together they are read to the end, though the long one would go by smaller parts alone."""
    engine = Engine(served.model, Limits(prompt=48))
    long, rest, short, other = draw(16, 200, 12, 14, 3)
    finish(engine, Asked(None, long))
    finish(Engine(served.model, Limits(prefixes=0)), alone := Asked(None, [*long, *rest]))
    running = Asked(None, other, 100)
    engine.submit([running.sequence])
    engine.step()
    finish(engine, first := Asked(served.tenants[1], short), second := Asked(None, [*long, *rest]))
    assert second.sequence.recalled == 192 and second.answer == alone.answer
    assert len(first.answer) == NEW_TOKENS and len(running.answer) == 100


def test_a_row_that_was_put_back_is_not_read_again(served: SimpleNamespace) -> None:
    prompts = draw(6, 60, 60)
    asked = [Asked(None, prompt, 40) for prompt in prompts]
    read = finish(Engine(served.model, Limits(cache=150)), *asked)
    alone = [Asked(None, prompt, 40) for prompt in prompts]
    again = finish(Engine(served.model, Limits(cache=150, prefixes=0)), *alone)
    assert again > 120 + 60 and read <= 120 + BLOCK
    assert [one.answer for one in asked] == [one.answer for one in alone]
    assert [one.sequence.recalled for one in asked] == [0, 0]  # what counts is the prompt, the first time


def test_a_replaced_delta_is_free_though_its_keys_are_kept(served: SimpleNamespace) -> None:
    engine = Engine(served.model, Limits())
    tenant = replace(served.tenants[1])
    gone = weakref.ref(tenant)
    finish(engine, Asked(tenant, draw(7, 40)[0]))
    del tenant
    gc.collect()
    assert gone() is None and engine.prefixes.tokens


def test_after_a_failure_a_model_reads_anew(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read may be the reason; the other models keep theirs."""
    engine = Engine(served.model, Limits(prompt=32))
    (prompt,) = draw(8, 70)
    _, a, b = served.tenants
    finish(engine, first := Asked(a, prompt), Asked(b, prompt))
    forward = Engine._forward
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_forward", lambda *arguments: forward(*arguments) * torch.nan)
        finish(engine, failed := Asked(a, prompt))
    assert failed.events[-1].finish == "failed"
    finish(engine, mine := Asked(a, prompt), other := Asked(b, prompt))
    assert (mine.sequence.recalled, other.sequence.recalled) == (0, 64)
    assert mine.answer == first.answer


@pytest.mark.parametrize("place", ["recall", "keep"])
def test_no_memory_for_prefixes(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Then there are none, and answers are as without."""
    engine = Engine(served.model, Limits())
    (prompt,) = draw(9, 70)
    finish(engine, first := Asked(None, prompt))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(prefixes, {"recall": "cache_of", "keep": "states_of"}[place], fail)
        finish(engine, one := Asked(None, [*prompt, *draw(10, 40)[0]]), other := Asked(None, prompt))
    assert other.answer == first.answer and len(one.answer) == NEW_TOKENS
    finish(engine, again := Asked(None, prompt))
    assert again.answer == first.answer


def test_a_batch_too_large_for_the_memory_takes_the_prefixes_place(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(served.model, Limits())
    first, second = draw(11, 70, 30)
    finish(engine, Asked(None, first))
    rooms: list[int] = []
    engine.on_step = lambda engine: rooms.append(engine.prefixes.limit)

    forward = Engine._forward

    def fail(*arguments: Any) -> Any:
        if engine.prefixes.limit:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*arguments)

    monkeypatch.setattr(Engine, "_forward", fail)
    finish(engine, one := Asked(None, first))  # alone: there is nobody else to wait for
    assert rooms[0] == 0 and rooms[-1] == engine.limits.prefixes
    monkeypatch.undo()
    finish(engine, other := Asked(None, first), Asked(None, second))
    assert other.answer == one.answer and len(one.answer) == NEW_TOKENS
    assert other.sequence.recalled == 0


def random_cache(rows: int, positions: int) -> Any:
    cache = new_cache()
    for layer in range(2):
        x = torch.randn(rows, 3, positions, 4)
        cache.update(x, x[..., :2] + 1, layer)
    return cache


def test_keys_and_values_come_back_bit_for_bit() -> None:
    """Of a row that is padded on the left, with values of another size than keys."""
    cache, own = random_cache(3, 90), Prefixes(1000)
    (tokens,) = draw(12, 71)
    asked = Asked(None, tokens).sequence
    asked.read = 70
    own.keep(asked, cache, 1)
    assert own.tokens == 64
    found = Asked(None, [*tokens[:70], *tokens[:20]]).sequence
    own.recall(found)
    assert (found.read, found.recalled) == (64, 64) and found.cache is not None
    for layer, plain in zip(found.cache.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, plain.keys[1:2, :, 20:84])
        assert torch.equal(layer.values, plain.values[1:2, :, 20:84])
        plain.all_keys.zero_()
    again = Asked(None, tokens).sequence
    own.recall(again)
    assert again.cache is not None and torch.equal(again.cache.layers[0].keys, found.cache.layers[0].keys)  # a copy


def test_the_longest_unused_go_first() -> None:
    cache, own = random_cache(1, 64), Prefixes(8 * BLOCK)
    first, second, third = draw(13, 64, 64, 64)

    def keep(tokens: list[int]) -> None:
        asked = Asked(None, tokens).sequence
        asked.read = 64
        own.keep(asked, cache, 0)

    def known(tokens: list[int]) -> int:
        return own.known(Asked(None, [*tokens, 5]).sequence)

    keep(first)
    keep(second)
    assert (known(first), own.tokens) == (64, 8 * BLOCK)
    keep([*third[:32], *third[:32]])
    assert (known(second), known(first), own.tokens) == (0, 64, 8 * BLOCK)
    keep([*first[:32], *third[:32]])  # shares two blocks, and takes the places of two that are unused for longer
    assert known([*first[:32], *third[:32]]) == 64 and own.tokens <= 8 * BLOCK
    assert known(first) == 64 and known([*third[:32], *third[:32]]) == 32
    long = [*draw(14, 300)[0]]
    asked = Asked(None, long).sequence
    asked.read = 300
    own.keep(asked, random_cache(1, 300), 0)  # more than there is room for: its beginning
    assert own.known(Asked(None, long).sequence) == own.tokens == 8 * BLOCK
    assert known(first) == 0


def test_over_http(folder: Any) -> None:
    """Usage and metrics say what was found, and a delta that takes a name over finds nothing."""
    ids = draw(15, 50)[0]
    with serving(make_app(folder, deltas={}, folder=folder / "deltas")) as address:
        load: dict[str, Any] = {"lora_name": "new", "lora_path": "a"}
        assert post_json(address, "/v1/load_lora_adapter", load)[0] == 200
        api = client(address)

        def ask(name: str, n: int = 1) -> tuple[int, str]:
            answer = api.completions.create(model=name, prompt=ids, temperature=0, max_tokens=8, n=n)
            assert answer.usage and answer.usage.prompt_tokens == 50 and answer.usage.prompt_tokens_details
            return answer.usage.prompt_tokens_details.cached_tokens or 0, answer.choices[0].text

        cold, text = ask("new")
        assert cold == 0 and ask("new") == (48, text) == ask("new", n=3)
        counter = 'deltacome_cached_prompt_tokens_total{tenant="new"}'
        assert metric(address, counter) == 96 and metric(address, "deltacome_prefix_cache_tokens") >= 48
        cold, other = ask("b")
        assert cold == 0 and other != text
        inside = {**load, "lora_path": "b", "load_inplace": True}
        assert post_json(address, "/v1/load_lora_adapter", inside)[0] == 200
        assert ask("new") == (0, other) and ask("new") == (48, other)
        messages: list[Any] = [{"role": "user", "content": "Hello there, whoever you are"}]
        for cached in (False, True):
            parts = list(
                api.chat.completions.create(
                    model="a", messages=messages, max_tokens=2, stream=True, stream_options={"include_usage": True}
                )
            )
            usage = parts[-1].usage
            assert usage and usage.prompt_tokens_details
            assert bool(usage.prompt_tokens_details.cached_tokens) == cached
    with serving(make_app(folder, limits=Limits(prefixes=0))) as address:
        body = {"model": "a", "prompt": ids, "max_tokens": 1}
        details = [post_json(address, "/v1/completions", body)[1]["usage"]["prompt_tokens_details"] for _ in range(2)]
        assert details == [{"cached_tokens": 0}] * 2
