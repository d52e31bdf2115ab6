"""Commands for a store of deltas that a team shares."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deltacome.cli.common import Json, app, print_table

Address = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="ADDRESS",
        envvar="DELTACOME_STORE",
        help="The store: a folder, or an address such as s3://bucket/deltas.",
    ),
]
Reference = Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="Without a version or a tag: the newest.")]


def _open(address: str | None) -> Any:
    from deltacome.errors import DeltacomeError
    from deltacome.store.store import Store

    if not address:
        raise DeltacomeError("which store? write --store ADDRESS, or put DELTACOME_STORE into the environment")
    return Store(address)


stores = typer.Typer(help="Deltas under names and versions, in a folder or a bucket.", no_args_is_help=True)
app.add_typer(stores, name="store")


@stores.command(epilog="Example: deltacome store push math-delta/ math --store s3://bucket/deltas")
def push(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="Folder of a compressed delta.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is to be called.")],
    store: Address = None,
    as_json: Json = False,
) -> None:
    """Make a delta the newest version of a name, with the deltas that it is made on. The first push makes the store."""
    version, sent = _open(store).push(delta, name)
    report = {"name": name, "version": version.version, "bytes_sent": sent}
    print(json.dumps(report) if as_json else f"{version}, {sent:,} bytes sent")


@stores.command(epilog="Example: deltacome store pull math:stable -o math-delta/ --store s3://bucket/deltas")
def pull(
    delta: Reference,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    store: Address = None,
    as_json: Json = False,
) -> None:
    """Copy a version to a folder, each file checked; the deltas that it is made on go beside the folder."""
    version = _open(store).pull(delta, output)
    report = {"name": version.name, "version": version.version, "output": str(output)}
    print(json.dumps(report) if as_json else f"{output}: {version}")


@stores.command(name="list", epilog="Example: deltacome store list math --store s3://bucket/deltas")
def show(
    store: Address = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="All versions of this delta.")] = None,
    as_json: Json = False,
) -> None:
    """Show the newest version of each name, or all versions of one, with their tags."""
    from deltacome.errors import DeltacomeError
    from deltacome.store.entry import Entry

    opened = _open(store)
    listing = opened.look()
    if name is None:
        versions = [listing.versions(each)[0] for each in sorted(listing.pushes)]
    else:
        versions = listing.versions(name)
        if not versions:
            raise DeltacomeError(f"the store has no delta {name}")
    rows = []
    for version, entry in zip(versions, opened.entries(versions), strict=True):
        row: dict[str, Any] = {"name": version.name, "version": version.version, "pushed": version.when.isoformat()}
        tags = sorted(tag for tag, target in listing.tags.get(version.name, {}).items() if target == version.version)
        if isinstance(entry, Entry):
            row |= {"tags": tags, "base": entry.base, "bytes": entry.size, "parents": list(entry.names[1:])}
        else:
            row |= {"tags": tags, "error": str(entry)}
        rows.append(row)
    if as_json:
        print(json.dumps(rows))
        return
    print_table(
        ["name", "version", "pushed", "tags", "base", "bytes", "made on"],
        [
            [
                row["name"],
                row["version"],
                f"{version.when:%Y-%m-%d %H:%M}",
                ", ".join(row["tags"]),
                row.get("base", "damaged"),
                f"{row['bytes']:,}" if "bytes" in row else "",
                ", ".join(row.get("parents", [])),
            ]
            for row, version in zip(rows, versions, strict=True)
        ],
    )


@stores.command(epilog="Example: deltacome store tag math:3f9a1c2b7d04 stable --store s3://bucket/deltas")
def tag(
    delta: Reference,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="A name for this version, such as stable.")],
    store: Address = None,
    as_json: Json = False,
) -> None:
    """Give a version a tag, which another version may have had."""
    version = _open(store).tag(delta, tag)
    report = {"name": version.name, "version": version.version, "tag": tag}
    print(json.dumps(report) if as_json else f"{version.name}:{tag} is {version}")


@stores.command(epilog="Example: deltacome store remove math:3f9a1c2b7d04 --store s3://bucket/deltas")
def remove(
    delta: Annotated[str, typer.Argument(metavar="NAME:VERSION", help="A version, or NAME:TAG for a tag alone.")],
    store: Address = None,
    as_json: Json = False,
) -> None:
    """Remove a version or a tag. What nothing else needs of the version's files goes with `collect`, a day later."""
    removed = _open(store).remove(delta)
    print(json.dumps({"removed": delta}) if as_json else f"removed {removed}")


@stores.command(epilog="Example: deltacome store collect --store s3://bucket/deltas")
def collect(
    store: Address = None,
    hours: Annotated[
        float, typer.Option(min=0, help="How long files stay that no version has; less than 24 only if nobody pushes.")
    ] = 24.0,
    as_json: Json = False,
) -> None:
    """Remove files that no version has any more, removed versions' and those of pushes that were killed."""
    gone, left = _open(store).collect(hours)
    print(json.dumps({"removed": gone, "left": left}) if as_json else f"{gone} files removed, {left} left")
