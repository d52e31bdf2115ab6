"""`deltacome benchmark`: whole comparisons."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltacome.cli.common import (
    Base,
    Device,
    Json,
    NewTokens,
    Template,
    app,
    named_folders,
    print_table,
    quiet,
    split_name,
)

benchmarks = typer.Typer(help="Whole comparisons, each by one command; a killed one goes on.", no_args_is_help=True)
app.add_typer(benchmarks, name="benchmark")


@benchmarks.command(epilog="Example: deltacome benchmark quality suite.json -o quality/")
def quality(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.json", help="What to compare; see docs/benchmark.md.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for artifacts, rows, table and picture; gone on with.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first lines of each fine-tune's data.")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods at several ratios on several fine-tunes: KL, accuracy and bytes, in a table and a picture."""
    from deltacome.benchmark import report
    from deltacome.benchmark.quality import quality as run
    from deltacome.evaluate.comparison import cells

    quiet()
    rows = run(suite, output, limit=limit)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for name, own in report.by_finetune(rows).items():
        print(name)
        print_table(list(report.COLUMNS.values()), [cells(row, report.COLUMNS) for row in own])
        print("".join(f"failed: {line}\n" for line in report.failures(own)), end="")


Members = Annotated[list[str] | None, typer.Option("--member", help="One of it; may be repeated. [default: all]")]
Cache = Annotated[Path | None, typer.Option(help="Folder of the checkpoints. [default: ~/.cache/deltacome/zoo]")]
Measured = Annotated[
    int | None, typer.Option(min=1, help="How many held-out examples and off-task texts are measured on. [default: 20]")
]


@benchmarks.command(epilog="Example: deltacome benchmark zoo --member shell --member rl -o zoo/")
def zoo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for artifacts, rows and tables; gone on with.")
    ],
    member: Members = None,
    ratio: Annotated[
        list[float] | None, typer.Option(min=1, help="Of the deltas; may be repeated. [default: 16, 32, 64]")
    ] = None,
    cache: Cache = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only so many held-out examples and off-task texts.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two methods on a dozen real fine-tunes of three bases, which are made first: a few minutes each."""
    from deltacome.benchmark.zoo.members import MEMBERS
    from deltacome.benchmark.zoo.run import RATIOS, benchmark_zoo, table
    from deltacome.evaluate.comparison import cells

    quiet()
    rows = benchmark_zoo(output, member or list(MEMBERS), ratios=ratio or RATIOS, cache=cache, limit=limit)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    shown = table(rows)
    print_table(list(shown.columns.values()), [cells(row, shown.columns) for row in shown.rows])


@benchmarks.command(epilog="Example: deltacome benchmark constants --member shell --member code -o constants/")
def constants(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for rows and tables; gone on with.")],
    member: Members = None,
    constant: Annotated[list[str] | None, typer.Option(help="What to vary; may be repeated. [default: all]")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(min=1, help="Of the deltas; may be repeated. [default: 16, 64]")
    ] = None,
    cache: Cache = None,
    limit: Measured = None,
    as_json: Json = False,
) -> None:
    """Vary the default method's constants on the zoo's members, and choose each by all of them but one."""
    from deltacome.benchmark.zoo.constants import OTHERS, RATIOS, benchmark_constants
    from deltacome.benchmark.zoo.members import MEMBERS
    from deltacome.benchmark.zoo.trial import LIMIT
    from deltacome.evaluate.comparison import cells

    quiet()
    tables = benchmark_constants(
        output,
        member or list(MEMBERS),
        constants=constant or list(OTHERS),
        ratios=ratio or RATIOS,
        cache=cache,
        limit=limit or LIMIT,
    )
    if as_json:
        print(json.dumps([{"title": one.title, "rows": one.rows} for one in tables], ensure_ascii=False))
        return
    for one in tables:
        print(one.title)
        print_table(list(one.columns.values()), [cells(row, one.columns) for row in one.rows])


@benchmarks.command(epilog="Example: deltacome benchmark papers --member shell --member large -o papers/")
def papers(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for rows, table and picture; gone on with.")],
    member: Members = None,
    cache: Cache = None,
    limit: Measured = None,
    as_json: Json = False,
) -> None:
    """Compare the default method with the ideas of other papers on the zoo's linear weights: KL by bits a weight."""
    from deltacome.benchmark.zoo.members import MEMBERS
    from deltacome.benchmark.zoo.papers import benchmark_papers
    from deltacome.benchmark.zoo.trial import LIMIT
    from deltacome.evaluate.comparison import cells

    quiet()
    table = benchmark_papers(output, member or list(MEMBERS), cache=cache, limit=limit or LIMIT)
    if as_json:
        print(json.dumps(table.rows, ensure_ascii=False))
        return
    print_table(list(table.columns.values()), [cells(row, table.columns) for row in table.rows])


Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")]
Ratio = Annotated[float, typer.Option(min=1, help="Of the random deltas.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often everything is measured.")]
Counts = Annotated[list[int] | None, typer.Option("--tenants", min=1, help="How many; may be repeated.")]
Shape = Literal["135m", "7b"]


