"""The package's version, by itself so that everything may read it."""

__version__ = "0.1.0"
