"""The suite file of `benchmark quality`: what is compared. It is checked in full before any long work."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltacome.compression.methods import make_method
from deltacome.data import NO_TEMPLATE, read_examples
from deltacome.errors import DeltacomeError
from deltacome.evaluate.comparison import BASE, FINETUNED
from deltacome.evaluate.metrics import ANSWER_PATTERN, compile_pattern

SUITE_KEYS: dict[str, type] = {"base": str, "finetunes": dict, "methods": dict, "ratios": list}
SUITE_OPTIONS: dict[str, type] = {"chat_template": str, "offtask": str, "other_prompts": int}
FINETUNE_KEYS: dict[str, type] = {"model": str, "data": str}
FINETUNE_OPTIONS: dict[str, type] = {"new_tokens": int, "answer_pattern": str, "calibration": str}
NOT_SETTINGS = {"base", "finetuned", "out", "ratio", "calibration", "chat_template", "warn"}  # the suite has them


@dataclass(frozen=True)
class Finetune:
    """A fine-tuned model, its held-out data, how it is asked, and what its deltas may be calibrated on."""

    name: str
    model: str
    data: Path
    new_tokens: int
    pattern: re.Pattern[str]
    calibration: Path | None


@dataclass(frozen=True)
class Candidate:
    """One way to compress.

    options: keyword arguments of `compress`, `method` among them. calibrate: whether on the fine-tune's calibration
    data. spends_a_budget: whether it is run at each ratio, or once.
    """

    name: str
    options: dict[str, Any]
    calibrate: bool
    spends_a_budget: bool


@dataclass(frozen=True)
class Suite:
    """All that is compared.

    chat_template: a file, or `none`, or None for the tokenizers' own. other_prompts: how many prompts of each other
    fine-tune are used, None for all.
    """

    base: str
    finetunes: list[Finetune]
    candidates: list[Candidate]
    ratios: list[float]
    chat_template: str | None
    offtask: Path | None
    other_prompts: int | None


def read_suite(path: str | Path) -> Suite:
    """Read a suite and check its keys, methods, patterns and data files. Its paths are relative to its own folder.

    Raises:
        DeltacomeError: naming the first thing that is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise DeltacomeError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DeltacomeError(f"{path} is not valid JSON: {error}") from error
    _check_keys(content, SUITE_KEYS, SUITE_OPTIONS, str(path))
    folder = path.absolute().parent
    candidates = [_candidate(name, fields, f"{path}, method {name}") for name, fields in content["methods"].items()]
    calibrated = next((candidate.name for candidate in candidates if candidate.calibrate), None)
    finetunes = []
    for name, fields in content["finetunes"].items():
        finetunes.append(_finetune(name, fields, folder, f"{path}, fine-tune {name}"))
        if calibrated is not None and finetunes[-1].calibration is None:
            raise DeltacomeError(f"{path}: fine-tune {name} has no `calibration`, which method {calibrated} asks for")
    for ratio in content["ratios"]:
        if type(ratio) not in (int, float) or not 0 < ratio < math.inf:
            raise DeltacomeError(f"{path}: a ratio of {ratio!r} means nothing; give a number above 1, such as 16")
    for kind in ("finetunes", "methods"):
        _check_names(list(content[kind]), f"{path}: `{kind}`")
    _check_names([f"{ratio:g}" for ratio in content["ratios"]], f"{path}: `ratios`")
    offtask = _data(folder, content["offtask"]) if "offtask" in content else None
    other_prompts = content.get("other_prompts")
    if other_prompts is not None and other_prompts < 1:
        raise DeltacomeError(f"{path}: `other_prompts` must be a number from 1 on")
    return Suite(
        _source(folder, content["base"]),
        finetunes,
        candidates,
        content["ratios"],
        _template(folder, content),
        offtask,
        other_prompts,
    )


def file_name(name: str) -> str:
    """What the files of a fine-tune or method are called."""
    return re.sub(r"[^\w-]+", "-", name)


