"""The examples in the documentation are run, as far as they can be here; links, names and messages must be there."""

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from conftest import Save, fine_tune, make_model, make_tokenizer
from deltacome import __version__, compress
from deltacome.cli.commands import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "deltacome"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROSE = {page: FENCE.sub("", text) for page, text in PAGES.items()}
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:.|\n(?!\n))+?)(?<!`)\1(?!`)")  # of code, in one paragraph
SPANS = [(page, " ".join(found[2].split())) for page, text in PROSE.items() for found in SPAN.finditer(text)]
BLOCKS = [(page, *block) for page, text in PAGES.items() for block in FENCE.findall(text)]
VLLM = "docs/vllm.md"  # most options there are vLLM's own; some elsewhere are those of other programs
OTHERS = {
    "--enforce-eager",
    "--help",
    "--install-completion",
    "--slow",
    "--constraint",
    "--enable-lora",
    "--enable-scale-out",
    "--lora-modules",
    "--max-loras",
    "--max-cpu-loras",
    "--tensor-parallel-size",
    "--build-arg",
    "--set",
}
# Blocks of Python that need what is not here. The others are run by the test below them.
COMPILED_ONLY = {"openai": "a server", "vllm": "vLLM", "BitsAndBytesConfig": "a base of some size, to be quantized"}


def command_lines(program: str) -> list[tuple[str, list[str]]]:
    """Arguments of each line of a page's blocks that begins with a program, shell variables put in."""
    found = []
    for page, language, block in BLOCKS:
        lines = "" if language in ("python", "json") else block.replace("\\\n", " ")
        for name, value in re.findall(r'^(\w+)="(.*)"', lines, re.MULTILINE):
            lines = lines.replace(f"${name}", value)
        for line in lines.splitlines():
            if line.startswith(program):
                words = shlex.split(line.removeprefix(program), comments=True)
                # "..." for more of the same is left out, unless it is an option's value.
                is_more = [word in ("...", "…") and not words[i - 1].startswith("-") for i, word in enumerate(words)]
                found.append((page, [word for word, more in zip(words, is_more, strict=True) if not more]))
    return found


@pytest.mark.parametrize(("page", "words"), command_lines("deltacome "), ids=str)
def test_commands_parse(page: str, words: list[str]) -> None:
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))  # raises on an unknown option, a wrong value, a missing argument


@pytest.mark.parametrize(("page", "words"), command_lines("python examples/"), ids=str)
def test_options_of_examples(page: str, words: list[str]) -> None:
    source = (ROOT / "examples" / words[0]).read_text()
    assert [word for word in words[1:] if re.match(r"--?[a-z]", word) and f'"{word}"' not in source] == []


def test_options_in_the_text() -> None:
    def options(command: Any) -> set[str]:
        parts = [options(part) for part in getattr(command, "commands", {}).values()]
        return {option for parameter in command.params for option in parameter.opts}.union(*parts)

    named = {option for page, span in SPANS for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span) if page != VLLM}
    assert named - options(typer.main.get_command(app)) <= OTHERS


def test_make_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = [span for _, span in SPANS] + [line for _, _, block in BLOCKS for line in block.splitlines()]
    named = {found[1] for line in code if (found := re.match(r"make ([\w-]+)", line))}
    assert named >= {"demo", "quick", "test", "test-all", "test-vllm", "docs"} and named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", SPAN.sub("", PROSE[page])):
        name, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        is_there = path.exists() and (not anchor or anchor in anchors(path.read_text()))
        wrong += [] if is_there or link.startswith("https://") else [link]
    paths = re.findall(r"\b(?:docs|examples|tests|src)/[\w./-]*\w\.\w+", PAGES[page])
    wrong += [path for path in paths if not (ROOT / path).exists() and "your_" not in path]
    assert wrong == []


@pytest.mark.parametrize("block", [block for _, language, block in BLOCKS if language == "python"])
def test_python(
    block: str, base: Path, finetuned: Path, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = compile(block, "block", "exec")
    for node in ast.walk(ast.parse(block)):
        match node:
            case ast.Import(names=names):
                assert all(importlib.import_module(n.name) for n in names if n.name.startswith("deltacome"))
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("deltacome"):
                assert all(hasattr(importlib.import_module(module), name.name) for name in names)
            case ast.Attribute(value=ast.Name(id="deltacome"), attr=attribute):
                assert hasattr(importlib.import_module("deltacome"), attribute)
    if any(word in block for word in COMPILED_ONLY):
        return
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(base)
    Path("finetuned").symlink_to(finetuned)
    for seed, name in enumerate(("math", "intent", "code"), 2):
        model = make_model(tie_word_embeddings=True)
        fine_tune(model, seed)
        compress("base", save(model), f"{name}-delta", ratio=4)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    exec(compiled, {"tokenizer": tokenizer, "inputs": {"input_ids": torch.full((2, 3), 5)}})


def test_files_agree_on_the_version() -> None:
    headings = re.findall(r"^## (.+)$", PAGES["CHANGELOG.md"], re.MULTILINE)
    newest = next(heading.split()[0] for heading in headings if heading != "Unreleased")
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited[1] == newest == __version__


def test_oldest_versions_are_those_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    allowed = [re.match(r"(\w+)>=([\d.]+)", item) for item in project["dependencies"]]
    lowest = {found[1]: found[2] for found in allowed if found}
    assert len(pins) == 2 and all(f"{version}.".startswith(f"{lowest[name]}.") for name, version in pins)


def test_files_are_short_and_in_the_site() -> None:
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    named = set(re.findall(r"^ +- .+: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == pages | {"commands.md"}  # which is made when the site is built
    assert [page for page, text in PAGES.items() if text.count("\n") > 400] == []


def test_every_room_is_in_the_house() -> None:
    house = PAGES["docs/architecture.md"].partition("## The house")[2].partition("\n## ")[0]
    listed = re.findall(r"`([\w/]+)`", " ".join(re.findall(r"^\| (`.+?`) \|", house, re.MULTILINE)))
    rooms = {f"{path.name}/" if path.is_dir() else path.stem for path in SOURCE.iterdir() if path.name[0] not in "_."}
    assert sorted(listed) == sorted(rooms - {"py"})


def test_quoted_messages_are_those_printed() -> None:
    trees = [ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")]
    printed = "\n".join(str(n.value) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Constant))
    # In the guide "…" stands for what differs from case to case.
    spans = [span for page, span in SPANS if page == "docs/guide.md" and ("…" in span or span.count(" ") > 4)]
    parts = [part.strip() for span in spans for part in re.sub("^(error|warning): ", "", span).split("…")]
    assert len(spans) > 25 and [part for part in parts if part not in printed] == []