def _show(results: dict[str, Any], as_json: bool) -> None:
    from deltacome.evaluate.comparison import cells

    if as_json:
        print(json.dumps(results))
        return
    print(results["machine"])
    for table in results["tables"]:
        print(table["title"])
        print_table(list(table["columns"].values()), [cells(row, table["columns"]) for row in table["rows"]])


@benchmarks.command(epilog="Example: deltacome benchmark runtime --shape 7b --layers 1 -o runtime/")
def runtime(
    output: Output,
    shape: Annotated[Shape, typer.Option(help="Of the model, whose weights are random.")] = "135m",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Only so many of its layers, and next to no vocabulary.")
    ] = None,
    ratio: Ratio = 16,
    tenants: Counts = None,
    device: Device = None,
    rounds: Rounds = 9,
    as_json: Json = False,
) -> None:
    """Measure decoding steps with 1 to 16 tenants in a batch against merged models in turn."""
    from deltacome.benchmark.runtime import COUNTS, benchmark_runtime

    quiet()
    counts = tenants or COUNTS
    results = benchmark_runtime(output, shape, layers=layers, ratio=ratio, counts=counts, device=device, rounds=rounds)
    _show(results, as_json)


@benchmarks.command(epilog="Example: deltacome benchmark compress --shape 7b --layers 1 -o compress/")
def compress(
    output: Output,
    base: Annotated[str | None, typer.Argument(metavar="[BASE]", help="Base checkpoint: a folder or a hub id.")] = None,
    finetuned: Annotated[str | None, typer.Argument(metavar="[FINETUNED]", help="A fine-tune of it.")] = None,
    shape: Annotated[Shape | None, typer.Option(help="Random checkpoints, in place of real ones.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the shape, beside embedding and head.")] = None,
    ratio: Annotated[str, typer.Option(metavar="NUMBER", help="As `compress` has it.")] = "16",
    device: Device = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often it is compressed.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure the seconds of each phase of a compression, and its peak memory against the bound."""
    from deltacome.benchmark.compress import benchmark_compress

    results = benchmark_compress(
        output, base=base, finetuned=finetuned, shape=shape, layers=layers, ratio=ratio, device=device, rounds=rounds
    )
    _show(results, as_json)


@benchmarks.command(epilog="Example: deltacome benchmark kernel --size 1024 --size 4096 -o kernel/")
def kernel(
    output: Output,
    size: Annotated[list[int] | None, typer.Option(min=2, help="Hidden size; may be repeated.")] = None,
    tenants: Counts = None,
    ratio: Ratio = 16,
    device: Device = None,
    rounds: Rounds = 9,
    as_json: Json = False,
) -> None:
    """Measure the kernel alone, against plain PyTorch, by hidden size and number of tenants."""
    from deltacome.benchmark.kernel import BATCHES, SIZES, benchmark_kernel

    quiet()
    sizes, batches = size or SIZES, tenants or BATCHES
    results = benchmark_kernel(output, sizes=sizes, batches=batches, ratio=ratio, device=device, rounds=rounds)
    _show(results, as_json)


@benchmarks.command(
    epilog="Example: deltacome benchmark memory base/ --delta math-delta/ --delta intent-delta/ -o memory/"
)
def memory(
    output: Output,
    base: Annotated[str | None, typer.Argument(metavar="[BASE]", help="Base checkpoint: a folder or a hub id.")] = None,
    delta: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DELTA", help="A delta of it; they are loaded in turn.")
    ] = None,
    shape: Annotated[Shape | None, typer.Option(help="Random weights and deltas, in place of real ones.")] = None,
    ratio: Ratio = 16,
    tenants: Counts = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure the memory of 2 to 50 tenants on one base, against a merged model for each."""
    from deltacome.benchmark.memory import COUNTS, benchmark_memory

    quiet()
    deltas, counts = named_folders(delta or []), tenants or COUNTS
    results = benchmark_memory(output, base=base, deltas=deltas, shape=shape, ratio=ratio, counts=counts, device=device)
    _show(results, as_json)


@benchmarks.command(
    epilog="Example: deltacome benchmark activations base/ --finetuned math/ --delta math-delta/ --data test.jsonl "
    "-o activations/"
)
def activations(
    base: Base,
    finetuned: Annotated[str, typer.Option(metavar="FINETUNED", help="The deltas' fine-tuned checkpoint.")],
    delta: Annotated[list[str], typer.Option(metavar="[NAME=]DELTA", help="A delta of it; may be repeated.")],
    data: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="Text whose activations are looked at.")],
    output: Output,
    limit: Annotated[int, typer.Option(min=1, help="Use only the first lines of the data.")] = 16,
    chat_template: Template = None,
    as_json: Json = False,
) -> None:
    """Measure the error of layers' outputs, in low, middle and high layers, all and the largest ones."""
    from deltacome.benchmark.activations import benchmark_activations

    quiet()
    deltas = named_folders(delta)
    results = benchmark_activations(output, base, finetuned, deltas, data, limit=limit, chat_template=chat_template)
    _show(results, as_json)