def _finetune(name: str, fields: Any, folder: Path, where: str) -> Finetune:
    _check_keys(fields, FINETUNE_KEYS, FINETUNE_OPTIONS, where)
    new_tokens = fields.get("new_tokens", 64)
    if new_tokens < 1:
        raise DeltacomeError(f"{where}: `new_tokens` of {new_tokens} leave no room for an answer")
    pattern = compile_pattern(fields.get("answer_pattern", ANSWER_PATTERN))
    calibration = _data(folder, fields["calibration"]) if "calibration" in fields else None
    return Finetune(
        name, _source(folder, fields["model"]), _data(folder, fields["data"]), new_tokens, pattern, calibration
    )


def _candidate(name: str, fields: Any, where: str) -> Candidate:
    if not isinstance(fields, dict) or not isinstance(fields.get("method"), str):
        raise DeltacomeError(f"{where}: needs an object with the text `method`")
    options = dict(fields)
    calibrate = options.pop("calibrate", False)
    for key in sorted(options.keys() & NOT_SETTINGS):
        raise DeltacomeError(f"{where}: `{key}` is no setting of a method; the suite has its own place for it")
    if not isinstance(calibrate, bool):
        raise DeltacomeError(f"{where}: `calibrate` must be true or false")
    if options.get("embeddings", "compress") not in ("compress", "exact"):
        raise DeltacomeError(f"{where}: `embeddings` must be compress or exact")
    count = options.get("calibration_examples", 1)
    if type(count) is not int or count < 1:
        raise DeltacomeError(f"{where}: `calibration_examples` must be a number from 1 on")
    settings = {key: value for key, value in options.items() if key not in ("embeddings", "calibration_examples")}
    try:
        method = make_method(settings.pop("method"), **settings)
    except (DeltacomeError, TypeError, ValueError, AttributeError) as error:  # the latter: a number for a text
        raise DeltacomeError(f"{where}: {error}") from error
    if method.needs_calibration and not calibrate:
        raise DeltacomeError(f'{where}: needs data with these settings; add "calibrate": true')
    return Candidate(name, options, calibrate, method.spends_a_budget)


def _check_keys(content: Any, keys: dict[str, type], options: dict[str, type], where: str) -> None:
    """An object has all of the keys, none besides the options, and values of their types."""
    if not isinstance(content, dict):
        raise DeltacomeError(f"{where}: not a JSON object")
    for key, value in content.items():
        kind = keys.get(key) or options.get(key)
        if kind is None:
            raise DeltacomeError(f"{where}: there is no key `{key}`; the keys are {', '.join([*keys, *options])}")
        if type(value) is not kind:
            what = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}[kind]
            raise DeltacomeError(f"{where}: `{key}` must be {what}")
    for key in keys:
        if key not in content:
            raise DeltacomeError(f"{where}: `{key}` is missing")


def _check_names(names: list[str], where: str) -> None:
    """There are names, and each gives files of its own, which are not those of the base and the fine-tuned model."""
    if not names:
        raise DeltacomeError(f"{where} is empty")
    seen = {BASE: BASE, FINETUNED: FINETUNED}
    for name in names:
        file = file_name(name).strip("-").casefold()
        if not file or file in seen:
            what = f"is like {seen[file]!r}" if file else "has no letters"
            raise DeltacomeError(f"{where}: {name!r} {what}; give each a name of its own")
        seen[file] = name


def _source(folder: Path, text: str) -> str:
    """A checkpoint's folder, or else what may be a hub id."""
    local = folder / text
    return text if text.count("/") == 1 and not local.is_dir() else str(local)


def _data(folder: Path, text: str) -> Path:
    """A file of examples, every line of it looked at."""
    read_examples(folder / text)
    return folder / text


def _template(folder: Path, content: dict[str, Any]) -> str | None:
    text: str | None = content.get("chat_template")
    if text is None or text == NO_TEMPLATE:
        return text
    if not (folder / text).is_file():
        raise DeltacomeError(f"there is no file {folder / text}; give a Jinja template or 'none'")
    return str(folder / text)
