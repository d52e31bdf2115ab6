"""The zoo's texts: docstrings and source code of Python's standard library.

They differ between versions of Python. Members are about modules at the top level; the off-task texts are from packages
within packages (`email.message`), which no member has seen.
"""

import importlib
import inspect
import pkgutil
import random
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from deltacome.benchmark.zoo.tasks import TEST_EXAMPLES, Row, Split, split

# Not everywhere, not to be imported without effect, or another module's again.
LEFT_OUT = {"antigravity", "this", "idlelib", "test", "turtledemo", "tkinter", "turtle", "lib2to3", "posix", "msilib"}
UNSEEN = ("email", "http", "json", "multiprocessing", "unittest", "urllib", "xml")
CLASSES = (
    *("ast", "calendar", "configparser", "datetime", "decimal", "ftplib", "imaplib", "inspect", "logging", "mailbox"),
    *("math", "pathlib", "pdb", "random", "smtplib", "ssl", "tarfile", "threading"),
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
    pieces = [piece for module in top_level() for piece in _pieces(module)]
    return [{"text": piece} for piece in random.Random(1).sample(pieces, count)]


def offtask(count: int) -> list[Row]:
    """Prose and code that no member is about, as plain text: half of the count each."""
    modules = [
        module
        for package in map(importlib.import_module, UNSEEN)
        for info in sorted(pkgutil.iter_modules(package.__path__, f"{package.__name__}."))
        if not info.name.endswith("__main__") and (module := _imported(info.name))
    ]
    prose = [doc for module in modules for _, doc in _documented(module) if len(doc.split()) >= 40]
    code = [piece for module in modules for piece in _pieces(module)]
    source = random.Random(1)
    return [
        {"kind": kind, "text": text[:CHUNK]}
        for kind, texts in (("prose", prose), ("code", code))
        for text in source.sample(texts, count // 2)
    ]


@cache
def top_level() -> list[ModuleType]:
    """The standard library's public modules that can be imported here."""
    names = sorted(name for name in sys.stdlib_module_names - LEFT_OUT if not name.startswith("_"))
    return [module for name in names if (module := _imported(name))]


def documented() -> list[tuple[str, str]]:
    """Public functions, classes and methods with their docstrings, each docstring once."""
    found: dict[str, str] = {}
    for module in top_level():
        for name, doc in _documented(module):
            found.setdefault(doc, name)
    return [(name, doc) for doc, name in found.items()]


def _imported(name: str) -> ModuleType | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(name)
    except ImportError:  # another platform's
        return None


def _documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    for name, item in sorted(vars(module).items()):
        if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
            continue
        items = [(f"{module.__name__}.{name}", item)]
        if inspect.isclass(item):
            items += [(f"{items[0][0]}.{key}", vars(item)[key]) for key in sorted(vars(item)) if key[0] != "_"]
        for full_name, one in items:
            if (inspect.isclass(one) or inspect.isroutine(one)) and isinstance(one.__doc__, str) and one.__doc__:
                yield full_name, inspect.cleandoc(one.__doc__)


def _pieces(module: ModuleType) -> list[str]:
    """A module's source in pieces of whole lines."""
    try:
        lines = inspect.getsource(module).splitlines(keepends=True)
    except (OSError, TypeError):  # built in
        return []
    pieces = [""]
    for line in lines:
        if len(pieces[-1]) + len(line) > CHUNK:
            pieces.append("")
        pieces[-1] += line
    return pieces[1:-1]  # the first one has the license, the last one is short
