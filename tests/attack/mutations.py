"""What may become of an artifact on its way, by accident or by intent: one change at a time, each by its seed.

An artifact is its files by name here. *Damage* leaves digests as they were; a *forgery* has right ones throughout.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from deltacome.format.manifest import DIGEST_START, MANIFEST, NO_DIGEST

WEIGHTS = "delta.safetensors"
Files = dict[str, bytes]
DEEP = json.loads("[" * 900 + "]" * 900)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 16, 2**31, 2**40, 2**60, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "BF16", "F64", "I32", "U8", "BOOL", "../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "x" * 100_000,
    [], {}, [[]], [0], [2**60, 2**60], [-1, 5], [1.5], [[8, 2]], [[1, 1]], [[8, 2**60]], [[16, 1]], [[True, True]],
    {"a": 1}, DEEP,
]  # fmt: skip
NAMES = [
    "../evil", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "delta.safetensors\0", "delta-2.safetensors",
    "delta-00002-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "adapter_config.json", "adapter_model.safetensors", MANIFEST, "README.md", "config.json", "x" * 300, "\u202e.json",
]  # fmt: skip


def bare(files: Files) -> dict[str, Any]:
    """The manifest without its digest."""
    manifest: dict[str, Any] = json.loads(files[MANIFEST])
    del manifest["sha256"]
    return manifest


def sign(files: Files, manifest: dict[str, Any] | bytes) -> None:
    """Give a forged manifest, an object or the text after its first brace, the right digests."""
    if isinstance(manifest, dict):
        listed = manifest.get("files")
        if isinstance(listed, dict):
            for name in listed.keys() & files.keys():
                listed[name] = hashlib.sha256(files[name]).hexdigest()
        manifest = json.dumps(manifest, separators=(",", ":")).encode()[1:]
    text = DIGEST_START + NO_DIGEST.encode() + b'",' + manifest
    files[MANIFEST] = text.replace(NO_DIGEST.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def any_file(files: Files, random: Random) -> str:
    """A file whose bytes are promised, weights and manifest more often than others."""
    return random.choice([WEIGHTS, MANIFEST, *(name for name in files if name != "README.md")])


# Damage.


def flip(files: Files, random: Random) -> None:
    name = any_file(files, random)
    changed = bytearray(files[name])
    head = random.random() < 0.3  # where headers are
    changed[random.randrange(min(len(changed), 300) if head else len(changed))] ^= 1 << random.randrange(8)
    files[name] = bytes(changed)


def truncate(files: Files, random: Random) -> None:
    name = any_file(files, random)
    files[name] = files[name][: random.randrange(len(files[name]))]


def extend(files: Files, random: Random) -> None:
    files[any_file(files, random)] += random.randbytes(random.choice([1, 8, 100, 4096]))


def blank(files: Files, random: Random) -> None:
    name = any_file(files, random)
    start = random.randrange(len(files[name]))
    content = bytearray(files[name])
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    files[name] = bytes(content)


def lose(files: Files, random: Random) -> None:
    del files[any_file(files, random)]


def swap_files(files: Files, random: Random) -> None:
    one, other = random.sample([name for name in files if name != "README.md"], 2)
    files[one], files[other] = files[other], files[one]


def swap_tensors(files: Files, random: Random) -> None:
    """Of one size, so that the header still fits."""
    header, data = header_of(files)
    places = [item["data_offsets"] for name, item in header.items() if name != "__metadata__"]
    one = random.choice(places)
    others = [place for place in places if place != one and place[1] - place[0] == one[1] - one[0]]
    if others:
        other = random.choice(others)
        changed = bytearray(data)
        changed[slice(*one)], changed[slice(*other)] = data[slice(*other)], data[slice(*one)]
        put_header(files, header, bytes(changed))


def edit_text(files: Files, random: Random) -> None:
    name = random.choice([name for name in files if name.endswith(".json")])
    content = json.loads(files[name])
    edit(content, random)
    files[name] = json.dumps(content, separators=(",", ":")).encode()


DAMAGE = [flip, flip, truncate, extend, blank, lose, swap_files, swap_tensors, edit_text]


# Forgeries.


def header_of(files: Files) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    return json.loads(files[WEIGHTS][8:end]), files[WEIGHTS][end:]


def put_header(files: Files, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    files[WEIGHTS] = len(text).to_bytes(8, "little") + text + data


def edit(content: Any, random: Random, depth: int = 0) -> None:
    """Change something somewhere in an object or list: a value, a key, an order."""
    if isinstance(content, dict) and content:
        key = random.choice(list(content))
        if isinstance(content[key], dict | list) and content[key] and random.random() < 0.8 and depth < 6:
            edit(content[key], random, depth + 1)
            return
        match random.randrange(6):
            case 0:
                del content[key]
            case 1:
                content[random.choice(["extra", "", "../x", f"{key}[0]", f"{key}[1]", "base", "sign"])] = content[key]
            case 2:
                other = random.choice(list(content))
                content[key], content[other] = content[other], content[key]
            case _:
                content[key] = random.choice(VALUES)
    elif isinstance(content, list) and content:
        place = random.randrange(len(content))
        match random.randrange(4):
            case 0:
                del content[place]
            case 1:
                content.append(random.choice(VALUES))
            case 2 if isinstance(content[place], int):
                content[place] += random.choice([-1, 1, 2**32, -(2**40)])
            case _:
                content[place] = random.choice(VALUES)


def forge_manifest(files: Files, random: Random) -> None:
    manifest = bare(files)
    edit(manifest, random)
    sign(files, manifest)


def forge_entry(files: Files, random: Random) -> None:
    manifest = bare(files)
    entry = random.choice(list(manifest["weights"].values()))
    key = random.choice(
        ["shape", "dtype", "base", "factored", "sketched", "rotated", "rows", "group_size", "sign", "dense", "error"]
    )
    entry[key] = random.choice(VALUES)
    sign(files, manifest)


def forge_names(files: Files, random: Random) -> None:
    """Names of weights changed, copied and exchanged."""
    manifest = bare(files)
    weights = manifest["weights"]
    one, other = random.sample(list(weights), 2)
    match random.randrange(4):
        case 0:
            weights[one], weights[other] = weights[other], weights[one]
        case 1:
            weights[one]["base"] = other
        case 2:
            weights[random.choice(["nowhere.weight", f"{one}[0]", "lm_head.weight", "x\0y"])] = weights.pop(one)
        case _:
            weights[other] = dict(weights[one])
    sign(files, manifest)


def forge_large(files: Files, random: Random) -> None:
    """Claims of weights that nobody could hold, which take no byte in the files."""
    manifest = bare(files)
    name = random.choice(list(manifest["weights"]))
    side = random.choice([2**20, 2**31, 2**40, 2**60, 2**62])
    shape = random.choice(
        [[side, side], [side], [side, 1], [1, side], [side, 0], [0, side], [2] * random.choice([40, 5000])]
    )
    entry: dict[str, Any] = {"shape": shape, "dtype": random.choice(["BF16", "F64", "U8"])}
    entry |= random.choice([{}, {"sign": True}, {"dense": 0}, {"factored": [[1, 1]]}, {"factored": [[8, side]]}])
    manifest["weights"][name] = entry
    sign(files, manifest)


def forge_files(files: Files, random: Random) -> None:
    """Names in the lists of files."""
    manifest = bare(files)
    name = random.choice(NAMES)
    content = random.choice([b"", b"{}", files[WEIGHTS]])
    if 0 < len(name) < 256 and "/" not in name and "\0" not in name and name not in (".", "..", *files):
        files[name] = content
    listed = random.choice(["files", "base_files"])
    manifest[listed][name] = hashlib.sha256(files.get(name, content)).hexdigest()
    sign(files, manifest)


def forge_text(files: Files, random: Random) -> None:
    """The manifest's text: keys twice, encodings, numbers, nesting."""
    text = files[MANIFEST][len(DIGEST_START) + 66 :]
    match random.randrange(6):
        case 0:
            text = b'"weights":{},' + text
        case 1:
            text = text[:-1] + b',"files":{}}'
        case 2:
            text = b'"extra":' + b"[" * 100_000 + b"]" * 100_000 + b"," + text
        case 3:
            text = (
                b'"extra":'
                + random.choice([b"NaN", b"-Infinity", b"1e999", b"9" * 6000, b"\xff", b'"\xed\xa0\x80"'])
                + b","
                + text
            )
        case 4:
            text = text.decode().encode(random.choice(["utf-16", "utf-32", "utf-8-sig"]))
        case _:
            text = text.replace(b'"shape":[', b'"shape":[1,' if random.random() < 0.5 else b'"shape":[1e2,', 1)
    sign(files, text)


