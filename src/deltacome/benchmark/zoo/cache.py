"""The zoo's checkpoints and texts in a folder: what is missing is made, each thing in one step."""

import json
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from deltacome.benchmark.zoo import bases, library
from deltacome.benchmark.zoo.members import BASES, MEMBERS, SMOLLM2
from deltacome.benchmark.zoo.tasks import Row
from deltacome.errors import DeltacomeError
from deltacome.files import disk_errors, write_atomically
from deltacome.outputs import new_folder

# ChatML. SmolLM2's own template has a system message too, which is half of a short example's tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OFFTASK_TEXTS = 40
PACKAGES = {"gguf", "peft", "PIL", "reasoning_gym", "sklearn"}  # the extra `zoo`


def default_cache() -> Path:
    """Where the zoo is kept if nobody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltacome" / "zoo"


def checkpoints(members: Sequence[str], cache: str | Path | None) -> tuple[Path, dict[str, Path]]:
    """The cache, by default `default_cache`, and the folders of members by name, made where they are missing.

    Raises:
        DeltacomeError: on an unknown member, a missing package or a full disk.
    """
    for name in members:
        if name not in MEMBERS:
            raise DeltacomeError(f"the zoo has no member {name!r}; its members are {', '.join(MEMBERS)}")
    cache = default_cache() if cache is None else Path(cache)
    with disk_errors(f"write {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        return cache, {name: checkpoint(name, cache) for name in members}


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of a base or a member; what is missing is made, its base first.

    A member's folder has its examples in `data/train.jsonl` and `data/test.jsonl`.

    Raises:
        DeltacomeError: if a package is missing, or on a full disk.
    """
    path = cache / name
    if path.is_dir():
        return path
    _check_installed()
    if name == SMOLLM2:
        with new_folder(path) as folder:
            model, tokenizer = bases.smollm2()
            tokenizer.chat_template = CHAT_TEMPLATE
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    else:
        train(name, checkpoint((BASES | MEMBERS)[name].base, cache), path)
    return path


def train(name: str, base: Path, out: Path) -> None:
    """Make a member from its base's folder, on data of its own.

    Raises:
        DeltacomeError: if the output exists, or on a full disk.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    member = (BASES | MEMBERS)[name]
    torch.manual_seed(0)
    with new_folder(out) as folder:
        data = folder / "data"
        data.mkdir()
        learned, held_out = member.data()
        for split, rows in (("train", learned), ("test", held_out)):
            write_atomically(data / f"{split}.jsonl", lines(rows))
        if member.images is not None:
            member.images([*learned, *held_out], data)
        processor = member.processor(AutoTokenizer.from_pretrained(base, trust_remote_code=False))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).train()
        model = member.train(model, processor, data / "train.jsonl")
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)


def offtask(cache: Path, limit: int | None = None) -> Path:
    """The file of the texts that no member is about; with a limit, of so many at most, of all kinds."""
    path = cache / "offtask.jsonl"
    if not path.is_file():
        write_atomically(path, lines(library.offtask(OFFTASK_TEXTS)))
    if limit is None:
        return path
    texts = path.read_bytes().splitlines(keepends=True)
    fewer, content = cache / f"offtask-{limit}.jsonl", b"".join(texts[:: -(-len(texts) // limit)])
    if not fewer.is_file() or fewer.read_bytes() != content:
        write_atomically(fewer, content)
    return fewer


def lines(rows: Iterable[Row]) -> bytes:
    """Rows as a JSONL file has them."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _check_installed() -> None:
    if any(find_spec(name) is None for name in PACKAGES):
        raise DeltacomeError("the zoo's members are made with more packages; pip install 'deltacome[zoo]'")
