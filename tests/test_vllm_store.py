"""Where vLLM's server finds deltas: in a store, and by vLLM's own resolvers; skipped where it is not installed."""

import hashlib
import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")

from openai import APIStatusError, NotFoundError, OpenAI

from conftest import Save
from deltacome.format.manifest import MODEL_CARD
from deltacome.store.store import Store
from vllm_models import Models, make, make_adapter, make_delta, make_prompts, vllm_server


def check(client: OpenAI, models: Models, name: str, like: str) -> None:
    """A model of the server answers as one of transformers."""
    prompt = make_prompts(1, seed=4)[0]
    found = client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0, logprobs=1)
    with torch.no_grad():
        own = models.models[like].generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = own.sequences[0, len(prompt) :].tolist()
    expected = [float(step.float().log_softmax(-1)[0, t]) for step, t in zip(own.logits, tokens, strict=True)]
    assert found.choices[0].logprobs.token_logprobs == pytest.approx(expected, abs=2e-3)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for. repositories: their folders by name."""

    repositories: dict[str, Path]

    def do_HEAD(self) -> None:
        self._answer(*self._find())

    def do_GET(self) -> None:
        self._answer(*self._find())

    def _find(self) -> tuple[bytes | None, dict[str, str]]:
        path = self.path.partition("?")[0].strip("/")
        for name, folder in self.repositories.items():
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            about = {"id": name, "sha": "a" * 40, "siblings": [{"rfilename": each} for each in names]}
            if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                return json.dumps(about).encode(), {}
            if path.startswith(f"api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": each, "size": (folder / each).stat().st_size, "oid": "b" * 40}
                    for each in names
                ]
                return json.dumps(tree).encode(), {}
            _, _, file = path.removeprefix(f"{name}/resolve/").partition("/")
            if path.startswith(f"{name}/resolve/") and file in names:
                content = (folder / file).read_bytes()
                return content, {"ETag": hashlib.sha256(content).hexdigest(), "X-Repo-Commit": "a" * 40}
        return None, {}

    def _answer(self, content: bytes | None, headers: dict[str, str]) -> None:
        self.send_response(404 if content is None else 200)
        for name, value in {**headers, "Content-Length": str(len(content or b""))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


def test_where_the_server_finds_deltas(save: Save, tmp_path: Path) -> None:
    """In a store, and by vLLM's own resolvers in their folder and on the Hub, which take deltas and adapters."""
    models = Models(save, tmp_path, "llama", {}, tie_word_embeddings=True)
    store = Store(str(tmp_path / "store"))
    stable, _ = store.push(models.deltas["a"], "math")
    store.tag("math", "stable")
    store.push(models.deltas["b"], "math")
    (models.deltas["a"] / MODEL_CARD).write_text("By hand.")
    store.push(models.deltas["a"], "broken")
    content = store.entry(store.look().find("broken")).folders[0][MODEL_CARD]
    foreign = make("llama", seed=7)
    store.push(make_delta(save, save(foreign, "foreign", torch.float32), foreign, 3, tmp_path / "foreign"), "foreign")
    folder, repository = tmp_path / "folder", tmp_path / "repository"
    shutil.copytree(models.deltas["a"], folder / "local")
    adapter = make_adapter(models, folder / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(models.base)}))
    shutil.copytree(models.deltas["b"], repository / "deltas/b")
    shutil.copytree(models.deltas["a"], tmp_path / "outside")
    Hub.repositories = {"some/deltas": repository, "some/delta": models.deltas["a"]}
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever).start()
    environment = {
        **os.environ,
        "DELTACOME_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(folder),
        "VLLM_LORA_RESOLVER_HF_REPO_LIST": "some/deltas,some/delta",
        "VLLM_PLUGINS": "deltacome,lora_filesystem_resolver,lora_hf_hub_resolver",
    }
    options = ["--store", store.address, "--name", "base", "--max-length", "128", "--dtype", "float32"]
    try:
        with vllm_server(models.base, options, environment, tmp_path / "log") as client:
            assert {model.id for model in client.models.list()} == {"base"}
            for name, like in (
                ("math", "b"),
                ("math:stable", "a"),
                (str(stable), "a"),
                ("local", "a"),
                ("adapter", "peft"),
                ("some/deltas/deltas/b", "b"),
                ("some/delta", "a"),
            ):
                check(client, models, name, like)
            (tmp_path / "store" / content.path).write_bytes(b"damaged")
            for name in (
                "nothing",
                "foreign",
                "math:nothing",
                "../outside",
                str(tmp_path / "outside"),
                "some/deltas/none",
            ):
                with pytest.raises(NotFoundError):
                    check(client, models, name, "a")
            with pytest.raises(APIStatusError, match="broken cannot be fetched from the store") as error:
                check(client, models, "broken", "a")
            assert error.value.status_code == 503
            store.push(models.deltas["b"], "later")
            time.sleep(2.1)  # it has just looked
            check(client, models, "later", "b")
            locks = list((tmp_path / "cache/deltas").glob("*.lock"))
            assert len(locks) == 3  # `math` twice, and what was tried of `broken`
    finally:
        hub.shutdown()
        hub.server_close()
    assert "is damaged (its SHA-256 differs)" in (tmp_path / "log").read_text()
