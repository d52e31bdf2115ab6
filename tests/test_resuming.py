"""Runs that are killed and gone on with, and two of them at once."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import save_file

from conftest import Save, files, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress
from deltacome.outputs import work_folder


def test_results_are_the_same_every_time(base: Path, finetuned: Path, tmp_path: Path) -> None:
    for name in "ab":
        compress(base, finetuned, tmp_path / name, ratio=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_killed_run_leaves_nothing_that_opens_and_is_resumed(
    save: Save, base: Path, finetuned: Path, tmp_path: Path
) -> None:
    """Real processes, killed without warning at different moments, until one gets through."""
    model = make_model(num_hidden_layers=30)
    base = save(model)
    fine_tune(model)
    finetuned = save(model)
    compress(base, finetuned, tmp_path / "whole", ratio=4)
    out = tmp_path / "delta"
    command = [
        sys.executable,
        "-m",
        "deltacome.cli",
        "compress",
        str(base),
        str(finetuned),
        "-o",
        str(out),
        "--ratio",
        "4",
    ]
    done: list[int] = []
    for weights in (3, 40, 150):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(work_folder(out).glob("*.safetensors"))) < weights and time.monotonic() < deadline:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        with pytest.raises(DeltacomeError):
            Artifact(out)
        with pytest.raises(DeltacomeError):
            Artifact(work_folder(out))
        done.append(len(list(work_folder(out).glob("*.safetensors"))))
    assert done == sorted(done) and done[0] >= 3
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"going on with the interrupted run: {done[-1]} of" in result.stderr
    assert files(out) == files(tmp_path / "whole")
    assert not work_folder(out).exists()


def test_work_of_another_job_is_not_used(base: Path, finetuned: Path, tmp_path: Path) -> None:
    work = work_folder(tmp_path / "delta")
    work.mkdir()
    (work / "job.json").write_text('{"another": "job"}')
    save_file({}, work / "0.safetensors", {"name": "model.norm.weight", "fields": '{"shape":[1],"dtype":"F32"}'})
    compress(base, finetuned, tmp_path / "delta", ratio=4)
    compress(base, finetuned, tmp_path / "clean", ratio=4)
    assert files(tmp_path / "delta") == files(tmp_path / "clean")


def test_two_processes_on_one_output(base: Path, finetuned: Path, tmp_path: Path) -> None:

    work_folder(tmp_path / "delta").mkdir()
    with (
        FileLock(work_folder(tmp_path / "delta") / "lock"),
        pytest.raises(DeltacomeError, match="another process is writing"),
    ):
        compress(base, finetuned, tmp_path / "delta")
