"""What it would gain to fold the busiest tenant's delta into the base's weights, the others being corrected by it.

    python hottest_merged.py --shape 135m

Random weights and deltas at 1/16. Of a batch some rows are the busiest tenant's, the others each another's. As it is,
every row has its delta on the base. Folded, the busiest tenant's rows are the base's, and each of the others has two
deltas, its own and the busiest one's taken off. Times are medians of a decoding step, and of reading a prompt of the
busiest tenant or of another; "gain" is the median of each round's own ratio.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from deltacome.benchmark.random_model import random_model, random_tenant, shared_with_tenants
from deltacome.benchmark.runtime import decoding_step
from deltacome.benchmark.timing import measure
from deltacome.evaluate.comparison import markdown_table
from deltacome.runtime.tenant import Tenant

SHARES = (1.0, 0.9, 0.7, 0.5)
ROUNDS = 9
PROMPT = 128  # tokens


def corrected(own: Tenant, hottest: Tenant) -> Tenant:
    """A tenant with the codes of two: for its time, whatever the sign."""
    changes = {}
    for name, change in own.changes.items():
        other = hottest.changes[name]
        changes[name] = replace(change, packed=change.packed + other.packed, vectors=change.vectors + other.vectors)
    return replace(own, changes=changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    model = shared_with_tenants(random_model(arguments.shape, arguments.layers, torch.device("cpu")))
    hottest, *others = (random_tenant(f"tenant{i}", model, 16, i) for i in range(max(arguments.rows) + 1))
    for tenant in (hottest, *others):
        model.tenants.put(tenant)
    pairs = [corrected(own, hottest) for own in others]
    lines = [["rows", "of the busiest", "as they are, ms", "folded, ms", "gain"], ["---"] * 5]

    def compare(rows: str, count: int, as_they_are: Callable[[], Any], folded: Callable[[], Any]) -> None:
        seconds = measure({"as they are": as_they_are, "folded": folded}, ROUNDS, lambda _: None)
        gains = [before / after for before, after in zip(*seconds.values(), strict=True)]
        times = [f"{1e3 * statistics.median(own):.1f}" for own in seconds.values()]
        lines.append([rows, str(count), *times, f"{statistics.median(gains):.2f}"])

    for rows in arguments.rows:
        for count in sorted({round(share * rows) for share in SHARES} - {0}, reverse=True):
            batches = [hottest] * count + others[: rows - count], [None] * count + pairs[: rows - count]
            held = [model.tenants.batch_of(own) for own in batches]
            compare(str(rows), count, *(decoding_step(model, rows, tenants=own) for own in held))
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    for count, tenants in ((1, (hottest, None)), (0, (others[0], pairs[0]))):
        compare(f"{PROMPT} tokens", count, *(partial(model, ids, tenants=[own], logits_to_keep=1) for own in tenants))
    print(markdown_table(lines), end="")


if __name__ == "__main__":
    main()
