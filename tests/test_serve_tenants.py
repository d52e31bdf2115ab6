"""Deltas of a server that come and go, its memory limit, and its keys."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import deltacome
from conftest import Save, fine_tune, make_model
from deltacome import DeltacomeError
from deltacome.serve.http.keys import Keys
from serving import CHAT, alone, client, make_app, metric, post_json, raw, serving, until

pytest_plugins = ["serving"]


def test_deltas_are_loaded_and_unloaded(folder: Path, merged: dict[str, tuple[Any, Any]]) -> None:
    with serving(make_app(folder, deltas={}, folder=folder / "deltas")) as address:
        api = client(address)

        def ask(name: str) -> str | None:
            answer = api.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=8)
            return answer.choices[0].message.content

        expected = {name: alone(merged, name, "Hello there", 8) for name in ("a", "b")}
        assert expected["a"] != expected["b"]
        assert ask("a") == expected["a"]  # found in the folder, loaded when asked for
        load: dict[str, Any] = {"lora_name": "new", "lora_path": "a"}
        assert post_json(address, "/v1/load_lora_adapter", load) == (200, "Success: new is loaded.")
        assert ask("new") == expected["a"]
        status, answer = post_json(address, "/v1/load_lora_adapter", {**load, "lora_path": "b"})
        assert status == 400 and "already" in answer["error"]["message"]
        running = api.chat.completions.create(model="new", messages=CHAT, temperature=0, max_tokens=8, stream=True)
        text = next(running).choices[0].delta.content or ""
        inside = {**load, "lora_path": str(folder / "deltas/b"), "load_inplace": True}
        assert post_json(address, "/v1/load_lora_adapter", inside)[0] == 200
        assert ask("new") == expected["b"]
        text += "".join(chunk.choices[0].delta.content or "" for chunk in running)
        assert text == expected["a"]  # what runs keeps what it began with
        assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
        assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 404
        with pytest.raises(openai.NotFoundError):
            ask("new")
        assert ask("b") == expected["b"]


@pytest.mark.parametrize("embeddings", ["compress", "exact"])
@pytest.mark.parametrize("size", [250, 262])
def test_tokens_that_a_tenant_has_not_are_refused(folder: Path, save: Save, embeddings: Any, size: int) -> None:
    """Its vocabulary may be smaller or larger than the base's, which has 259."""
    model = make_model(initializer_range=0.2)
    model.resize_token_embeddings(size, mean_resizing=False)
    fine_tune(model, size=0.2)
    name = f"{embeddings}-{size}"
    deltacome.compress(folder / "base", save(model, name), folder / name, ratio=4, embeddings=embeddings)
    with serving(make_app(folder, deltas={"a": folder / "deltas" / "a", "other": folder / name})) as address:
        for model_name, vocabulary in (("other", size), ("a", 259), ("base", 259)):
            for token, status in ((vocabulary - 1, 200), (vocabulary, 400)):
                body = {"model": model_name, "prompt": [5, token], "max_tokens": 1}
                found, answer = post_json(address, "/v1/completions", body)
                assert found == status, answer
        assert f"the prompt holds token {vocabulary}; this model has {vocabulary}" == answer["error"]["message"]


