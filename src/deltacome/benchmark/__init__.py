"""Whole comparisons, each by one command, which a kill does not lose."""
