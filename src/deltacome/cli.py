"""The command line. Heavy imports are inside the commands, so that help comes at once."""

import json
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltacome import __version__
from deltacome.errors import DeltacomeError

app = typer.Typer(
    name="deltacome",
    help="Full fine-tunes of language models as compressed deltas on one base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Base = Annotated[str, typer.Argument(metavar="BASE", help="Base checkpoint: a folder or a hub id.")]
Finetuned = Annotated[str, typer.Argument(metavar="FINETUNED", help="Fine-tuned checkpoint: a folder or a hub id.")]
DeltaFolder = Annotated[Path, typer.Argument(metavar="DELTA", help="Folder of a compressed delta.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|none", help="Jinja chat template to use instead of the tokenizer's; 'none' for bare prompts."
    ),
]
Dtype = Literal["float32", "bfloat16", "float16"]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(epilog="Example: deltacome compress base/ math/ -o math-delta/ --ratio 16")
def compress(
    base: Base,
    finetuned: Annotated[
        str, typer.Argument(metavar="FINETUNED", help="Checkpoint, a folder or a hub id; or a LoRA adapter's folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    ratio: Annotated[
        float | None, typer.Option(help="Bytes of the fine-tuned weights in 16 bit over the artifact's. [default: 16]")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="rate-distortion, delta-come, low-rank or bitdelta. [default: delta-come with --precision, else "
            "rate-distortion]"
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="PLAN", help="delta-come: BITS:COUNT,... [default: 8:2,3:32,2:*]")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="delta-come: unbiased, least-squares or minmax; bitdelta: mean or refit. [default: the first]"
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="delta-come: entries that share a range; 0 for one a vector. [default: 0; minmax 128]"),
    ] = None,
    embeddings: Annotated[
        Literal["compress", "exact"],
        typer.Option(help="'exact' keeps embeddings and head as they are; the ratio is then about the rest."),
    ] = "compress",
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Examples to calibrate on. Without it no data is used."),
    ] = None,
    calibration_examples: Annotated[int, typer.Option(min=1, help="How many of its lines to use.")] = 128,
    chat_template: Template = None,
    fold_norms: Annotated[
        bool,
        typer.Option(
            "--fold-norms", help="Put what changed in the norms into the matrices behind them; the base's norms serve."
        ),
    ] = False,
    map: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Names that begin with OLD begin with NEW in the base; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress the delta between a base and a fine-tuned checkpoint. Started again after a kill, it goes on."""
    from deltacome.compression import compress as run

    _quiet()
    report = run(
        base,
        finetuned,
        output,
        ratio=ratio,
        method=method,
        embeddings=embeddings,
        calibration=calibration,
        calibration_examples=calibration_examples,
        chat_template=chat_template,
        fold_norms=fold_norms,
        renames=_renames(map) if map else None,
        precision=precision,
        scale=scale,
        group_size=group_size,
    )
    if as_json:
        print(json.dumps(report))
    else:
        print(
            f"{output}: {report['artifact_bytes']:,} bytes for {report['finetuned_bytes']:,}, ratio "
            f"1/{report['artifact_ratio']:.1f} (linear weights 1/{report['linear_ratio']:.1f}), "
            f"{report['seconds']:.1f} s, peak memory {report['peak_bytes'] / 2**20:.0f} MiB"
        )


def _renames(given: list[str]) -> dict[str, str]:
    for item in given:
        if "=" not in item:
            raise DeltacomeError(f"--map {item} has no =; write it like --map language_model.model.=model.")
    return dict(item.split("=", 1) for item in given)


@app.command(epilog="Example: deltacome inspect math-delta/ --plot math-delta.png")
def inspect(
    delta: DeltaFolder,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the singular values and the bits by component.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="A row a weight instead of a row a module.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a compressed delta holds: a table by module, and totals."""
    from deltacome import summary
    from deltacome.artifact import Artifact
    from deltacome.files import disk_errors

    artifact = Artifact(delta)
    rows, totals = summary.table(artifact, weights), summary.totals(artifact)
    if plot is not None:
        with disk_errors(f"write {plot}"):
            summary.plot(artifact, plot)
    if as_json:
        print(json.dumps({**totals, "modules": rows}))
        return
    _print_table(
        ["module", "weights", "shape", "precision", "bytes", "ratio", "error"],
        [
            [
                row["module"],
                str(row["weights"]),
                row["shape"],
                row["precision"],
                f"{row['bytes']:,}",
                f"1/{row['ratio']:.1f}",
                "" if row["error"] is None else f"{row['error']:.4f}",
            ]
            for row in rows
        ],
    )
    settings = ", ".join(f"{key} {value}" for key, value in artifact.method.items() if key != "name")
    print(f"{totals['finetuned']} on {totals['base']}, by {artifact.method['name']} ({settings})")
    print(
        f"{totals['artifact_bytes']:,} bytes for {totals['finetuned_bytes']:,}: artifact ratio "
        f"1/{totals['artifact_ratio']:.2f}, linear ratio 1/{totals['linear_ratio']:.2f}"
    )


