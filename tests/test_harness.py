"""lm-evaluation-harness with deltas, on task files and data of our own; there is no network."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex

from commands import run
from deltacome import DeltacomeError, compress, merge
from deltacome.evaluate import harness

TASK = Path(__file__).parent.parent / "examples" / "tasks" / "word_problems.yaml"
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["yes", "no", "perhaps not"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def place(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two deltas, and tasks with their data."""
    folder = tmp_path_factory.mktemp("harness")
    compress(base, finetuned, folder / "a", ratio=4)
    compress(base, finetuned, folder / "b", method="bitdelta")
    lines = [{"prompt": f"What is {i} + {i}?", "answer": str(i % 3)} for i in range(9)]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "choice.yaml").write_text(CHOICE.format(file=folder / "test.jsonl"))
    text = TASK.read_text().replace("test: test.jsonl", f"test: {folder / 'test.jsonl'}")
    (folder / "tasks" / "word_problems.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _indexed_once() -> Iterator[None]:
    """lm-eval's index of its thousands of tasks takes ten seconds each time."""
    build = functools.cache(TaskIndex.build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(lambda paths: dict(build(tuple(paths)))))
        yield


def test_a_delta_scores_as_its_merged_checkpoint(place: Path, base: Path, finetuned: Path, tmp_path: Path) -> None:

    deltas = {name: str(place / name) for name in ("a", "b")}
    tasks = ["choice", "word_problems"]
    rows = harness.evaluate_tasks(str(base), str(finetuned), deltas, tasks, include_path=place / "tasks", batch_size=4)
    assert list(dict.fromkeys(row["name"] for row in rows)) == ["base", "fine-tuned", "a", "b"]
    assert {row["task"] for row in rows} == set(tasks) and all(row["examples"] == 9 for row in rows)
    assert all(row["error"] is not None for row in rows if row["metric"] == "acc")
    manager = harness.TaskManager(include_path=str(place / "tasks"))
    ours = harness.DeltaModel(str(base), str(place / "a"), batch_size=2)
    merge(base, place / "a", tmp_path / "merged", dtype=torch.float32)
    theirs = HFLM(pretrained=str(tmp_path / "merged"), dtype="float32", device="cpu", batch_size=3)
    found, expected = (
        simple_evaluate(model=model, tasks=list(tasks), task_manager=manager)["samples"] for model in (ours, theirs)
    )
    for task in tasks:
        for one, other in zip(found[task], expected[task], strict=True):
            if task == "choice":  # log-likelihoods of all choices
                values, wanted = ([float(x[0]) for x in sample["filtered_resps"]] for sample in (one, other))
                assert values == pytest.approx(wanted, rel=1e-3, abs=1e-3)
            else:
                assert one["resps"] == other["resps"]


def test_evaluate_tasks_from_the_command_line(place: Path, base: Path, finetuned: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", base, "--finetuned", finetuned, "--delta", f"a={place / 'a'}", "--tasks", "choice"]
    arguments += ["--include-path", place / "tasks", "--limit", 4, "-o", tmp_path / "out.json", "--json"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows == json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in rows] == ["base", "fine-tuned", "a"] and rows[0]["examples"] == 4
    assert "| model | choice: acc |" in (tmp_path / "out.md").read_text()


def test_the_harness_itself_knows_the_model_type(place: Path, base: Path) -> None:
    model = f"base={base},delta={place / 'a'}"
    done = run("lm-eval", "run", "--model", "deltacome", "--model_args", model, "--tasks", "choice",
               "--include_path", place / "tasks", "--limit", 4, "--batch_size", 2, "--device", "cpu")  # fmt: skip
    assert done.returncode == 0 and "|choice|" in done.stdout.replace(" ", ""), done.stderr


def test_a_chat_template_of_ones_own(
    place: Path, base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "template.jinja").write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    prompts: list[str] = []
    apply = HFLM.apply_chat_template

    def spy(*given: Any, **more: Any) -> str:
        prompts.append(apply(*given, **more))
        return prompts[-1]

    monkeypatch.setattr(HFLM, "apply_chat_template", spy)
    deltas = {"a": str(place / "a")}
    options: dict[str, Any] = {"include_path": place / "tasks", "limit": 2, "apply_chat_template": True}
    for template in ("none", str(tmp_path / "template.jinja")):
        assert prompts == []
        harness.evaluate_tasks(str(base), str(finetuned), deltas, ["choice"], chat_template=template, **options)
    assert set(prompts) == {"<What is 0 + 0?>", "<What is 1 + 1?>"} and len(prompts) >= 6  # of three models


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["no_such_task"], "there is no task no_such_task"),
        (["humaneval"], "humaneval run code that models write; --allow-code"),
        (["paper-code"], "humaneval, mbpp run code"),
        (["gsm8k"], "the tasks gsm8k cannot be run"),  # its data are on the hub
    ],
)
def test_bad_tasks_are_one_sentence(
    tasks: list[str], message: str, place: Path, base: Path, finetuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DeltacomeError, match=message):
        harness.evaluate_tasks(str(base), str(finetuned), {"a": str(place / "a")}, tasks, include_path=place / "tasks")


def test_data_or_tasks(base: Path, finetuned: Path, place: Path) -> None:
    common = ["evaluate", base, "--finetuned", finetuned, "--delta", f"a={place / 'a'}"]
    for more in ([], ["--data", place / "test.jsonl", "--tasks", "choice"]):
        done = run(*common, *more)
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
            "error: give either --data FILE.jsonl or --tasks TASK,..."
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "choice", "--offtask", "text.jsonl"], "--offtask goes with --data; leave it out"),
        (["--data", "test.jsonl", "--apply-chat-template"], "--apply-chat-template goes with --tasks; leave it out"),
    ],
)
def test_options_of_the_other_kind(given: list[str], message: str, base: Path, finetuned: Path, place: Path) -> None:
    done = run("evaluate", base, "--finetuned", finetuned, "--delta", f"a={place / 'a'}", *given)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"error: {message}"
