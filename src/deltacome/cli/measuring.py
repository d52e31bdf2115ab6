"""Commands that compare deltas with what they stand for."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from deltacome.cli.common import (
    Base,
    Finetuned,
    Json,
    Template,
    app,
    print_table,
    quiet,
)
from deltacome.errors import DeltacomeError


@app.command(epilog="Example: deltacome evaluate base/ --finetuned math/ --delta math=math-delta/ --data test.jsonl")
def evaluate(
    base: Base,
    finetuned: Annotated[str, typer.Option(help="Fine-tuned checkpoint: a folder or a hub id.")],
    delta: Annotated[list[str], typer.Option(metavar="NAME=DELTA", help="A compressed delta; may be repeated.")],
    data: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Held-out examples of the task.")],
    offtask: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Text that the fine-tune is not about, for off-task KL.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first lines of --data.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    chat_template: Template = None,
    answer_pattern: Annotated[
        str, typer.Option(help="Finds the answer in an output where lines of --data have `answer`.")
    ] = r"####\s*(\S+)",
    show: Annotated[int, typer.Option(min=0, help="Print so many prompts with every model's answer.")] = 0,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="JSON file for the figures and answers; a Markdown table goes beside it."),
    ] = Path("evaluation.json"),
    as_json: Json = False,
) -> None:
    """Compare base, fine-tuned model and compressed deltas: ratio, KL, NLL, accuracy, retention."""
    from deltacome import evaluation
    from deltacome.data import read_examples
    from deltacome.files import disk_errors

    quiet()
    deltas: dict[str, str | Path] = {}
    for item in delta:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder) or name in deltas or name in (evaluation.BASE, evaluation.FINETUNED):
            raise DeltacomeError(f"--delta {item}: write NAME=DELTA, each name once and neither base nor fine-tuned")
        deltas[name] = folder
    if not output.absolute().parent.is_dir():
        raise DeltacomeError(f"cannot write {output}: there is no folder {output.parent}")
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
    print_table(list(evaluation.COLUMNS.values()), [evaluation.cells(row) for row in rows])
    examples = [example for example in read_examples(data, limit) if example.messages]
    for place, example in enumerate(examples[:show]):
        print(f"\nprompt: {example.messages[-1]['content']}\nexpected: {example.completion!r}")
        for row in rows:
            print(f"{row['name']}: {row['outputs'][place]!r}")


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
    from deltacome.search import cells
    from deltacome.search import search as run

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
