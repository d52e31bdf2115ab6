"""The command line. Heavy imports are inside the commands, so that help comes at once."""

import os
import signal
import sys
from typing import Any

GOES_ON = (
    "compress",
    "merge",
    "export",
    "search",
    "benchmark quality",
    "store pull",
)  # after an interruption, by the same command


class _Stop:
    """What Ctrl-C and SIGTERM do: end the command with all that it cleans up, and at the second time on the spot.

    number: of the signal that came, 0 if none has.
    """

    number = 0

    def __call__(self, number: int, _: Any) -> None:
        if self.number:
            self.end()
        self.number = number
        raise KeyboardInterrupt

    def end(self) -> None:
        """End this process at once: what is finished is on disk."""
        self.say()
        os._exit(128 + self.number)

    def say(self) -> None:
        """Say in one sentence what has happened."""
        command = " ".join(sys.argv[1:])
        goes_on = command.startswith(GOES_ON)
        sentence = "interrupted; the same command goes on where it stopped" if goes_on else "interrupted"
        os.write(2, f"{sentence}\n".encode())

    def unraisable(self, unraisable: Any) -> None:
        """In the place of `sys.unraisablehook`: an interruption that something swallows is one all the same."""
        if self.number and unraisable.exc_type is KeyboardInterrupt:
            self.end()
        sys.__unraisablehook__(unraisable)


def main() -> None:
    """Run the command line; every foreseen error is one sentence and exit status 1."""
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.unraisablehook = stop.unraisable
    try:
        from deltacome.cli.commands import app

        app()
    except BaseException as error:
        if isinstance(error, SystemExit) and not (stop.number and error.code):
            raise
        if stop.number:  # it comes out of libraries as whatever they make of it
            stop.say()
            sys.exit(128 + stop.number)
        message = _message(error)
        if message is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # nothing is left to do, nor to say


def _message(error: BaseException) -> str | None:
    """The sentence for an error that was foreseen, None for any other."""
    from deltacome.errors import DeltacomeError

    if isinstance(error, DeltacomeError):
        return str(error)
    if isinstance(error, MemoryError | RuntimeError):
        from deltacome.memory import is_out_of_memory

        if is_out_of_memory(error):
            return "out of memory; close other programs or use a machine with more"
    return None
