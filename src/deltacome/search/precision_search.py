"""The search for a precision plan on data: each is measured on the model rebuilt from an artifact of the same ratio.

The results are in a file from the first on, so that a killed search goes on and strategies share them.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.compression.budget import DEFAULT_RATIO, check_ratio
from deltacome.compression.pipeline import compress
from deltacome.compression.precision import TRIPLE, PrecisionPlan
from deltacome.data import Encoded, Encoder, read_examples
from deltacome.errors import DeltacomeError, UnreachableRatioError
from deltacome.evaluate.comparison import cut, load
from deltacome.evaluate.metrics import divergence
from deltacome.files import check_writable, disk_errors, write_atomically
from deltacome.outputs import WorkFolder
from deltacome.progress import bar, each
from deltacome.restore.merging import load_merged, open_checked
from deltacome.search.strategies import Measure, genetic, greedy
from deltacome.version import __version__

MOST_CANDIDATES = 5000  # of the genetic strategy; beyond them it runs out of plans

Candidates = dict[str, dict[str, Any]]


def search(
    base: str | Path,
    finetuned: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    ratio: float = DEFAULT_RATIO,
    strategy: Literal["greedy", "genetic"] = "greedy",
    examples: int = 64,
    chat_template: str | None = None,
    generations: int = 8,
    population: int = 16,
    seed: int = 0,
    on_stage: Callable[[str, Candidates], None] = lambda stage, candidates: None,
) -> dict[str, Any]:
    """Find the precision plan of method `delta-come` that comes nearest to the fine-tuned model on data.

    The loss is KL(fine-tuned || rebuilt) in nats a token, in float32, over completions and texts alike. KL on a task
    alone may prefer plans that do harm elsewhere, so the data should have unrelated text in it.

    Args:
        data: JSONL file of examples (see `deltacome.data.read_examples`).
        out: JSON file for the results. One that is there is gone on from, by whatever strategy, if its job is the same.
        ratio: of every candidate's artifact, see `deltacome.compress`.
        strategy: `greedy` or `genetic`, see `deltacome.search.strategies`; the default plan is tried first, to compare.
        examples: how many of the file's first lines are used.
        chat_template: Jinja file, or `none`, in place of the tokenizer's own.
        generations, population, seed: of the genetic strategy.
        on_stage: called after each stage with its name and its candidates, the best first.

    Returns:
        `plan`, the best of all in `out`, its `kl` and `kl_error`, `ratio`, and all `candidates` by plan: each with
        `kl`, `kl_error` and `artifact_ratio`, or with the reason why it is `infeasible`.

    Raises:
        DeltacomeError: on bad input, an output of another job, or if no plan reaches the ratio.
    """
    out = Path(out)
    check_ratio(ratio)
    run = _strategy(strategy, generations, population, seed)
    check_writable(out)
    checkpoints = Checkpoint(base), Checkpoint(finetuned)
    lines = read_examples(data, examples)
    reference, tokenizer = load(checkpoints[1], checkpoints[0])
    encoder = Encoder(tokenizer, chat_template)
    encoded = [cut(encoder.example(line)) for line in lines]
    job = {
        "version": __version__,
        "checkpoints": [checkpoint.stamp() for checkpoint in checkpoints],
        "ratio": ratio,
        "data": hashlib.sha256(json.dumps([[example.ids, example.start] for example in encoded]).encode()).hexdigest(),
    }
    with disk_errors(f"write {out}"):
        work = WorkFolder(out, job)
        with work.until_over():
            results = _Results(out, job)
            objective = partial(_divergence, *checkpoints, ratio, reference, encoded, work.path / "delta")
            measure = partial(_measure, results, objective, on_stage)
            measure("default", [PrecisionPlan.parse(TRIPLE)])
            run(measure)
    plan = results.best
    if plan is None:
        raise DeltacomeError(f"no plan will do: {results.candidates[TRIPLE]['infeasible']}")
    best = results.candidates[plan]
    return {
        "plan": plan,
        "kl": best["kl"],
        "kl_error": best["kl_error"],
        "ratio": ratio,
        "candidates": results.candidates,
    }


def cells(plan: str, result: dict[str, Any]) -> list[str]:
    """A candidate as text: plan, KL, artifact ratio."""
    if "infeasible" in result:
        return [plan, "infeasible", ""]
    return [plan, f"{result['kl']:.6f} ± {result['kl_error']:.6f}", f"1/{result['artifact_ratio']:.1f}"]


def _strategy(name: str, generations: int, population: int, seed: int) -> Callable[[Measure], None]:
    if generations < 1 or population < 2 or generations * population > MOST_CANDIDATES:
        raise DeltacomeError(
            f"{generations} generations of {population} plans cannot be made; take at least 1 of 2, and at most "
            f"{MOST_CANDIDATES} plans in all"
        )
    match name:
        case "greedy":
            return greedy
        case "genetic":
            return partial(genetic, generations=generations, population=population, seed=seed)
    raise DeltacomeError(f"there is no strategy {name!r}; choose greedy or genetic")


class _Results:
    """The candidates measured so far, in the order of measuring, and the file that has them.

    job: everything that they depend on besides the plan.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path, self.job = path, job
        self.candidates: Candidates = {}
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        match content:
            case {"job": dict(found), "candidates": dict(candidates)}:
                changed = [key for key in job if found.get(key) != job[key]]
                if changed:
                    raise DeltacomeError(
                        f"{path} is of a search with other {' and '.join(changed)}; remove it or choose another name"
                    )
                self.candidates = candidates
            case _:
                raise DeltacomeError(f"{path} is no result of a search; remove it or choose another name")

    def add(self, plan: str, result: dict[str, Any]) -> None:
        self.candidates[plan] = result
        content = {"job": self.job, "plan": self.best, "candidates": self.candidates}
        write_atomically(self.path, json.dumps(content, indent=1).encode() + b"\n")

    def loss(self, plan: str) -> float:
        """KL, or infinity where the plan is infeasible."""
        return self.candidates[plan].get("kl", math.inf)

    @property
    def best(self) -> str | None:
        """None where no plan is feasible."""
        plan = min(self.candidates, key=self.loss)
        return plan if self.loss(plan) < math.inf else None


