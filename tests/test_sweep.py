"""Several ratios in one run."""

import json
from pathlib import Path
from typing import Any

import pytest

from commands import fail, succeed
from conftest import files
from deltacome import DeltacomeError, compress
from deltacome.compression import svd
from deltacome.outputs import work_folder


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of all that is decomposed from now on."""
    found: list[tuple[int, ...]] = []
    eigen = svd._eigen

    def counted(delta: Any) -> Any:
        found.append(tuple(delta.shape))
        return eigen(delta)

    monkeypatch.setattr(svd, "_eigen", counted)
    return found


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["rate-distortion", "delta-come"])
def test_each_artifact_is_what_it_would_be_alone(base: Path, finetuned: Path, tmp_path: Path, method: str) -> None:
    report = compress(base, finetuned, tmp_path / "sweep", ratio=(6, 4), method=method)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["4", "6"]
    for ratio, own in zip((4, 6), report["artifacts"], strict=True):
        alone = compress(base, finetuned, tmp_path / f"{ratio}", ratio=ratio, method=method)
        assert files(tmp_path / "sweep" / f"{ratio}") == files(tmp_path / f"{ratio}")
        assert own["artifact_bytes"] == alone["artifact_bytes"]
        assert own["artifact"] == str(tmp_path / "sweep" / f"{ratio}")
    assert not list(tmp_path.glob(".*"))


def test_matrices_are_decomposed_once(
    base: Path, finetuned: Path, tmp_path: Path, decomposed: list[tuple[int, ...]]
) -> None:
    compress(base, finetuned, tmp_path / "one", ratio=4)
    once = sorted(decomposed)
    decomposed.clear()
    compress(base, finetuned, tmp_path / "three", ratio=[4, 5, 6])
    assert once and sorted(decomposed) == once


def test_a_broken_off_sweep_is_gone_on_with(
    base: Path, finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decomposed: list[tuple[int, ...]]
) -> None:
    compress(base, finetuned, tmp_path / "whole", ratio=(4, 6))
    out = tmp_path / "sweep"
    from deltacome.compression import pipeline

    write, written = pipeline.write_artifact, []

    def second_fails(*arguments: Any) -> None:
        written.append(arguments)
        (write if len(written) == 1 else interrupt)(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "write_artifact", second_fails)
        compress(base, finetuned, out, ratio=(4, 6))
    assert not out.exists() and work_folder(out).exists()
    decomposed.clear()
    warnings: list[str] = []
    compress(base, finetuned, out, ratio=(4, 6), warn=warnings.append)
    assert not decomposed and any("going on" in warning for warning in warnings)
    for ratio in "46":
        assert files(out / ratio) == files(tmp_path / "whole" / ratio)
    assert not list(tmp_path.glob(".*"))


def test_a_ratio_that_cannot_be_reached_is_found_out_before_the_work(
    base: Path, finetuned: Path, tmp_path: Path, decomposed: list[tuple[int, ...]]
) -> None:
    with pytest.raises(DeltacomeError, match="a ratio of 3000 cannot be reached"):
        compress(base, finetuned, tmp_path / "sweep", ratio=(4, 3000))
    assert not decomposed and not list(tmp_path.iterdir())


def test_the_command_takes_a_list(base: Path, finetuned: Path, tmp_path: Path) -> None:
    arguments = ["compress", base, finetuned, "-o", tmp_path / "sweep"]
    report = json.loads(succeed(*arguments, "--ratio", "4,6", "--json"))
    assert [Path(own["artifact"]).name for own in report["artifacts"]] == ["4", "6"]
    arguments[-1] = tmp_path / "other"
    for wrong in ("4,x", "4,", "x"):
        fail(f"--ratio {wrong} is no number", *arguments, "--ratio", wrong)
    fail("method bitdelta fixes the size by itself", *arguments, "--ratio", "4,6", "--method", "bitdelta")
    fail("give one ratio", *arguments, "--ratio", "4,6", "--parent", tmp_path / "sweep" / "4")
    fail("there is no device 'gpu'", *arguments, "--device", "gpu")
    assert not (tmp_path / "other").exists()
