"""Two checkpoints of one training run, for a delta on a delta: the zoo's `shell` for two epochs.

    python two_checkpoints.py FOLDER [--zoo FOLDER]

Writes `earlier`, after three quarters of the steps, and `last`; needs `deltacome[zoo]`, and makes the member if the zoo
has none yet.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltacome.benchmark.zoo import training
from deltacome.benchmark.zoo.cache import checkpoints
from deltacome.benchmark.zoo.members import MEMBERS

MEMBER = "shell"
EARLIER = 3 / 4  # of the steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--zoo", type=Path)
    arguments = parser.parse_args()
    cache, folders = checkpoints([MEMBER], arguments.zoo)
    base = cache / MEMBERS[MEMBER].base
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()

    def save(name: str) -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(arguments.folder / name)
        tokenizer.save_pretrained(arguments.folder / name)

    @contextmanager
    def saving_bar(description: str, total: int) -> Iterator[Callable[[float], None]]:
        """In the place of the bar that training moves on at each step."""
        done = 0

        def advance(_: float) -> None:
            nonlocal done
            done += 1
            print(f"\r{description}: step {done} of {total}", end="", flush=True)
            if done == int(EARLIER * total):
                save("earlier")

        yield advance
        print()

    with patch.object(training, "bar", saving_bar):
        training.fine_tune(model, tokenizer, folders[MEMBER] / "data" / "train.jsonl", learning_rate=5e-5, epochs=2)
    save("last")


if __name__ == "__main__":
    main()
