"""Runs that are killed and gone on with, and two of them at once."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from commands import run, start
from conftest import Save, files, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.compression.journal import Store
from deltacome.compression.measuring import measure_inputs
from deltacome.outputs import work_folder


def test_results_are_the_same_every_time(base: Path, finetuned: Path, tmp_path: Path) -> None:
    for name in "ab":
        compress(base, finetuned, tmp_path / name, ratio=4)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_is_measured_is_the_same_when_it_is_read_again(base: Path, finetuned: Path, tmp_path: Path) -> None:
    """To the last bit: a run that goes on shares the bytes out by it, and must come to the same artifact."""
    opened, tuned = Checkpoint(base), Checkpoint(finetuned)
    matrices = [p for p in pair(opened, tuned) if p.is_matrix]
    store = Store(tmp_path)
    first, again = (measure_inputs(tuned, matrices, None, store, lambda message: None) for _ in range(2))
    assert first[1] == again[1] and len(first[1]) == len(matrices)
    assert first[0].keys() == again[0].keys() and all(torch.equal(first[0][name], again[0][name]) for name in first[0])


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
    arguments = ("compress", base, finetuned, "-o", out, "--ratio", 4)
    done: list[int] = []
    for weights in (3, 40, 150):
        process = start(tmp_path / "log", *arguments)
        deadline = time.monotonic() + 120
        while len(list(work_folder(out).glob("*.safetensors"))) < weights and time.monotonic() < deadline:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
        assert not out.exists()
        with pytest.raises(DeltacomeError):
            Artifact(out)
        with pytest.raises(DeltacomeError):
            Artifact(work_folder(out))
        done.append(len(list(work_folder(out).glob("*.safetensors"))))
    assert done == sorted(done) and done[0] >= 3
    result = run(*arguments)
    assert result.returncode == 0 and f"going on with the interrupted run: {done[-1]} of" in result.stderr
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


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def scaled(path: Path, factor: float) -> None:
    """Multiply every tensor of a file, which keeps its size."""
    save_file({name: factor * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda base, adapter: set_json(adapter / "adapter_config.json", lora_alpha=32),
        lambda base, adapter: set_json(adapter / "adapter_config.json", use_rslora=True),
        lambda base, adapter: scaled(adapter / "adapter_model.safetensors", 2),
        lambda base, adapter: scaled(base / "model.safetensors", 2),
        lambda base, adapter: set_json(base / "config.json", dtype="float32"),
    ],
    ids=["alpha", "scaling", "factors", "base", "base's configuration"],
)
def test_work_on_other_weights_is_not_used(
    change: Callable[[Path, Path], None], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fine-tuned weights are made of has changed since the run was broken off: it is begun anew."""
    shutil.copytree(base, tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(make_model(tie_word_embeddings=True), config).save_pretrained(tmp_path / "adapter")
    arguments = tmp_path / "base", tmp_path / "adapter"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("deltacome.compression.pipeline.write_artifact", interrupt)
        compress(*arguments, tmp_path / "delta", ratio=4)
    warnings: list[str] = []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("deltacome.compression.pipeline.write_artifact", interrupt)
        compress(*arguments, tmp_path / "delta", ratio=4, warn=warnings.append)
    assert any("going on with the interrupted run" in warning for warning in warnings)  # nothing has changed so far
    change(*arguments)
    warnings.clear()
    compress(*arguments, tmp_path / "delta", ratio=4, warn=warnings.append)
    assert not any("going on" in warning for warning in warnings)
    compress(*arguments, tmp_path / "clean", ratio=4)
    assert files(tmp_path / "delta") == files(tmp_path / "clean")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_processes_on_one_output(base: Path, finetuned: Path, tmp_path: Path) -> None:

    work_folder(tmp_path / "delta").mkdir()
    with (
        FileLock(work_folder(tmp_path / "delta") / "lock"),
        pytest.raises(DeltacomeError, match="another process is writing"),
    ):
        compress(base, finetuned, tmp_path / "delta")
