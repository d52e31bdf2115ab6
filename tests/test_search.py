import json
import math
import time
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from filelock import FileLock

from commands import run, start
from conftest import Save, make_model
from deltacome import DeltacomeError, compress
from deltacome.compression.precision import TRIPLE, PrecisionPlan
from deltacome.outputs import work_folder
from deltacome.search.precision_search import search
from deltacome.search.strategies import BITS, COUNTS, crossover, genetic, greedy, insert, mutate

PLANTED = "8:4,4:16,2:*"


class Recorder:
    """Measures by a function of the plan's text and keeps the losses of each stage."""

    def __init__(self, loss) -> None:
        self.loss, self.stages = loss, {}

    def __call__(self, stage: str, plans: list[PrecisionPlan]) -> list[float]:
        for plan in plans:
            check_valid(plan)
        self.stages[stage] = {str(plan): self.loss(str(plan)) for plan in plans}
        assert len(self.stages[stage]) == len(plans)
        return list(self.stages[stage].values())

    def best(self, stage: str) -> str:
        return min(self.stages[stage], key=self.stages[stage].get)


def distance(text: str) -> float:
    """From the planted plan: by how many doublings the counts differ, and whether the rest does."""
    counts, wanted = (dict(PrecisionPlan.parse(plan).parts) for plan in (text, PLANTED))
    off = sum(abs(math.log2(1 + (counts.get(bits) or 0)) - math.log2(1 + (wanted.get(bits) or 0))) for bits in BITS)
    return off + 10 * (text[-3:] != PLANTED[-3:])


def check_valid(plan: PrecisionPlan) -> None:
    assert PrecisionPlan.parse(str(plan)) == plan and plan.spends_a_budget
    bits = [bits for bits, _ in plan.parts]
    assert bits == sorted(set(bits), reverse=True) and set(bits) <= set(BITS)
    assert all(count in COUNTS for _, count in plan.parts[:-1])


def test_greedy_finds_the_planted_plan() -> None:
    recorder = Recorder(distance)
    greedy(recorder)
    assert [recorder.best(stage) for stage in recorder.stages] == ["2:*", "4:16,2:*", PLANTED]
    assert [len(plans) for plans in recorder.stages.values()] == [5, 4 * len(COUNTS), 3 * len(COUNTS)]


def test_greedy_may_add_a_lower_bit_width_and_passes_by_what_is_infeasible() -> None:
    losses = {"3:*": 3.0, "8:2,3:*": 2.0, TRIPLE: 1.0}
    recorder = Recorder(lambda plan: losses.get(plan, math.inf))
    greedy(recorder)
    assert [recorder.best(stage) for stage in recorder.stages] == list(losses)


@pytest.mark.parametrize(
    ("plan", "bits", "count", "longer"),
    [
        ("2:*", 8, 2, "8:2,2:*"),
        ("8:2,2:*", 3, 32, "8:2,3:32,2:*"),
        ("8:2,3:*", 2, 32, "8:2,3:32,2:*"),
        ("3:32,2:*", 8, 2, "8:2,3:32,2:*"),
    ],
)
def test_insert(plan: str, bits: int, count: int, longer: str) -> None:
    assert str(insert(PrecisionPlan.parse(plan), bits, count)) == longer


def test_genetic_improves_and_keeps_its_better_half() -> None:
    for seed in range(5):
        recorder = Recorder(distance)
        genetic(recorder, generations=8, population=16, seed=seed)
        stages = list(recorder.stages.values())
        assert list(recorder.stages) == [f"generation {i}" for i in range(1, 9)] and TRIPLE in stages[0]
        assert min(stages[-1].values()) < min(stages[0].values())
        for before, after in pairwise(stages):
            assert set(sorted(before, key=before.get)[:8]) <= set(after)
        assert len(set().union(*stages)) == 16 + 7 * 8  # no plan is tried twice


def test_genetic_depends_on_the_seed_alone() -> None:
    runs = [Recorder(distance) for _ in range(3)]
    for recorder, seed in zip(runs, (0, 0, 1), strict=True):
        genetic(recorder, generations=4, population=7, seed=seed)
    assert runs[0].stages == runs[1].stages != runs[2].stages


