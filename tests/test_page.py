"""The page at `/`, in a real browser."""

import asyncio
import json
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from conftest import Save, fine_tune, make_model
from deltacome import compress
from deltacome.serve.http.keys import Keys
from deltacome.serve.server import build
from serving import serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = playwright.expect
CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MOST = 12  # tokens of an answer
Open = Callable[..., Any]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium in PATH")


def slowly(app: FastAPI) -> Any:
    """The application, each part of whose answers takes a while, so that one can be stopped."""

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        async def send_slowly(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and scope["path"].endswith("completions"):
                await asyncio.sleep(0.05)

        await app(scope, receive, send_slowly)

    return slow


def call(address: str, path: str, body: Any = None) -> Any:
    """What the API answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        content = response.read()
    return json.loads(content) if content.startswith(b"{") else content


def answer_of(address: str, model: str, prompt: str, talk: list[dict[str, str]]) -> str:
    """The whole answer, not streamed, which goes into the talk with its question."""
    talk.append({"role": "user", "content": prompt})
    body = {"model": model, "messages": talk, "temperature": 0, "max_tokens": MOST}
    talk.append(call(address, "chat/completions", body)["choices"][0]["message"])
    return talk[-1]["content"]


def ask(page: Any, prompt: str, *models: str) -> None:
    """Tick these models and send them the prompt."""
    for box in page.locator("#models input").all():
        box.set_checked(box.get_attribute("value") in models)
    page.get_by_label("Max tokens").fill(str(MOST))
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Send").click()


def card(page: Any, model: str) -> Any:
    return page.locator(".card").filter(has=page.get_by_role("heading", name=model))


@pytest.fixture(scope="module")
def delta(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deltas") / "math"
    compress(base, finetuned, folder, ratio=8)
    return folder


@pytest.fixture(scope="module")
def other(base: Path, save: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model(tie_word_embeddings=True)
    fine_tune(model, 2, size=0.4)
    compress(base, save(model), folder := tmp_path_factory.mktemp("deltas") / "other", ratio=8)
    return folder


@pytest.fixture(scope="module")
def address(base: Path, delta: Path, other: Path) -> Iterator[str]:
    with serving(build(base, {"math": delta, "other": other}, name="base")) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens the page of a server; fails if a script of the page's does."""
    failures: list[str] = []
    context = browser.new_context()

    def do(address: str, models: int | None = None) -> Any:
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address)
        if models is not None:
            expect(page.locator("#models li")).to_have_count(models)
        return page

    yield do
    context.close()
    assert not failures


def test_models_are_listed_with_their_sizes(address: str, visit: Open) -> None:
    page = visit(address, models=3)
    base, math, _ = call(address, "models")["data"]
    rows = page.locator("#models li")
    expect(rows.nth(0)).to_contain_text("base")
    expect(rows.nth(0)).to_contain_text(f"{base['bytes'] / 1000:.0f} kB")
    expect(rows.nth(1)).to_contain_text("math")
    expect(rows.nth(1)).to_contain_text(f"{math['bytes'] / 1000:.1f} kB of {math['full_bytes'] / 1000:.0f} kB")
    expect(rows.nth(1)).to_contain_text(f"1/{math['full_bytes'] / math['bytes']:.1f}")
    expect(rows.nth(1)).to_contain_text("in memory")
    expect(page.locator("header")).to_contain_text("Many fine-tunes of one base: base")
    expect(page.locator("#count")).to_have_text("2")
    expect(page.locator("#answers")).to_contain_text("No answers yet.")


def test_talks_show_what_the_api_answers(address: str, visit: Open) -> None:
    page = visit(address, models=3)
    models = ("base", "math", "other")
    talks: dict[str, list[dict[str, str]]] = {model: [] for model in models}
    prompts = ("What is 2 + 3?", "Naïve 🙂 <b>bold</b>")
    for turn, prompt in enumerate(prompts):
        ask(page, prompt, *models)
        for model in models:
            expect(card(page, model).locator("footer")).to_contain_text("first after", timeout=20_000)
            assert card(page, model).locator(".text").nth(turn).text_content() == answer_of(
                address, model, prompt, talks[model]
            )
            assert card(page, model).locator(".asked").all_text_contents() == list(prompts[: turn + 1])
        expect(page.locator(".card")).to_have_count(3)
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert talks["math"] != talks["base"] != talks["other"] != talks["math"]

    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#answers")).to_contain_text("No answers yet.")
    expect(page.get_by_label("Prompt")).to_be_focused()
    ask(page, prompts[0], "math")
    expect(card(page, "math").locator("footer")).to_contain_text("first after", timeout=20_000)
    assert card(page, "math").locator(".text").all_text_contents() == [talks["math"][1]["content"]]
    expect(page.locator(".card")).to_have_count(1)


