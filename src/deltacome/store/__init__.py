"""Deltas under names and versions in one place that many machines reach, and what a machine has fetched of them."""
