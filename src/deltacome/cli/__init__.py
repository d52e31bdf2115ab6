"""The command line. Heavy imports are inside the commands, so that help comes at once."""

import signal
import sys
from typing import Any

from deltacome.cli import benchmarks, deltas, measuring, serving
from deltacome.cli.common import app
from deltacome.errors import DeltacomeError

COMMANDS = (deltas, measuring, serving, benchmarks)  # which add themselves to the application


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; every foreseen error is one sentence and exit status 1."""
    signal.signal(signal.SIGTERM, _interrupt)  # clean up as on Ctrl-C
    try:
        app()
    except DeltacomeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; close other programs or use a machine with more", file=sys.stderr)
        sys.exit(1)
