"""The application with all of its commands, which add themselves to it when their modules are imported."""

from deltacome.cli import benchmarks, deltas, measuring, serving, stores
from deltacome.cli.common import app

__all__ = ["app", "benchmarks", "deltas", "measuring", "serving", "stores"]