@benchmarks.command(
    "serve",
    epilog="Example: deltacome benchmark serve base/ --delta math=math-delta/ --delta intent=intent-delta/ "
    "--data math=math.jsonl --data intent=intent.jsonl -o serve/",
)
def serve_benchmark(
    base: Base,
    delta: Annotated[list[str], typer.Option(metavar="NAME=DELTA", help="A delta to serve; may be repeated.")],
    data: Annotated[
        list[str], typer.Option(metavar="[NAME=]FILE.jsonl", help="Prompts for a delta, or without a name for all.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; may be repeated. [default: 1]")] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many, at each rate.")] = 60,
    max_new_tokens: NewTokens = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Every answer is as long as it may be, as vLLM's benchmarks have it.")
    ] = False,
    skew: Annotated[float, typer.Option(help="Shares of the load as 1, 1/2^SKEW, 1/3^SKEW, ... of the deltas.")] = 1.0,
    patience: Annotated[
        float, typer.Option(help="Seconds that a request waits before the swapping server drops the model it has.")
    ] = 5.0,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="deltas, no-prefix-cache, disk or page-cache; may be repeated. [default: deltas and swapping]"
        ),
    ] = None,
    system_words: Annotated[
        int, typer.Option(min=0, help="Words of a system message that all requests to a delta begin with.")
    ] = 0,
    long_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the requests with a long message.")] = 0.0,
    long_words: Annotated[int, typer.Option(min=1, help="Words of a long message.")] = 1500,
    chat_template: Template = None,
    as_json: Json = False,
) -> None:
    """Drive the server with a Poisson load over many deltas, and the same load on merged models swapped in and out."""
    from deltacome.benchmark.serve import MAIN_SYSTEMS, benchmark_serve
    from deltacome.evaluate.comparison import cells

    quiet()
    files = {name or "": path for name, path in map(split_name, data)}
    table = benchmark_serve(
        base,
        named_folders(delta),
        {name: Path(file) for name, file in files.items()},
        output,
        rates=rate or [1.0],
        requests=requests,
        new_tokens=max_new_tokens,
        ignore_eos=ignore_eos,
        skew=skew,
        patience=patience,
        chat_template=chat_template,
        systems=system or MAIN_SYSTEMS,
        system_words=system_words,
        long_share=long_share,
        long_words=long_words,
    )
    if as_json:
        print(json.dumps(table.rows))
    else:
        print_table(
            [column.strip() for column in table.columns.values()], [cells(row, table.columns) for row in table.rows]
        )


@app.command("report", epilog="Example: deltacome report quality/ runtime/ memory/ -o report.html")
def report_page(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Folders of benchmarks, at any depth, or their JSON files."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="Page to write; an old one goes.")],
) -> None:
    """Gather the results of benchmarks in one HTML page, pictures included, to read, print or send."""
    from deltacome.benchmark.page import write_report

    count = write_report(results, output)
    print(f"{output}: {count} result{'s' if count > 1 else ''}")
