"""Hub ids, from a cache on disk, and pushing, to a server on this machine that takes what huggingface_hub sends."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from conftest import Save, make_model
from deltacome import Artifact, DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint

TOKEN = "hf_secret"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put(cache: Path, repository: str, folder: Path) -> None:
    """Put a folder into the cache as huggingface_hub lays it out."""
    place = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)


def test_every_side_may_be_a_hub_id(base: Path, finetuned: Path, cache: Path, tmp_path: Path) -> None:
    put(cache, "some/base", base)
    put(cache, "some/tuned", finetuned)
    compress("some/base", "some/tuned", tmp_path / "delta", ratio=4)
    artifact = Artifact(tmp_path / "delta")
    assert artifact.base_name == "some/base" and artifact.manifest["finetuned"]["name"] == "some/tuned"
    put(cache, "some/delta", tmp_path / "delta")
    merge("some/base", "some/delta", tmp_path / "merged")
    assert Checkpoint(tmp_path / "merged").tensors.keys() == Checkpoint(finetuned).tensors.keys()
    for source in (Checkpoint, Artifact):
        with pytest.raises(DeltacomeError, match="there is no folder some/other, and the hub does not give it"):
            source("some/other")
        for name in ("/some/other", "runs/exp--3", "runs/..b", "runs/exp-", "some/other/third"):
            with pytest.raises(DeltacomeError, match=f"there is no folder {name}$"):
                source(name)
    snapshot = cache / "models--some--base" / "snapshots" / ("a" * 40)
    assert Checkpoint(snapshot).name == "some/base"
    (tmp_path / "link").symlink_to(snapshot)
    assert Checkpoint(tmp_path / "link").name == "some/base" and Checkpoint(base).name == base.name


def test_an_adapter_on_the_hub(save: Save, base: Path, cache: Path, tmp_path: Path) -> None:
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    put(cache, "some/adapter", tmp_path / "adapter")
    compress(base, "some/adapter", tmp_path / "delta", ratio=4)
    assert Artifact(tmp_path / "delta").manifest["finetuned"]["name"] == "some/adapter"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push asks for."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            name = json.loads(content)["name"]
            self._answer({"url": f"http://{self.headers['Host']}/someone/{name}", "name": f"someone/{name}"})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(content)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._answer({"files": modes})
        elif self.path == "/api/models/someone/delta/commit/main":
            for line in content.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    type(self).files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self._answer({"commitUrl": f"http://{self.headers['Host']}/someone/delta/commit/1", "commitOid": "1"})
        else:  # the check of the model card's header
            self._answer({"errors": [], "warnings": []})

    def _answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def push(hub: str, delta: Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "deltacome.cli", "push", str(delta), "someone/delta"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_push(hub: str, base: Path, finetuned: Path, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    compress(base, finetuned, delta, ratio=4)
    (delta / "notes.txt").write_text("not for others")
    done = push(hub, delta)
    assert done.returncode == 0 and done.stdout.strip() == f"{hub}/someone/delta/commit/1", done.stderr
    assert "which is no hub id; put it into" in done.stderr  # a folder of this machine
    assert Hub.files == {path.name: path.read_bytes() for path in delta.iterdir() if path.name != "notes.txt"}
    (tmp_path / "got").mkdir()
    for name, content in Hub.files.items():
        (tmp_path / "got" / name).write_bytes(content)
    Artifact(tmp_path / "got").check_digests()


def test_what_cannot_be_pushed(hub: str, base: Path, finetuned: Path, tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    compress(base, finetuned, delta, ratio=4)
    refused = push(hub, delta, token="hf_wrong")
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("error: someone/delta could not be")
    unreachable = push("http://127.0.0.1:1", delta)
    assert unreachable.returncode == 1 and "could not be pushed" in unreachable.stderr.splitlines()[-1]
    (delta / "delta.safetensors").write_bytes((delta / "delta.safetensors").read_bytes()[:-1])
    broken = push(hub, delta)
    assert broken.returncode == 1 and "broken artifact" in broken.stderr.splitlines()[-1]
    assert Hub.files == {} and "Traceback" not in refused.stderr + unreachable.stderr + broken.stderr