def test_failed_turns_are_no_part_of_the_talk(address: str, visit: Open) -> None:
    page = visit(address, models=3)
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.post_data else None)
    ask(page, "Hello " * 1000, "math")
    expect(card(page, "math").locator(".bad")).to_contain_text("Error 400", timeout=20_000)
    ask(page, "Hello", "math")
    expect(card(page, "math").locator("footer")).to_contain_text("first after", timeout=20_000)
    expect(card(page, "math").locator(".bad")).to_be_hidden()
    assert [message["content"] for message in sent[-1]["messages"]] == ["Hello"]


def test_server_is_shown(base: Path, delta: Path, visit: Open) -> None:
    app = build(base, {"math": delta, "other": delta}, name="base", memory_limit=10**9)
    engine = app.state.service.engine
    step = engine.step
    engine.step = lambda: (time.sleep(0.1), step())  # so that answers take longer than the page takes to look
    with serving(app) as address:
        page = visit(address, models=3)
        server = page.get_by_role("region", name="Server")
        bytes = sum(delta.loaded.bytes for delta in app.state.service.registry.deltas.values())
        expect(page.locator("#memory")).to_have_text(f"{bytes / 1000:.1f} kB of 1.0 GB")
        expect(page.locator("#running")).to_have_text("0")
        rows = page.locator("#models li")
        expect(rows.filter(has_text="math")).to_contain_text(f"in memory, {bytes / 2000:.1f} kB")
        page.get_by_label("Max tokens").fill("200")
        page.get_by_label("Prompt").fill("Hello")
        page.get_by_role("button", name="Send").click()
        expect(server.locator("#running")).to_have_text("3", timeout=15_000)
        expect(server.locator("#waiting")).to_have_text("0")
        page.get_by_role("button", name="Stop").click()


def test_deltas_are_loaded_and_unloaded(base: Path, delta: Path, tmp_path: Path, visit: Open) -> None:
    shutil.copytree(delta, tmp_path / ".kept")  # not by itself
    with serving(build(base, {}, name="base", folder=tmp_path)) as address:
        page = visit(address, models=1)
        page.get_by_text("Load a delta").click()
        folder, name = page.get_by_label("Folder"), page.get_by_label("Name")
        changed = page.locator("#changed")
        folder.fill("nothing")
        name.fill('a "b" \\ ü')
        page.get_by_role("button", name="Load", exact=True).click()
        expect(changed).to_have_text("Error 400: there is no such folder in the server's --delta-dir")
        folder.fill(".kept")
        folder.press("Enter")
        expect(changed).to_have_text('Success: a "b" \\ ü is loaded.', timeout=15_000)
        expect(folder).to_have_value("")
        row = page.locator("#models li").nth(1)
        expect(row).to_contain_text("in memory, ")
        expect(page.locator("#models li").nth(0).get_by_role("button")).to_have_count(0)
        row.get_by_role("button", name='Unload a "b" \\ ü').focus()
        page.keyboard.press("Enter")
        expect(changed).to_have_text('Success: a "b" \\ ü is unloaded.')
        expect(page.locator("#models li")).to_have_count(1)
        expect(page.get_by_role("heading", name="Models")).to_be_focused()
        assert [model["id"] for model in call(address, "models")["data"]] == ["base"]


def test_key_for_some_models_shows_those_alone(base: Path, delta: Path, tmp_path: Path, visit: Open) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"customer": ["math"]}))
    app = build(base, {"math": delta, "other": delta}, name="base", keys=Keys("secret", file))
    with serving(app) as address:
        page = visit(address)
        page.get_by_label("API key").fill("secret")
        expect(page.locator("#models li")).to_have_count(3)
        expect(page.get_by_role("region", name="Server")).to_be_visible()
        page.get_by_label("API key").fill("customer")
        expect(page.locator("#models li")).to_have_count(1)
        expect(page.get_by_role("region", name="Server")).to_be_hidden()
        expect(page.get_by_text("Load a delta")).to_be_hidden()
        expect(page.get_by_role("button", name="Unload")).to_have_count(0)
        assert "other" not in page.locator("body").inner_text()
        ask(page, "Hello", "math")
        expect(card(page, "math").locator("footer")).to_contain_text("first after", timeout=20_000)


def test_ctrl_enter_sends_to_what_is_ticked(address: str, visit: Open) -> None:
    page = visit(address, models=3)
    page.get_by_role("checkbox", name="base").uncheck()
    page.get_by_role("checkbox", name="math").uncheck()
    page.get_by_role("checkbox", name="other").uncheck()
    page.get_by_label("Prompt").fill("Hello")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text("Tick at least one model.")
    page.get_by_role("checkbox", name="math").check()
    page.get_by_label("Max tokens").fill("3")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("1 answer in", timeout=20_000)
    expect(page.locator(".card h2 .name")).to_have_text(["math"])


