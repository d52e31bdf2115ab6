"""Commands that make deltas and that turn them into something else."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deltacome.cli.common import Base, DeltaFolder, Device, Dtype, Json, Template, app, print_table, quiet
from deltacome.errors import DeltacomeError
from deltacome.progress import print_warning


@app.command(epilog="Example: deltacome compress base/ math/ -o math-delta/ --ratio 16")
def compress(
    base: Base,
    finetuned: Annotated[
        str, typer.Argument(metavar="FINETUNED", help="Checkpoint, a folder or a hub id; or a LoRA adapter's folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    ratio: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER",
            help="Bytes of the fine-tuned weights in 16 bit over the artifact's. Of several (16,32,64) each gets an "
            "artifact in the folder, in little more time than one. [default: 16]",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="rate-distortion, delta-come, low-rank, bitdelta or lossless. [default: delta-come with --precision, "
            "else rate-distortion]"
        ),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Every weight to the last bit, in whatever bytes that takes.")
    ] = False,
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
    parent: Annotated[
        str | None,
        typer.Option(
            metavar="DELTA",
            help="Make a delta on this delta of BASE, a folder beside the output or a hub id: what has changed since.",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="'ray' spreads the matrices over the cluster of RAY_ADDRESS.")
    ] = "local",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compress the delta between a base and a fine-tuned checkpoint. Started again after a kill, it goes on."""
    from deltacome.compression.pipeline import compress as run

    quiet()
    if lossless and method not in (None, "lossless"):
        raise DeltacomeError(f"--lossless is a method of its own; leave it out, or --method {method}")
    report = run(
        base,
        finetuned,
        output,
        ratio=_ratios(ratio),
        method="lossless" if lossless else method,
        embeddings=embeddings,
        calibration=calibration,
        calibration_examples=calibration_examples,
        chat_template=chat_template,
        fold_norms=fold_norms,
        renames=_renames(map) if map else None,
        parent=parent,
        engine=engine,
        device=device,
        precision=precision,
        scale=scale,
        group_size=group_size,
    )
    print(json.dumps(report) if as_json else _as_text(report))


@app.command(epilog="Example: deltacome flatten base/ math-v3-delta/ -o math-delta/ --ratio 16")
def flatten(
    base: Base,
    delta: DeltaFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    ratio: Annotated[
        float | None, typer.Option(help="Bytes of the fine-tuned weights in 16 bit over the artifact's. [default: 16]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one delta of a delta and those that it is made on (compress --parent)."""
    from deltacome.compression.pipeline import flatten as run

    quiet()
    report = run(base, delta, output, ratio=ratio)
    print(json.dumps(report) if as_json else _as_text(report))


def _ratios(given: str | None) -> float | list[float] | None:
    if given is None:
        return None
    try:
        ratios = [float(part) for part in given.split(",")]
    except ValueError as error:
        raise DeltacomeError(f"--ratio {given} is no number; write it like --ratio 16, or --ratio 16,32,64") from error
    return ratios if len(ratios) > 1 else ratios[0]


def _as_text(report: dict[str, Any]) -> str:
    artifacts = report.get("artifacts", [report])
    costs = f"{report['seconds']:.1f} s, peak memory {report['peak_bytes'] / 2**20:.0f} MiB"
    lines = [
        f"{own['artifact']}: {own['artifact_bytes']:,} bytes for {own['finetuned_bytes']:,}, ratio "
        f"1/{own['artifact_ratio']:.1f} (linear weights 1/{own['linear_ratio']:.1f})"
        for own in artifacts
    ]
    return f"{lines[0]}, {costs}" if len(lines) == 1 else "\n".join([*lines, costs])


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
    from deltacome.evaluate import summary
    from deltacome.files import disk_errors
    from deltacome.format.artifact import Artifact

    artifact = Artifact(delta)
    rows, totals = summary.table(artifact, weights), summary.totals(artifact)
    if plot is not None:
        with disk_errors(f"write {plot}"):
            summary.plot(artifact, plot)
    if as_json:
        print(json.dumps({**totals, "modules": rows}))
        return
    print_table(
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
    if "parent" in totals:
        print(
            f"on the delta {totals['parent']}; all together {totals['chain_bytes']:,} bytes, ratio "
            f"1/{totals['chain_ratio']:.2f}"
        )


@app.command(epilog="Example: deltacome verify math-delta/ --base base/")
def verify(
    delta: DeltaFolder,
    base: Annotated[str | None, typer.Option(help="Also check that this is the delta's base.")] = None,
    as_json: Json = False,
) -> None:
    """Check every file of a compressed delta against its SHA-256, and its base."""
    from deltacome.checkpoints.checkpoint import Checkpoint
    from deltacome.checkpoints.rebuilding import rebuild
    from deltacome.format.artifact import Artifact
    from deltacome.restore.merging import open_checked

    if base is None:
        artifact = Artifact(delta)
        artifact.check_digests()
    else:
        checkpoint = Checkpoint(base)
        artifact = open_checked(checkpoint, delta)  # this process has read no file before
    for name, entry in artifact.weights.items():
        terms = artifact.terms(name)  # refuses NaN
        if base is not None and entry.coded is not None:
            rebuild(entry, terms, checkpoint)  # compares the weight with its own SHA-256
    files = sum(len(each.files) + 1 for each in artifact.chain)
    report = {"artifact": str(delta), "files": files, "base_checked": base is not None}
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
    from deltacome.restore.merging import DTYPES
    from deltacome.restore.merging import merge as run

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
    from deltacome.restore.exporting import export as run
    from deltacome.restore.merging import DTYPES

    report = run(base, delta, output, max_rank=max_rank, dtype=DTYPES[dtype])
    if report["capped"]:
        print_warning(
            f"{report['capped']} weights have more components than --max-rank {max_rank}; "
            f"the adapter's deltas are {report['error']:.2%} off (relative Frobenius error)"
        )
    if report["left_out"]:
        first, more = report["left_out"][0], len(report["left_out"]) - 1
        print_warning(
            f"LoRA cannot express what changed in {first}{f' and {more} more' if more else ''}; "
            "norms can be folded (compress --fold-norms), the rest is lost"
        )
    print(json.dumps(report) if as_json else f"{output}: rank {report['rank']}, {report['bytes']:,} bytes")


@app.command(epilog="Example: deltacome push math-delta/ someone/math-delta")
def push(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Folder of a compressed delta.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Hub id, USER/NAME; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made, for you alone.")] = False,
) -> None:
    """Upload a compressed delta, with its model card, to the Hugging Face Hub. Log in with `hf auth login`."""
    from deltacome import hub
    from deltacome.format.artifact import Artifact
    from deltacome.format.manifest import MANIFEST, MODEL_CARD

    artifact = Artifact(delta)
    artifact.check_digests()
    if "/" not in artifact.base_name:
        print_warning(f"the base is called {artifact.base_name}, which is no hub id; put it into {delta / MODEL_CARD}")
    parent = artifact.manifest["parent"]["name"] if artifact.parent is not None else "/"
    if "/" not in parent:
        print_warning(f"it is a delta on {parent}, which is no hub id: whoever downloads it must have that beside it")
    print(hub.push(artifact.folder, [MANIFEST, MODEL_CARD, *artifact.files], repository, private=private))
