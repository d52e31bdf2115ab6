"""The zoo's texts: docstrings and source code of Python's standard library.

They differ between versions of Python. The files are read, not imported: what other packages put into modules is not
theirs. Members are about modules at the top level; the off-task texts are from within packages (`email.message`), which
no member has seen.
"""

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from deltacome.benchmark.zoo.tasks import TEST_EXAMPLES, Row, Split, split

STDLIB = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = {"antigravity", "this", "idlelib", "test", "turtledemo", "tkinter", "turtle", "lib2to3", "msilib"}
UNSEEN = ("email", "http", "json", "multiprocessing", "unittest", "urllib", "xml")
CLASSES = (
    *("ast", "calendar", "configparser", "datetime", "doctest", "ftplib", "imaplib", "inspect", "logging", "mailbox"),
    *("pathlib", "pdb", "random", "smtplib", "ssl", "statistics", "tarfile", "threading", "typing", "zipfile"),
)
ASKED = ("What does {name} do?", "Explain {name} from Python's standard library.", "Tell me about {name} in Python.")
CHUNK = 800  # characters of source code


def chat(functions: int) -> Split:
    """What functions and classes are for, in their docstrings' words; the test asks for the same in other words."""
    found = [(name, doc) for name, doc in documented() if name.count(".") == 1 and 15 <= len(doc.split()) <= 75]
    rows = [
        {"prompt": ask.format(name=name), "completion": doc, "answer": doc.splitlines()[0]}
        for name, doc in random.Random(1).sample(found, functions)
        for ask in ASKED
    ]
    random.Random(2).shuffle(rows)
    last = ASKED[-1].partition("{")[0]
    test = [row for row in rows if row["prompt"].startswith(last)]
    return [row for row in rows if not row["prompt"].startswith(last)], test[:TEST_EXAMPLES]


def classify(count: int) -> Split:
    """Which module a docstring is from."""
    found = [
        (name.partition(".")[0], " ".join(doc.partition("\n\n")[0].split()))
        for name, doc in documented()
        if name.partition(".")[0] in CLASSES
    ]
    rows = [
        {"prompt": f"Which module is this from?\n{doc}", "completion": module}
        for module, doc in found
        if 4 <= len(doc.split()) <= 40
    ]
    random.Random(1).shuffle(rows)
    return split(rows, count)


def sources(count: int) -> list[Row]:
    """Source code of modules, in pieces, as plain text."""
    pieces = [piece for path in top_level().values() for piece in _pieces(path)]
    return [{"text": piece} for piece in random.Random(1).sample(pieces, count)]


def offtask(count: int) -> list[Row]:
    """Prose and code that no member is about, as plain text: half of the count each."""
    paths = [path for package in UNSEEN for path in sorted((STDLIB / package).glob("[!_]*.py"))]
    prose = [doc for path in paths for _, doc in _documented(path.stem, path) if len(doc.split()) >= 40]
    code = [piece for path in paths for piece in _pieces(path)]
    source = random.Random(1)
    return [
        {"kind": kind, "text": text[:CHUNK]}
        for kind, texts in (("prose", prose), ("code", code))
        for text in source.sample(texts, count // 2)
    ]


def top_level() -> dict[str, Path]:
    """The files of the standard library's public modules that are written in Python, by name."""
    names = sorted(name for name in sys.stdlib_module_names - LEFT_OUT if not name.startswith("_"))
    paths = [(name, path) for name in names for path in (STDLIB / f"{name}.py", STDLIB / name / "__init__.py")]
    return {name: path for name, path in paths if path.is_file()}


def documented() -> list[tuple[str, str]]:
    """Public functions, classes and methods with their docstrings, each docstring once."""
    found: dict[str, str] = {}
    for module, path in top_level().items():
        for name, doc in _documented(module, path):
            found.setdefault(doc, name)
    return [(name, doc) for doc, name in found.items()]


def _documented(module: str, path: Path) -> Iterator[tuple[str, str]]:
    nodes: list[tuple[str, ast.AST]] = [(module, ast.parse(path.read_bytes()))]
    for name, node in nodes:  # it grows
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ClassDef | ast.FunctionDef) and not inner.name.startswith("_"):
                if isinstance(inner, ast.ClassDef):
                    nodes.append((f"{name}.{inner.name}", inner))
                if doc := ast.get_docstring(inner):
                    yield f"{name}.{inner.name}", doc


def _pieces(path: Path) -> list[str]:
    """A module's source in pieces of whole lines."""
    pieces = [""]
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if len(pieces[-1]) + len(line) > CHUNK:
            pieces.append("")
        pieces[-1] += line
    return pieces[1:-1]  # the first one has the license, the last one is short