def test_errors_are_told_in_words(address: str, visit: Open) -> None:
    page = visit(address, models=3)
    models = call(address, "models")
    models["data"].append({**models["data"][1], "id": "ghost"})  # as one that was removed since
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    expect(page.locator("#models li")).to_have_count(4, timeout=10_000)
    ask(page, "Hello", "base", "ghost")
    expect(card(page, "ghost").locator(".bad")).to_have_text(
        "Error 404: the model 'ghost' does not exist or is not yours", timeout=20_000
    )
    expect(card(page, "base").locator("footer")).to_contain_text("token", timeout=20_000)
    expect(card(page, "base").locator(".bad")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text("1 of 2 answers failed")

    page.get_by_label("Prompt").fill("Hello " * 1000)
    page.get_by_role("button", name="Send").click()
    expect(card(page, "base").locator(".bad")).to_contain_text("Error 400: this model has room for", timeout=20_000)


def test_stream_that_fails_keeps_its_text_and_says_why(address: str, visit: Open) -> None:
    page = visit(address, models=3)
    markup = "<img src=x onerror=alert(1)> <b>bold</b>"
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": markup}}]})
    error = json.dumps({"error": {"message": "the request took too long", "type": "server_error"}})
    for end, told in (
        (f"data: {error}\n\ndata: [DONE]\n\n", "Error: the request took too long"),
        ("", "The connection ended before the answer did."),
    ):
        answer = partial(playwright.Route.fulfill, body=f"data: {chunk}\n\n{end}", content_type="text/event-stream")
        page.route("**/v1/chat/completions", lambda route, _, answer=answer: answer(route))
        ask(page, "Hello", "math")
        expect(card(page, "math").locator(".bad")).to_have_text(told)
        assert card(page, "math").locator(".text").last.text_content() == markup
        assert page.locator(".card img, .card b").count() == 0


def test_key_is_asked_for_and_kept(base: Path, delta: Path, visit: Open) -> None:
    with serving(build(base, {"math": delta}, name="base", keys=Keys("secret", None))) as address:
        page = visit(address)
        notice, key = page.locator("#notice"), page.get_by_label("API key")
        expect(notice).to_have_text("This server needs an API key. Enter it under the prompt.")
        key.fill("wrong")
        expect(notice).to_have_text("This API key is not valid.")
        key.fill("secret")
        expect(page.locator("#models li")).to_have_count(2)
        expect(notice).to_be_hidden()
        page.reload()
        expect(page.locator("#models li")).to_have_count(2)
        ask(page, "Hello", "math")
        expect(card(page, "math").locator("footer")).to_contain_text("token", timeout=20_000)
        page.route("**/v1/models", lambda _: None)  # so that the page does not notice before it sends
        key.fill("wrong")
        page.get_by_role("button", name="Send").click()
        expect(card(page, "math").locator(".bad")).to_have_text("Error 401: no valid API key was given")
        page.unroute("**/v1/models")
        key.fill("wrong too")
        expect(page.locator("#models li")).to_have_count(0)


def test_tenants_come_and_go(base: Path, delta: Path, tmp_path: Path, visit: Open) -> None:
    with serving(build(base, {}, name="base", folder=tmp_path)) as address:
        page = visit(address, models=1)
        expect(page.locator("#notice")).to_contain_text("No tenants yet.")
        page.get_by_role("checkbox", name="base").uncheck()
        shutil.copytree(delta, tmp_path / "later")
        row = page.locator("#models li").filter(has_text="later")
        expect(row).to_contain_text("on disk", timeout=15_000)
        expect(page.get_by_role("checkbox", name="base")).not_to_be_checked()
        ask(page, "Hello", "later")
        expect(card(page, "later").locator("footer")).to_contain_text("token", timeout=20_000)
        expect(row).to_contain_text("in memory")
        shutil.rmtree(tmp_path / "later")
        expect(page.locator("#models li")).to_have_count(1, timeout=15_000)


def test_stop_ends_all_answers(base: Path, delta: Path, visit: Open) -> None:
    with serving(slowly(build(base, {"math": delta}, name="base"))) as address:
        page = visit(address, models=2)
        ask(page, "What is 2 + 3?", "base", "math")
        expect(card(page, "math").locator("footer")).to_have_text("Writing…", timeout=20_000)
        page.get_by_role("button", name="Stop").click()
        for model in ("base", "math"):
            expect(card(page, model).locator("footer")).to_contain_text("Stopped after")
            expect(card(page, model).locator(".bad")).to_be_hidden()
        expect(page.locator("#status")).to_have_text("Stopped.")
        ask(page, "What is 2 + 3?", "base", "math")
        for model in ("base", "math"):
            expect(card(page, model).locator("footer")).to_contain_text("first after", timeout=30_000)


def test_page_that_loses_its_server_says_so(base: Path, visit: Open) -> None:
    with serving(build(base, {}, name="base")) as address:
        page = visit(address, models=1)
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(card(page, "base").locator(".bad")).to_contain_text("The server cannot be reached")
    expect(page.locator("#notice")).to_contain_text("The server cannot be reached", timeout=10_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_narrow_screen(address: str, visit: Open, scheme: str) -> None:
    page = visit(address, models=3)
    page.set_viewport_size({"width": 400, "height": 800})
    page.emulate_media(color_scheme=scheme)
    ask(page, "What is 2 + 3?", "base", "math")
    expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    for width in (400, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        rows = page.locator("#models label")  # what is told of a model is beside its button, not below it
        assert rows.evaluate_all("rows => rows.every((row) => row.scrollWidth <= row.clientWidth)")