def forge_header(files: Files, random: Random) -> None:
    """The header of the weights: offsets, dtypes, shapes, overlaps, sizes."""
    manifest = bare(files)
    header, data = header_of(files)
    name = random.choice([name for name in header if name != "__metadata__"])
    item, other = header[name], random.choice(list(header.values()))
    raw: bytes | None = None
    match random.randrange(9):
        case 0:
            item["data_offsets"] = [
                random.choice([0, -1, 2**63, 2**64, len(data)]),
                random.choice([0, len(data), 2**62]),
            ]
        case 1:
            item["data_offsets"] = other.get("data_offsets", [0, 0])
        case 2:
            item["dtype"] = random.choice(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F4", "", "F8_E4M3"])
        case 3:
            item["shape"] = random.choice([[], [0], [2**60], [2**32, 2**32], item["shape"][::-1], [1, *item["shape"]]])
        case 4:
            header[f"{name}.more"] = header.pop(name)
        case 5:
            del header[name]
        case 6:
            edit(header, random)
        case 7:
            raw = b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
        case _:
            pass
    put_header(files, header if raw is None else raw, data)
    if random.random() < 0.1:
        files[WEIGHTS] = random.choice([2**63, 2**40, 2**32, 0, 1]).to_bytes(8, "little") + files[WEIGHTS][8:]
    sign(files, manifest)


def forge_data(files: Files, random: Random) -> None:
    """Bits of codes, scales, bitmaps of rows and exact values."""
    manifest = bare(files)
    header, data = header_of(files)
    item = random.choice([item for name, item in header.items() if name != "__metadata__"])
    start, end = item["data_offsets"]
    if end > start:
        changed = bytearray(data)
        place = random.randrange(start, end)
        value = random.choice([b"\xff\x7f", b"\x80\x7f", b"\x80\xff", b"\0\0", b"\xff\xff", random.randbytes(2)])
        changed[place : place + 2] = value[: end - place]
        put_header(files, header, bytes(changed))
    sign(files, manifest)


def forge_settings(files: Files, random: Random) -> None:
    """What the artifact says of the model: config.json and its like."""
    manifest = bare(files)
    name = random.choice([name for name in files if name.endswith((".json", ".jinja")) and name != MANIFEST])
    if random.random() < 0.3 or name.endswith(".jinja"):
        files[name] = random.choice(
            [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"1", b'""']
        )
    else:
        try:
            content = json.loads(files[name])
        except (ValueError, RecursionError):  # forged already
            return
        edit(content, random)
        files[name] = json.dumps(content).encode()
    sign(files, manifest)


FORGERIES = [
    forge_manifest, forge_manifest, forge_entry, forge_entry, forge_names, forge_large, forge_files, forge_text,
    forge_header, forge_header, forge_data, forge_settings,
]  # fmt: skip


# What is no regular file.


def links(folder: Path, random: Random) -> bool:
    """Put something else in the place of a file; whether the artifact is still what it was."""
    name = random.choice([path.name for path in folder.iterdir() if path.name != "README.md"])
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    match random.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path)
        case 2:
            path.symlink_to(random.choice(["/dev/zero", "/nowhere", "..", "/proc/self/mem"]))
        case 3:
            os.mkfifo(path)
        case 4:
            path.symlink_to("/etc/passwd")
        case _:  # as the hub's cache has its files
            blob = folder.with_name(f"{folder.name}-blob")
            blob.write_bytes(content)
            path.symlink_to(blob)
            return True
    return False


def write(files: Files, folder: Path) -> None:
    """The files in a folder, which is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


Mutation = Callable[[Files, Random], None]
