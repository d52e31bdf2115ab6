"""The command line, run in this process or in a fork: the imports of a new one take longer than most commands."""

import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from deltacome.cli import main

FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported everything
FORKS.set_forkserver_preload(
    [
        "deltacome.compression.pipeline",
        "deltacome.restore.exporting",
        "deltacome.search.precision_search",
        "deltacome.cli.commands",
        "accelerate",
        "torch._dynamo",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
    ]
)


def start(
    log: Path, *arguments: object, command: Callable[[], None] = main, prepare: Callable[[], None] | None = None
) -> BaseProcess:
    """`deltacome ARGUMENTS` in a process of its own.

    log: file that has what it prints. command: another main function. prepare: is called in the process before it.
    """
    process = FORKS.Process(target=_run, args=(log, list(map(str, arguments)), command, prepare), daemon=True)
    process.start()
    return process


def _run(log: Path, arguments: list[str], command: Callable[[], None], prepare: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if prepare is not None:
        prepare()
    sys.argv = ["deltacome", *arguments]
    command()


def run(*arguments: object, said: str = "") -> CompletedProcess[str]:
    """What `deltacome ARGUMENTS` prints, and its exit status. said: what it reads from standard input.

    An exception other than those that the command line foresees comes through.
    """
    words = list(map(str, arguments))
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # `main` replaces them
    try:
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            patch.object(sys, "argv", ["deltacome", *words]),
            patch.object(sys, "stdin", io.StringIO(said)),
            patch.object(sys, "unraisablehook", sys.unraisablehook),
        ):
            main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return CompletedProcess(words, status, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    """What is printed by a command that works."""
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(message: str, *arguments: object) -> None:
    """Exit status 1 and one line on standard error, progress bars aside, that has the message in it."""
    result = run(*arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
