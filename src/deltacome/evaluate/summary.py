"""What an artifact holds: a table by module, and plots."""

from pathlib import Path
from typing import Any

import torch

from deltacome.errors import DeltacomeError
from deltacome.format.artifact import Artifact
from deltacome.format.entries import WeightEntry
from deltacome.format.terms import Factored
from deltacome.weights import module_kind


def precision_text(entry: WeightEntry) -> str:
    """A weight's terms in short, such as `8:2,3:32,2:98`."""
    parts = [",".join(f"{bits}:{rank}" for bits, rank in entry.factored)] if entry.factored else []
    parts += ["sign"] if entry.sign else []
    parts += ["exact" if entry.dense == 0 else f"exact from row {entry.dense}"] if entry.dense is not None else []
    parts += ["bits"] if entry.coded else []
    return " + ".join(parts) or ("unchanged" if entry.error is None else "dropped")


def table(artifact: Artifact, by_weight: bool = False) -> list[dict[str, Any]]:
    """Rows of `module`, `weights` (how many), `shape`, `precision`, `bytes`, `ratio` and mean `error`.

    A row a module, all layers taken together, or a row a weight.
    """
    kinds: dict[str, list[WeightEntry]] = {}
    for entry in artifact.entries.values():
        kinds.setdefault(entry.name if by_weight else module_kind(entry.name), []).append(entry)
    rows = []
    for kind, entries in kinds.items():
        precisions = sorted({precision_text(entry) for entry in entries})
        errors = [entry.error for entry in entries if entry.error is not None]
        size = sum(entry.bytes for entry in entries)
        rows.append(
            {
                "module": kind,
                "weights": len(entries),
                "shape": " x ".join(map(str, entries[0].shape)),
                "precision": precisions[0]
                if len(precisions) == 1
                else f"{precisions[0]} and {len(precisions) - 1} more",
                "bytes": size,
                "ratio": round(2 * sum(entry.elements for entry in entries) / size, 2),
                "error": round(sum(errors) / len(errors), 4) if errors else None,
            }
        )
    return rows


def totals(artifact: Artifact) -> dict[str, Any]:
    """Sizes, ratios, method and base; of a delta on a delta also its `parent` and what the whole chain takes."""
    of_chain = {}
    if artifact.parent is not None:
        of_chain = {
            "parent": artifact.manifest["parent"]["name"],
            "chain_bytes": artifact.chain_bytes,
            "chain_ratio": round(artifact.finetuned_bytes / artifact.chain_bytes, 3),
        }
    return {
        "method": artifact.method,
        "base": artifact.base_name,
        "finetuned": artifact.manifest["finetuned"]["name"],
        "artifact_bytes": artifact.bytes,
        "finetuned_bytes": artifact.finetuned_bytes,
        "artifact_ratio": round(artifact.ratio, 3),
        "linear_ratio": artifact.manifest["linear_ratio"],
        **of_chain,
    }


def component_sizes(term: Factored) -> torch.Tensor:
    """Singular values as stored: the Frobenius norm of every component of a term, (rank,)."""
    u, v = term.vectors()
    return term.scale.float().abs() * u.norm(dim=1) * v.norm(dim=1)


COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]  # Okabe and Ito's


def import_pyplot() -> Any:
    """matplotlib's `pyplot`, which draws to files alone, in colors that color-blind people tell apart.

    Raises:
        DeltacomeError: if matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DeltacomeError("plots need matplotlib: pip install 'deltacome[plot]'") from error
    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    pyplot.rcParams["axes.prop_cycle"] = cycler(color=COLORS)
    return pyplot


def plot(artifact: Artifact, path: Path) -> None:
    """A picture of the stored singular values, and of the bits that each component got, by module.

    Raises:
        DeltacomeError: if matplotlib is missing, or the artifact has no components.
    """
    pyplot = import_pyplot()
    spectra: dict[str, list[torch.Tensor]] = {}
    widths: dict[str, list[torch.Tensor]] = {}
    for name, entry in artifact.entries.items():
        terms = [term for term in artifact.own_terms(name) if isinstance(term, Factored)]
        if terms:
            kind = module_kind(name).removesuffix(".weight").rpartition(".")[2]
            spectra.setdefault(kind, []).append(torch.cat([component_sizes(term) for term in terms]))
            widths.setdefault(kind, []).append(torch.tensor([b for b, rank in entry.factored for _ in range(rank)]))
    if not spectra:
        raise DeltacomeError(
            f"{artifact.folder} has no singular vectors to plot; its method is {artifact.method['name']}"
        )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    styles = ["-", "--", ":", "-."]
    for place, kind in enumerate(sorted(spectra)):
        style = {"label": kind, "linestyle": styles[place % 4], "color": f"C{place % 10}", "linewidth": 1.6}
        x, y = _median(spectra[kind])
        left.plot(x, y, **style)
        x, y = _median([width.float() for width in widths[kind]])
        right.step(x, y, where="mid", **style)
        right.plot(x[-1], y[-1], "o", color=style["color"], markersize=4)  # lines of one plan lie on each other
    left.set(xscale="log", yscale="log", xlabel="component", ylabel="norm of the component, its noise included")
    right.set(xscale="log", xlabel="component", ylabel="bits an entry", ylim=(0, None))
    left.set_title("Components as stored (median over layers)")
    right.set_title("Bits by component, up to the last one kept")
    right.legend(loc="upper right", fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{artifact.manifest['finetuned']['name']}: {artifact.method['name']}, 1/{artifact.ratio:.1f}")
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _median(rows: list[torch.Tensor]) -> tuple[list[int], list[float]]:
    """Component numbers, from 1, and the median at each over the rows that reach it."""
    longest = max(map(len, rows))
    values = [float(torch.stack([row[k] for row in rows if len(row) > k]).median()) for k in range(longest)]
    return list(range(1, longest + 1)), values