@app.command(epilog="Example: deltacome verify math-delta/ --base base/")
def verify(
    delta: DeltaFolder,
    base: Annotated[str | None, typer.Option(help="Also check that this is the delta's base.")] = None,
    as_json: Json = False,
) -> None:
    """Check every file of a compressed delta against its SHA-256, and its base."""
    from deltacome.artifact import Artifact
    from deltacome.checkpoint import Checkpoint
    from deltacome.merging import open_checked

    if base is None:
        artifact = Artifact(delta)
        artifact.check_digests()
    else:
        artifact = open_checked(Checkpoint(base), delta)
    for name in artifact.entries:
        artifact.terms(name)  # refuses NaN
    report = {"artifact": str(delta), "files": len(artifact.files) + 1, "base_checked": base is not None}
    print(json.dumps(report) if as_json else f"{delta} is whole" + (f", and {base} is its base" if base else ""))


@app.command(epilog="Example: deltacome merge base/ math-delta/ -o math-again/")
def merge(
    base: Base,
    delta: DeltaFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of the weights. [default: the fine-tuned checkpoint's; 16 bit rounds the delta]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild the fine-tuned checkpoint from its base and a compressed delta."""
    from deltacome.merging import DTYPES
    from deltacome.merging import merge as run

    report = run(base, delta, output, DTYPES[dtype] if dtype else None)
    print(json.dumps(report) if as_json else f"{output}: {report['bytes']:,} bytes")


@app.command(epilog="Example: deltacome export base/ math-delta/ -o math-lora/ --max-rank 128")
def export(
    base: Base,
    delta: DeltaFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    format: Annotated[Literal["peft"], typer.Option(help="A PEFT adapter.")] = "peft",
    max_rank: Annotated[int, typer.Option(min=1, help="Of every weight's factors.")] = 256,
    dtype: Annotated[Dtype, typer.Option(help="Of the factors.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Write a delta as a LoRA adapter, the nearest of its rank, for what knows nothing of deltas."""
    from deltacome.exporting import export as run
    from deltacome.merging import DTYPES

    report = run(base, delta, output, max_rank=max_rank, dtype=DTYPES[dtype])
    if report["capped"]:
        print(
            f"warning: {report['capped']} weights have more components than --max-rank {max_rank}; "
            f"the adapter's deltas are {report['error']:.2%} off (relative Frobenius error)",
            file=sys.stderr,
        )
    if report["left_out"]:
        first, more = report["left_out"][0], len(report["left_out"]) - 1
        print(
            f"warning: LoRA cannot express what changed in {first}{f' and {more} more' if more else ''}; "
            "norms can be folded (compress --fold-norms), the rest is lost",
            file=sys.stderr,
        )
    print(json.dumps(report) if as_json else f"{output}: rank {report['rank']}, {report['bytes']:,} bytes")


Deltas = Annotated[
    list[str] | None,
    typer.Option("--delta", metavar="[NAME=]DELTA", help="A compressed delta; may be repeated. Without one: the base."),
]
NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer.")]
ComputeDtype = Annotated[Dtype, typer.Option(help="To compute in.")]


@app.command(epilog='Example: deltacome generate base/ --delta math-delta/ --prompt "What is 3 + 4?"')
def generate(
    base: Base,
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    delta: Deltas = None,
    max_new_tokens: NewTokens = 256,
    chat_template: Template = None,
    dtype: ComputeDtype = "float32",
    as_json: Json = False,
) -> None:
    """Answer a prompt, greedily, with one or several compressed deltas of a base, in one batch."""
    _quiet()
    conversation = _conversation(base, delta or [], chat_template, dtype)
    answers = conversation.say(prompt, max_new_tokens)
    names = [name or "base" for name in conversation.tenants]
    if as_json:
        print(json.dumps({"prompt": prompt, "answers": dict(zip(names, answers, strict=True))}, ensure_ascii=False))
    else:
        print("\n\n".join(answers if len(names) == 1 else map("{}: {}".format, names, answers)))


@app.command(epilog="Example: deltacome chat base/ --delta math=math-delta/ --delta intent=intent-delta/")
def chat(
    base: Base,
    delta: Deltas = None,
    max_new_tokens: NewTokens = 256,
    chat_template: Template = None,
    dtype: ComputeDtype = "float32",
) -> None:
    """Talk to one or several compressed deltas of a base at once. /reset begins anew, /exit or Ctrl-D ends."""
    _quiet()
    conversation = _conversation(base, delta or [], chat_template, dtype)
    several = len(conversation.tenants) > 1
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            answers = conversation.say(text, max_new_tokens, stream=not several)
            for name, answer in zip(conversation.tenants, answers, strict=True):
                if several:
                    print(f"{name}: {answer}")


def _conversation(base: str, deltas: list[str], chat_template: str | None, dtype: str) -> Any:
    """A conversation with the deltas of the command line, or with the base if there are none."""
    from deltacome.checkpoint import Checkpoint
    from deltacome.merging import DTYPES
    from deltacome.runtime.conversation import Conversation
    from deltacome.runtime.model import load

    folders = _folders(deltas)
    model = load(base, folders, dtype=DTYPES[dtype])
    return Conversation(model, Checkpoint(base), list(folders) or [None], chat_template)


def _folders(deltas: list[str]) -> dict[str, str]:
    """The deltas of the command line by name."""
    folders: dict[str, str] = {}
    for item in deltas:
        name, equals, folder = item.partition("=")
        if not equals:
            name, folder = Path(item).resolve().name, item
        if not name or name in folders:
            raise DeltacomeError(f"--delta {item}: write NAME=DELTA, each name once")
        folders[name] = folder
    return folders


@app.command(
    epilog="Example: deltacome serve base/ --delta math=math-delta/ --delta intent=intent-delta/",
    context_settings={"allow_extra_args": True},
)
def serve(
    context: typer.Context,
    base: Base,
    delta: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]DELTA", help="A compressed delta to serve; may be repeated.")
    ] = None,
    delta_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Serve every delta in this folder, come when it may; others may be loaded."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For deltas, such as 500MB or 2GB; the longest unused are dropped for room."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 to serve other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The base's, as a model. [default: its folder's or hub id]")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="DELTACOME_API_KEY", help="Asked of everybody; better in the environment.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help='Keys for some models each: {"KEY": ["MODEL", ...]}.')
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers in the running batch.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; others get 429.")] = 256,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer. [default: what the base has room for]")
    ] = None,
    cache_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens whose keys and values are kept, padding too.")
    ] = 32768,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    chat_template: Template = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="To compute in. [default: float32 on the CPU]")] = None,
    engine: Annotated[
        Literal["embedded", "vllm"], typer.Option(help="vllm: vLLM's own server; arguments behind -- are for it.")
    ] = "embedded",
) -> None:
    """Serve a base and any number of its deltas through OpenAI's API, all of them in one running batch."""
    from deltacome.merging import DTYPES
    from deltacome.serve.engine import Limits
    from deltacome.serve.keys import Keys
    from deltacome.serve.server import build, run
    from deltacome.vllm import command

    _quiet()
    folders = _folders(delta or [])
    if engine == "vllm":
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
        for option in ("memory_limit", "api_keys", "max_queue", "cache_tokens", "deadline", "device"):
            if option in given:
                raise DeltacomeError(f"--{option.replace('_', '-')} is not for vLLM; leave it out")
        options = {
            "host": host,
            "port": port,
            "served-model-name": name,
            "max-num-seqs": max_batch if "max_batch" in given else None,
            "max-model-len": max_length,
            "chat-template": chat_template,
            "dtype": dtype,
        }
        command.run(base, folders, folder=delta_dir, options=options, api_key=api_key, more=context.args)
    if context.args:
        raise DeltacomeError(f"{context.args[0]} is no option; arguments behind -- are for --engine vllm")
    application = build(
        base,
        folders,
        name=name,
        folder=delta_dir,
        memory_limit=_bytes(memory_limit) if memory_limit else None,
        keys=Keys(api_key, api_keys),
        limits=Limits(max_batch, max_queue, cache_tokens),
        max_length=max_length,
        deadline=deadline,
        chat_template=chat_template,
        device=device,
        dtype=DTYPES[dtype] if dtype else None,
    )
    run(application, host, port)


