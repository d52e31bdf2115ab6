"""`python -m deltacome.cli`."""

from deltacome.cli import main

main()