def _measure(
    results: _Results,
    objective: Callable[[str], dict[str, Any]],
    on_stage: Callable[[str, Candidates], None],
    stage: str,
    plans: list[PrecisionPlan],
) -> list[float]:
    """The losses of a stage's plans; the objective is asked for those that are not in the results yet."""
    names = list(map(str, plans))
    with bar(stage, len(names)) as advance:
        for name in each(names, advance):
            if name not in results.candidates:
                results.add(name, objective(name))
    on_stage(stage, {name: results.candidates[name] for name in sorted(names, key=results.loss)})
    return [results.loss(name) for name in names]


def _divergence(
    base: Checkpoint,
    finetuned: Checkpoint,
    ratio: float,
    reference: Any,
    encoded: list[Encoded],
    delta: Path,
    plan: str,
) -> dict[str, Any]:
    """A candidate's result, from an artifact in the folder `delta` that is removed again."""
    shutil.rmtree(delta, ignore_errors=True)  # left by a kill
    try:
        report = compress(
            base.source, finetuned.source, delta, ratio=ratio, method="delta-come", precision=plan, warn=lambda _: None
        )
    except UnreachableRatioError as error:
        return {"infeasible": str(error)}
    model, _ = load_merged(base, open_checked(base, delta))
    shutil.rmtree(delta)
    kl, _ = divergence(reference, model, encoded, lambda _: None)
    return {"kl": kl.value, "kl_error": kl.error, "artifact_ratio": report["artifact_ratio"]}
