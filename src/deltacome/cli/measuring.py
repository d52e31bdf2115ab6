"""Commands that compare deltas with what they stand for."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltacome.cli.common import Base, Finetuned, Json, Template, app, named_folders, print_table, quiet
from deltacome.errors import DeltacomeError

# Options of `evaluate` that go with answers to --data, with --data, and with --tasks.
OF_ANSWERS = ("max_new_tokens", "answer_pattern", "show")
OF_DATA = ("offtask", "by_part", *OF_ANSWERS)
OF_TASKS = ("include_path", "apply_chat_template", "allow_code")
LESS = ("linear ratio", "method", "seconds", "NLL")  # headings that a narrow terminal does without


@app.command(epilog="Example: deltacome evaluate base/ --finetuned math/ --delta math=math-delta/ --data test.jsonl")
def evaluate(
    context: typer.Context,
    base: Base,
    finetuned: Annotated[str, typer.Option(help="Fine-tuned checkpoint: a folder or a hub id.")],
    delta: Annotated[list[str], typer.Option(metavar="[NAME=]DELTA", help="A compressed delta; may be repeated.")],
    data: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Held-out examples of the task.")] = None,
    offtask: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Text that the fine-tune is not about, for off-task KL.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first lines of --data, or of each task.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    chat_template: Template = None,
    answer_pattern: Annotated[
        str, typer.Option(help="Finds the answer in an output where lines of --data have `answer`.")
    ] = r"####\s*(\S+)",
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="Instead of --data: tasks of lm-eval, paper-math, -code or -chat."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Task files of your own.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts of --tasks go through the chat template.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let tasks run the code that models write; use a sandbox.")
    ] = False,
    by_part: Annotated[
        bool, typer.Option("--by-part", help="Instead: KL of each part of a delta in the exact fine-tuned model.")
    ] = False,
    show: Annotated[int, typer.Option(min=0, help="Print so many prompts with every model's answer.")] = 0,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="JSON file for the figures and answers; a Markdown table goes beside it."),
    ] = Path("evaluation.json"),
    as_json: Json = False,
) -> None:
    """Compare base, fine-tuned model and compressed deltas: KL, NLL, accuracy, retention; or tasks of lm-eval."""
    from deltacome.data import read_examples
    from deltacome.evaluate import comparison as evaluation
    from deltacome.files import check_writable, disk_errors

    quiet()
    deltas = named_folders(delta, (evaluation.BASE, evaluation.FINETUNED))
    check_writable(output)
    if (data is None) == (tasks is None):
        raise DeltacomeError("give either --data FILE.jsonl or --tasks TASK,...")
    if tasks is not None:
        _refuse_options(context, OF_DATA, "goes with --data")
    else:
        _refuse_options(context, OF_TASKS, "goes with --tasks")
    if tasks is not None:
        options = {
            "apply_chat_template": apply_chat_template,
            "chat_template": chat_template,
            "allow_code": allow_code,
            "limit": limit,
        }
        _evaluate_tasks(base, finetuned, deltas, tasks.split(","), output, as_json, include_path, options)
        return
    assert data is not None
    if by_part:
        _refuse_options(context, OF_ANSWERS, "goes with answers, and --by-part has none")
        of_data = {"offtask": offtask, "limit": limit, "chat_template": chat_template}
        _evaluate_parts(base, finetuned, deltas, data, output, as_json, of_data)
        return
    rows = evaluation.evaluate(
        base,
        finetuned,
        deltas,
        data,
        offtask=offtask,
        limit=limit,
        new_tokens=max_new_tokens,
        chat_template=chat_template,
        answer_pattern=answer_pattern,
    )
    with disk_errors(f"write {output}"):
        evaluation.save_table(rows, output)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    print_evaluation(rows)
    examples = [example for example in read_examples(data, limit) if example.messages]
    for number, example in enumerate(examples[:show]):
        print(f"\nprompt: {example.messages[-1]['content']}\nexpected: {example.completion!r}")
        for row in rows:
            print(f"{row['name']}: {row['outputs'][number]!r}")


def _refuse_options(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise DeltacomeError(f"--{name.replace('_', '-')} {why}; leave it out")


def print_evaluation(rows: list[dict[str, Any]]) -> None:
    """The table of `evaluate`; a narrow terminal does without some columns."""
    from deltacome.evaluate.comparison import COLUMNS, cells

    print_table(list(COLUMNS.values()), [cells(row) for row in rows], less=LESS)


def _evaluate_parts(
    base: str,
    finetuned: str,
    deltas: dict[str, str],
    data: Path,
    output: Path,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from deltacome.evaluate.comparison import cells, save_table
    from deltacome.evaluate.parts import COLUMNS, evaluate_parts
    from deltacome.files import disk_errors

    rows = evaluate_parts(base, finetuned, deltas, data, **options)
    with disk_errors(f"write {output}"):
        save_table(rows, output, COLUMNS)
    if as_json:
        print(json.dumps(rows))
    else:
        print_table(list(COLUMNS.values()), [cells(row, COLUMNS) for row in rows])


def _evaluate_tasks(
    base: str,
    finetuned: str,
    deltas: dict[str, str],
    tasks: list[str],
    output: Path,
    as_json: bool,
    include_path: Path | None,
    options: dict[str, Any],
) -> None:
    from deltacome.evaluate.comparison import markdown_table
    from deltacome.files import disk_errors, write_atomically

    harness = _harness()
    rows = harness.evaluate_tasks(base, finetuned, deltas, tasks, include_path=include_path, **options)
    headings, lines = harness.table(rows)
    with disk_errors(f"write {output}"):
        write_atomically(output, (json.dumps(rows, indent=1) + "\n").encode())
        table = markdown_table([headings, ["---"] * len(headings), *lines])
        write_atomically(output.with_suffix(".md"), table.encode())
    if as_json:
        print(json.dumps(rows))
    else:
        print_table(headings, lines)


def _harness() -> Any:
    try:
        from deltacome.evaluate import harness
    except ImportError as error:
        raise DeltacomeError("this needs lm-evaluation-harness; pip install 'deltacome[lm-eval]'") from error
    return harness


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: deltacome lm-eval run --model deltacome --model_args base=base/,delta=math-delta/ --tasks gsm8k",
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness's program, all arguments being its own, with the type of model `deltacome` added."""
    _harness()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()