def _bytes(size: str) -> int:
    """Bytes that 500MB, 2GB or 1.5GiB stands for."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", size.strip().upper())
    if not found:
        raise DeltacomeError(f"{size} is no size; write it like 500MB or 2GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))


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

    _quiet()
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
    _print_table(list(evaluation.COLUMNS.values()), [evaluation.cells(row) for row in rows])
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

    _quiet()
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
        on_stage=lambda stage, candidates: _print_table(
            [stage, "KL", "artifact ratio"], [cells(plan, result) for plan, result in candidates.items()], stderr=True
        ),
    )
    print(json.dumps(report) if as_json else report["plan"])


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
    from deltacome.evaluation import cells

    _quiet()
    rows = run(suite, output, limit=limit)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for name, own in report.by_finetune(rows).items():
        print(name)
        _print_table(list(report.COLUMNS.values()), [cells(row, report.COLUMNS) for row in own])
        print("".join(f"failed: {line}\n" for line in report.failures(own)), end="")


@benchmarks.command(epilog="Example: deltacome benchmark runtime --shape 135m -o runtime/")
def runtime(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    shape: Annotated[
        Literal["135m", "7b"], typer.Option(help="Random weights: all of 135M, or a layer of 7B.")
    ] = "135m",
    ratio: Annotated[float, typer.Option(min=1, help="Of the random deltas.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 9,
    as_json: Json = False,
) -> None:
    """Measure decoding steps with 1 to 16 tenants in a batch against merged models in turn, and each kernel."""
    from deltacome.benchmark.runtime import COLUMNS, KERNEL_COLUMNS, benchmark_runtime, table

    _quiet()
    results = benchmark_runtime(output, shape, ratio=ratio, device=device, rounds=rounds)
    if as_json:
        print(json.dumps(results))
        return
    print(f"{results['machine']}, copying {results['copy_gigabytes_per_second']} GB/s")
    _print_table(list(COLUMNS.values()), table(results["steps"], COLUMNS))
    _print_table(list(KERNEL_COLUMNS.values()), table(results["kernels"], KERNEL_COLUMNS))


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
    chat_template: Template = None,
    as_json: Json = False,
) -> None:
    """Drive the server with a Poisson load over many deltas, and the same load on merged models swapped in and out."""
    from deltacome.benchmark.serve import COLUMNS, benchmark_serve, table

    _quiet()
    files = dict((item.partition("=")[::2] if "=" in item else ("", item)) for item in data)
    rows = benchmark_serve(
        base,
        _folders(delta),
        {name: Path(file) for name, file in files.items()},
        output,
        rates=rate or [1.0],
        requests=requests,
        new_tokens=max_new_tokens,
        ignore_eos=ignore_eos,
        skew=skew,
        patience=patience,
        chat_template=chat_template,
    )
    if as_json:
        print(json.dumps(rows))
    else:
        _print_table([column.strip() for column in COLUMNS.values()], table(rows))


def _print_table(columns: list[str], rows: list[list[str]], stderr: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=stderr)
    console.print(table) if console.is_terminal else Console(stderr=stderr, width=160).print(table)


def _quiet() -> None:
    """Keep transformers' own bars and notes out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; every foreseen error is one sentence and exit status 1."""
    signal.signal(signal.SIGTERM, _interrupt)  # clean up as on Ctrl-C
    try:
        app()
    except DeltacomeError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print("error: out of memory; close other programs or use a machine with more", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