def test_mutations_and_crossovers_are_plans() -> None:
    random = Random(0)
    plans = [PrecisionPlan.parse("1:*"), PrecisionPlan.parse(TRIPLE)]
    for _ in range(2000):
        mutated = mutate(random.choice(plans), random)
        child = crossover(random.choices(plans, k=2), random)
        check_valid(mutated), check_valid(child)
        plans = [*plans[-10:], mutated, child]
    assert all(mutate(plan, random) != plan for plan in plans)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plans that are really compressed, in order."""
    plans: list[str] = []

    def record(*arguments: object, precision: str, **options: object) -> dict:
        plans.append(precision)
        return compress(*arguments, precision=precision, **options)

    monkeypatch.setattr("deltacome.search.precision_search.compress", record)
    return plans


@pytest.mark.slow
def test_a_killed_search_goes_on(
    base: Path, finetuned: Path, examples: Path, tmp_path: Path, measured: list[str]
) -> None:
    out = tmp_path / "search.json"
    options = ("--ratio", "4", "--strategy", "genetic", "--generations", "2", "--population", "12")
    arguments = ("search", base, finetuned, "--data", examples, *options, "-o", out)
    process = start(tmp_path.with_suffix(".log"), *arguments)
    deadline = time.monotonic() + 60
    while (not out.exists() or len(json.loads(out.read_text())["candidates"]) < 2) and time.monotonic() < deadline:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    before = json.loads(out.read_text())["candidates"]
    (work_folder(out) / "delta").mkdir(exist_ok=True)  # as a kill between compressing and measuring leaves it
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    report, stored = json.loads(result.stdout), json.loads(out.read_text())
    assert 2 <= len(before) < len(report["candidates"]) == 18
    assert list(report["candidates"].items())[: len(before)] == list(before.items())
    assert measured == list(report["candidates"])[len(before) :]  # only the rest
    measured.clear()
    assert report["candidates"] == stored["candidates"] and report["plan"] == stored["plan"]
    assert report["kl"] == min(c["kl"] for c in report["candidates"].values()) > 0 and report["kl_error"] > 0
    assert all(c["artifact_ratio"] > 4 * 0.99 for c in report["candidates"].values())
    assert "generation 2" in result.stderr and "±" in result.stderr and "compressing" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]

    again = search(base, finetuned, examples, out, ratio=4, strategy="genetic", generations=2, population=12)
    assert again == report and measured == []


def test_strategies_share_their_results(
    base: Path, finetuned: Path, examples: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltacome.search.strategies.COUNTS", (2, 32))
    out, stages = tmp_path / "search.json", []
    options = {"ratio": 4, "generations": 1, "population": 6, "on_stage": lambda *stage: stages.append(stage)}
    search(base, finetuned, examples, out, strategy="genetic", **options)
    assert len(measured) == 6 and [name for name, _ in stages] == ["default", "generation 1"]
    kls = [candidate["kl"] for candidate in stages[1][1].values()]
    assert kls == sorted(kls)
    report = search(base, finetuned, examples, out, **options)
    assert len(measured) == len(set(measured)) == len(report["candidates"])
    assert [name for name, _ in stages[2:]] == ["default", "single", "double", "triple"]


def test_the_loss_is_that_of_the_evaluation(base: Path, finetuned: Path, examples: Path, tmp_path: Path) -> None:
    from deltacome.evaluate.comparison import evaluate

    options = {"strategy": "genetic", "generations": 1, "population": 2, "chat_template": "none", "examples": 3}
    report = search(base, finetuned, examples, tmp_path / "search.json", ratio=4, **options)
    compress(base, finetuned, tmp_path / "delta", ratio=4, precision=report["plan"])
    deltas = {"d": tmp_path / "delta"}
    row = evaluate(base, finetuned, deltas, examples, limit=3, chat_template="none", new_tokens=1)[2]
    assert report["kl"] == pytest.approx(row["on_task_kl"], rel=1e-4)
    assert report["kl_error"] == pytest.approx(row["on_task_kl_error"], rel=1e-4)


def test_infeasible_plans_are_recorded(
    base: Path, finetuned: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan without `*` fixes its size; no strategy has one, and it misses the ratio as others may by their scales."""
    losses: list[float] = []
    fixed = [PrecisionPlan.parse("8:20"), PrecisionPlan.parse("2:*")]
    monkeypatch.setattr(
        "deltacome.search.precision_search.greedy", lambda measure: losses.extend(measure("fixed", fixed))
    )
    report = search(base, finetuned, examples, tmp_path / "search.json", ratio=8)
    assert losses[0] == math.inf > losses[1] and "8 cannot be reached" in report["candidates"]["8:20"]["infeasible"]
    with pytest.raises(DeltacomeError, match="no plan will do: a ratio of 5000 cannot be reached"):
        search(base, finetuned, examples, tmp_path / "other.json", ratio=5000)


def test_outputs_of_other_jobs_are_refused_and_kept(
    base: Path, finetuned: Path, examples: Path, tmp_path: Path
) -> None:
    out = tmp_path / "search.json"
    options = {"ratio": 4, "strategy": "genetic", "generations": 1, "population": 2}
    search(base, finetuned, examples, out, **options)
    content = out.read_bytes()
    for changed, message in (
        ({"ratio": 5}, "with other ratio; remove it"),
        ({"chat_template": "none"}, "with other data"),
        ({"examples": 2, "ratio": 5}, "with other ratio and data"),
    ):
        with pytest.raises(DeltacomeError, match=message):
            search(base, finetuned, examples, out, **options | changed)
    assert out.read_bytes() == content
    for text in ("{", "[]", '{"job": 1}'):
        out.write_text(text)
        with pytest.raises(DeltacomeError, match="no result of a search"):
            search(base, finetuned, examples, out, **options)
        assert out.read_text() == text
    out.unlink()
    work_folder(out).mkdir()
    with FileLock(work_folder(out) / "lock"), pytest.raises(DeltacomeError, match="another process is writing"):
        search(base, finetuned, examples, out, **options)


def test_bad_input_ends_the_search(save: Save, base: Path, finetuned: Path, examples: Path, tmp_path: Path) -> None:
    def refused(message: str, *inputs: object, out: Path = tmp_path / "search.json", **options: object) -> None:
        with pytest.raises(DeltacomeError, match=message):
            search(*inputs, out, **options)

    refused("there is no folder", tmp_path / "none", finetuned, examples)
    refused("there is no file", base, finetuned, tmp_path / "none.jsonl")
    refused("is this the right base", save(make_model(hidden_size=30)), finetuned, examples)
    refused("is the same model", base, base, examples, ratio=4)
    refused("means nothing", base, finetuned, examples, ratio=-1)
    refused("no strategy", base, finetuned, examples, strategy="luck")
    refused("at most 5000 plans", base, finetuned, examples, generations=1000, population=1000)
    refused("no folder .*; create it first", base, finetuned, examples, out=tmp_path / "no" / "search.json")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(
    base: Path, finetuned: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltacome.search.precision_search.write_atomically", full)
    with pytest.raises(DeltacomeError, match="the disk is full"):
        search(base, finetuned, examples, tmp_path / "search.json", ratio=4)
    assert not list(tmp_path.iterdir())