@app.command(epilog="Example: deltacome search base/ math/ --data mixed.jsonl -o search.json")
def search(
    base: Base,
    finetuned: Finetuned,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help="Examples of the task, best mixed with unrelated `text`: on the task alone KL misleads.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file for the results, or one of the same search to go on from.")
    ],
    ratio: Annotated[float, typer.Option(help="Of every candidate, as for compress.")] = 16,
    strategy: Annotated[Literal["greedy", "genetic"], typer.Option(help="How candidates are chosen.")] = "greedy",
    examples: Annotated[int, typer.Option(min=1, help="How many of the first lines of --data to use.")] = 64,
    chat_template: Template = None,
    generations: Annotated[int, typer.Option(min=1, help="Of the genetic strategy.")] = 8,
    population: Annotated[int, typer.Option(min=2, help="Plans in a generation.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the genetic strategy.")] = 0,
    as_json: Json = False,
) -> None:
    """Find the precision plan of delta-come with the least KL on data. Started again after a kill, it goes on.

    Prints the plan for `compress --precision`, and each stage's candidates on standard error.
    """
    from deltacome.search.precision_search import cells
    from deltacome.search.precision_search import search as run

    quiet()
    report = run(
        base,
        finetuned,
        data,
        output,
        ratio=ratio,
        strategy=strategy,
        examples=examples,
        chat_template=chat_template,
        generations=generations,
        population=population,
        seed=seed,
        on_stage=lambda stage, candidates: print_table(
            [stage, "KL", "artifact ratio"], [cells(plan, result) for plan, result in candidates.items()], stderr=True
        ),
    )
    print(json.dumps(report) if as_json else report["plan"])