def test_a_bad_delta_does_not_keep_the_others_from_being_served(
    folder: Path, tmp_path: Path, merged: dict[str, tuple[Any, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither one that is not there, nor one whose fault shows when it is read; if there is no other, it is said."""
    broken = tmp_path / "broken"
    shutil.copytree(folder / "deltas" / "a", broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    odd = tmp_path / "Übung 1"
    shutil.copytree(folder / "deltas" / "b", odd)
    bad = {"none": tmp_path / "none", "broken": broken}
    with serving(make_app(folder, deltas={"a": folder / "deltas" / "a", **bad, odd.name: odd})) as address:
        api = client(address)
        assert [model.id for model in api.models.list()] == ["base", "a", "Übung 1"]
        for name, tenant in (("a", "a"), ("Übung 1", "b")):
            answer = api.chat.completions.create(model=name, messages=CHAT, temperature=0, max_tokens=8)
            assert answer.choices[0].message.content == alone(merged, tenant, "Hello there", 8)
        assert api.models.retrieve("Übung 1").id == "Übung 1"
    refused = [record.fields for record in caplog.records if record.message == "delta refused"]  # type: ignore[attr-defined]
    assert [fields["tenant"] for fields in refused] == ["none", "broken"]
    for name, path in bad.items():
        with pytest.raises(DeltacomeError, match=name):
            make_app(folder, deltas={name: path})
    for name in ("", " a", ".a", "a/b", "a\nb", "a" * 97):
        with pytest.raises(DeltacomeError, match="is no name for a model"):
            make_app(folder, deltas={name: odd})


def test_nothing_outside_the_folder_is_read(folder: Path, tmp_path: Path) -> None:
    deltas = tmp_path / "deltas"
    shutil.copytree(folder / "deltas", deltas)
    (deltas / "link").symlink_to(folder / "deltas" / "a")
    shutil.copytree(folder / "deltas" / "a", deltas / "broken")
    weights = next((deltas / "broken").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    paths = ["../base", "/", ".", "", "nothing", "link", "a\0b", "a" * 5000, str(folder / "deltas/a"), "broken"]
    names = ["../x", "x/y", "", "base", " a", "a\0", "x" * 97]
    with serving(make_app(folder, deltas={}, folder=deltas)) as address:
        for name, path in [*(("x", path) for path in paths), *((name, "a") for name in names)]:
            status, answer = post_json(address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
            assert status == 400 and answer["error"]["message"], (name, path)
        assert {model.id for model in client(address).models.list()} == {"base", "a", "b", "broken"}
        status, answer = post_json(address, "/v1/completions", {"model": "broken", "prompt": "x"})
        assert status == 500 and "files of broken are broken" in answer["error"]["message"]


def test_a_delta_that_cannot_be_served_is_refused_at_once(
    folder: Path, save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    tuned = make_model(initializer_range=0.2, rope_parameters=rope)
    fine_tune(tuned)
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    deltacome.compress(folder / "base", save(tuned, "turned"), deltas / "turned", ratio=8)
    with caplog.at_level("WARNING", "deltacome.serve"), serving(make_app(folder, deltas={}, folder=deltas)) as address:
        reasons = [getattr(record, "fields", {}).get("reason", "") for record in caplog.records]
        assert any("rope_theta is 500000.0" in reason for reason in reasons)
        assert [model.id for model in client(address).models.list()] == ["base"]
        status, answer = post_json(address, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "turned"})
        assert status == 400 and "rope_theta" in answer["error"]["message"]


def test_without_a_folder_nothing_can_be_loaded(address: str, folder: Path) -> None:
    content = {"lora_name": "x", "lora_path": str(folder / "deltas/a")}
    status, answer = post_json(address, "/v1/load_lora_adapter", content)
    assert status == 400 and "--delta-dir" in answer["error"]["message"]


def test_a_watched_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltacome.serve.http.app.WATCH_SECONDS", 0.05)
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    with serving(make_app(folder, deltas={}, folder=deltas)) as address:
        api = client(address)

        def names() -> set[str]:
            return {model.id for model in api.models.list()}

        def ask() -> str:
            return api.completions.create(model="it", prompt="Once", temperature=0, max_tokens=8).choices[0].text

        assert names() == {"base"}
        (deltas / "broken").mkdir()
        (deltas / "broken" / "deltacome.json").write_text("{}")
        shutil.copytree(folder / "deltas/a", tmp_path / "it")
        (tmp_path / "it").rename(deltas / "it")
        until(lambda: names() == {"base", "it"})
        first = ask()
        shutil.copytree(folder / "deltas/b", tmp_path / "it")
        (deltas / "it").rename(tmp_path / "old")
        (tmp_path / "it").rename(deltas / "it")
        until(lambda: not api.models.retrieve("it").loaded)
        assert ask() != first
        shutil.rmtree(deltas / "it")
        until(lambda: names() == {"base"})


@pytest.mark.usefixtures("slow_steps")
def test_memory_limit(folder: Path) -> None:
    size = deltacome.load(folder / "base", {"a": folder / "deltas/a"}).deltas["a"].bytes
    with serving(make_app(folder, deltas={}, folder=folder / "deltas", memory_limit=int(1.5 * size))) as address:
        api = client(address)

        def ask(name: str) -> str:
            return api.completions.create(model=name, prompt="Once", temperature=0, max_tokens=8).choices[0].text

        def loaded() -> set[str]:
            return {model.id for model in api.models.list() if model.loaded} - {"base"}

        first = ask("a")
        assert loaded() == {"a"}
        other = ask("b")
        assert loaded() == {"b"} and other != first
        assert ask("a") == first
        more: dict[str, Any] = {"ignore_eos": True}
        running = api.completions.create(model="a", prompt="x", max_tokens=450, stream=True, extra_body=more)
        next(iter(running))
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(ask, "b")  # until the running request lets go of "a"
            time.sleep(0.1)
            assert loaded() == {"a"} and not waiting.done()
            list(running)
            assert waiting.result() == other
        assert metric(address, 'deltacome_delta_evictions_total{tenant="a"}') == 2
        assert metric(address, 'deltacome_delta_bytes{tenant="a"}') == 0
    with serving(make_app(folder, deltas={}, folder=folder / "deltas", memory_limit=100)) as address:
        status, answer = post_json(address, "/v1/completions", {"model": "a", "prompt": "x"})
        assert status == 503 and "raise it" in answer["error"]["message"]


def test_keys(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"key-a": ["a"], "key-b": ["b", "base"]}))
    keys = Keys("master", file)
    with serving(make_app(folder, folder=folder / "deltas", keys=keys)) as address:
        for key, names in (("key-a", {"a"}), ("key-b", {"b", "base"}), ("master", {"base", "a", "b"})):
            api = client(address, key)
            assert {model.id for model in api.models.list()} == names
            for name in ("base", "a", "b"):
                if name in names:
                    api.completions.create(model=name, prompt="x", max_tokens=1)
                else:
                    with pytest.raises(openai.NotFoundError, match="does not exist or is not yours"):
                        api.completions.create(model=name, prompt="x", max_tokens=1)
                    with pytest.raises(openai.NotFoundError):
                        api.models.retrieve(name)
        for key in ("", "master2", "key-", "none"):
            with pytest.raises(openai.AuthenticationError):
                client(address, key or "x").models.list()
        load = {"lora_name": "new", "lora_path": "a"}
        assert post_json(address, "/v1/load_lora_adapter", load, "key-a")[0] == 403
        assert post_json(address, "/v1/unload_lora_adapter", {"lora_name": "b"}, "key-a")[0] == 403
        assert post_json(address, "/v1/load_lora_adapter", load, "nobody")[0] == 401
        assert post_json(address, "/v1/load_lora_adapter", load, "master")[0] == 200
        get = "GET {} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
        assert raw(address, get.format("/metrics").encode())[0] == 401
        assert raw(address, get.format("/health").encode())[0] == 200
        assert metric(address, 'deltacome_requests_total{status="ok",tenant="a"}', "master") == 2
        assert metric(address, 'deltacome_time_to_first_token_seconds_count{tenant="base"}', "master") == 2


def test_a_key_may_have_so_many_requests_at_once(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"few": {"models": ["a"], "max_parallel_requests": 2}, "many": ["a"]}))
    app = make_app(folder, keys=Keys("master", file))
    with serving(app) as address:
        few, many = client(address, "few"), client(address, "many")
        options: dict[str, Any] = {"model": "a", "prompt": "x", "seed": 1}
        running = [few.completions.create(max_tokens=450, stream=True, **options) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="this key may have 2 requests at once") as caught:
            few.completions.create(max_tokens=1, **options)
        assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "rate_limit_exceeded"
        many.completions.create(max_tokens=1, **options)
        assert few.models.list().data
        list(running[0])
        running[1].close()  # goes away
        until(lambda: app.state.service.keys.allowed("few").running == 0)
        for body in ({"model": "none"}, {"prompt": [999]}, {"prompt": "x" * 600}):  # refused ones count for nothing
            for _ in range(3):
                with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
                    few.completions.create(max_tokens=1, **{**options, **body})
        assert few.completions.create(max_tokens=1, **options).choices


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"k": "a"}',
        '{"": ["a"]}',
        '{"clé": ["a"]}',
        '{"k": [1]}',
        '{"k": {}}',
        '{"k": {"models": ["a"], "max_parallel_requests": 0}}',
        '{"k": {"models": ["a"], "rpm": 1}}',
    ],
)
def test_bad_key_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(DeltacomeError, match="keys"):
        Keys(None, file)
    with pytest.raises(DeltacomeError, match="cannot read"):
        Keys(None, tmp_path / "none.json")
