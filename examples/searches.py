"""Greedy and genetic search for a precision plan, and what the plans found are worth on held-out data.

    python searches.py BASE FINETUNED train.jsonl test.jsonl --offtask text.jsonl --ratio 32 -o OUTPUT

Both look at the first lines of train.jsonl, and of the texts; the other texts are for measuring. What OUTPUT has of a
search that was killed is taken up. The default method of deltacome, which needs no search, is measured beside them.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

import deltacome
from deltacome.benchmark.results import Table, save
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.compression.precision import TRIPLE
from deltacome.data import read_examples
from deltacome.evaluate.comparison import Comparison
from deltacome.evaluate.metrics import ANSWER_PATTERN, compile_pattern
from deltacome.evaluate.summary import import_pyplot
from deltacome.format.artifact import Artifact
from deltacome.restore.merging import load_merged
from deltacome.search.precision_search import search

EXAMPLES, TEXTS = 8, 4  # that a candidate is measured on
COLUMNS = {
    "name": "found by",
    "plan": "plan",
    "tried": "plans tried",
    "seconds": "seconds",
    "kl": "KL, searched on",
    "bytes": "bytes",
    "on_task_kl": "on-task KL, held out",
    "off_task_kl": "off-task KL, held out",
    "accuracy": "accuracy",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "finetuned", "train", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--offtask", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=32)
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--chat-template")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)

    lines = arguments.train.read_text().splitlines()[:EXAMPLES]
    (out / "searched.jsonl").write_text("\n".join(lines + arguments.offtask.read_text().splitlines()[:TEXTS]) + "\n")
    rows, courses = [], {}
    for strategy in ("greedy", "genetic"):
        started = time.perf_counter()
        found = search(
            arguments.base,
            arguments.finetuned,
            out / "searched.jsonl",
            out / f"{strategy}-candidates.json",
            ratio=arguments.ratio,
            strategy=strategy,
            chat_template=arguments.chat_template,
            generations=arguments.generations,
            population=arguments.population,
        )
        taken = out / f"{strategy}-seconds.json"  # of the run that made the candidates
        if not taken.exists():
            taken.write_text(json.dumps(round(time.perf_counter() - started)))
        tried = list(found["candidates"].values())
        courses[strategy] = [one.get("kl") for one in tried]
        if not rows:
            rows.append({"name": "nobody: the paper's plan", "plan": TRIPLE, "kl": round(tried[0]["kl"], 5)})
        rows.append(
            {"name": strategy, "plan": found["plan"], "tried": len(tried), "kl": round(found["kl"], 5)}
            | {"seconds": json.loads(taken.read_text())}
        )
    rows.append({"name": "rate-distortion"})

    comparison = Comparison(
        Checkpoint(arguments.finetuned),
        read_examples(arguments.test, arguments.limit),
        read_examples(arguments.offtask)[TEXTS:],
        new_tokens=64,
        chat_template=arguments.chat_template,
        pattern=compile_pattern(ANSWER_PATTERN),
    )
    for row in rows:
        place = out / "delta"
        shutil.rmtree(place, ignore_errors=True)
        options = {"method": "delta-come", "precision": row["plan"]} if "plan" in row else {}
        deltacome.compress(arguments.base, arguments.finetuned, place, ratio=arguments.ratio, **options)
        artifact = Artifact(place)
        row |= {
            "bytes": artifact.bytes,
            **comparison.measure(row["name"], *load_merged(Checkpoint(arguments.base), artifact)),
        }
        row.pop("outputs", None)

    figure, axes = import_pyplot().subplots(figsize=(6.4, 3.8), layout="constrained")
    for (strategy, course), style in zip(courses.items(), ("o-", "s--"), strict=True):
        known = [kl for kl in course if kl is not None]
        least = [min(known[: place + 1]) for place in range(len(known))]
        axes.step(range(1, len(least) + 1), least, style, where="post", markersize=3, label=strategy)
    axes.axhline(rows[0]["kl"], color="0.4", linestyle=":", label="the paper's plan")
    axes.set(xlabel="plans tried", ylabel="least KL so far, nats a token", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    table = Table(
        f"{arguments.finetuned.name}, 1/{arguments.ratio:g}, {EXAMPLES} examples and {TEXTS} texts", COLUMNS, rows
    )
    save(out, "searches", [table], figure)
    print(table.markdown())


if __name__ == "__main__":
    main()
