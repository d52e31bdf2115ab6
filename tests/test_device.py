"""Compression on another device than the CPU, a pretended one where there is no GPU."""

import json
from pathlib import Path

import pytest

from commands import start
from conftest import Save, check_alike, fine_tune, make_any
from deltacome import Artifact, DeltacomeError, compress
from deltacome.device import choose_device


def compress_elsewhere() -> None:
    from elsewhere import main  # which changes torch

    main()


@pytest.mark.parametrize(
    ("family", "method", "has_data"),
    [
        ("llama", "rate-distortion", True),
        ("llama", "delta-come", True),
        ("llama", "low-rank", False),
        ("llama", "bitdelta", False),
        ("mixtral", "rate-distortion", False),
    ],
)
def test_nothing_is_left_on_the_cpu_by_mistake(
    family: str, method: str, has_data: bool, save: Save, examples: Path, tmp_path: Path
) -> None:
    """Every operator that takes tensors of two devices fails, as on a GPU; and what comes out is the CPU's."""
    model = make_any(family)
    base = save(model, "base")
    fine_tune(model)
    finetuned = save(model, "finetuned")
    data = [examples] if has_data else []
    log = tmp_path / "log"
    process = start(log, base, finetuned, tmp_path / "there", method, *data, command=compress_elsewhere)
    process.join(120)
    assert process.exitcode == 0, log.read_text()[-2000:]
    ratio, calibration = None if method == "bitdelta" else 4, examples if has_data else None
    compress(base, finetuned, tmp_path / "here", ratio=ratio, method=method, calibration=calibration, device="cpu")
    check_alike(Artifact(tmp_path / "there"), Artifact(tmp_path / "here"))


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(DeltacomeError, match="choose cpu"):
        choose_device(name)


def test_phases_make_up_the_time(base: Path, finetuned: Path, tmp_path: Path) -> None:
    report = compress(base, finetuned, tmp_path / "delta", ratio=4, device="cpu")
    assert list(report["phases"]) == ["exact weights", "inputs", "singular values", "codes", "writing"]
    assert 0.5 * report["seconds"] < sum(report["phases"].values()) <= report["seconds"] + 0.05
    assert json.dumps(report)
