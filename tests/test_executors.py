"""Compression on a Ray cluster of two nodes, on this machine."""

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file

from conftest import Save, check_alike, fine_tune, make_model
from deltacome import Artifact, DeltacomeError, compress
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.compression.executors import LocalExecutor, RayExecutor, Task, make_executor
from deltacome.compression.journal import Store
from deltacome.compression.matrices import Matrices
from deltacome.compression.methods import make_method
from deltacome.weights import module_kind


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    try:
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        found.add_node(num_cpus=1)
        found.connect()
    except Exception as error:  # where processes may not listen, or have no shared memory
        pytest.skip(f"Ray does not start here: {error}")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def pair_of_models(save: Save) -> tuple[Path, Path]:
    model = make_model(hidden_size=256, intermediate_size=700, num_attention_heads=4, head_dim=64)
    base = save(model, "base")
    fine_tune(model)
    return base, save(model, "finetuned")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def work_in(folder: Path, base: Path, finetuned: Path) -> Matrices:
    folder.mkdir()
    checkpoints = Checkpoint(base), Checkpoint(finetuned)
    pairs = {p.name: p for p in pair(*checkpoints)}
    method = make_method("delta-come", precision="2:3")
    store = Store(folder)
    return Matrices(*checkpoints, method, store, pairs, Counter(map(module_kind, pairs)), 1.0, store)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "README.md"}


def dying_once(name: str) -> Task:
    """`Matrices.compress`, but for the process that is the first to work on that matrix, which is killed."""

    def compress(work: Matrices, this: str) -> None:
        mark = work.store.folder / "begun"
        begun = mark.exists()
        if this == name and not begun:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        work.compress(this)

    return compress


@pytest.mark.usefixtures("one_thread")
def test_the_result_is_the_local_one_though_a_worker_is_killed(
    cluster: Cluster, pair_of_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(*pair_of_models, tmp_path / "local", ratio=4)
    monkeypatch.setattr(Matrices, "compress", dying_once("model.layers.1.mlp.up_proj.weight"))  # in this process alone
    compress(*pair_of_models, tmp_path / "spread", ratio=4, engine="ray")
    assert contents(tmp_path / "local") == contents(tmp_path / "spread")


@pytest.mark.usefixtures("one_thread")
def test_what_a_lost_worker_was_at_is_done_again(
    cluster: Cluster, pair_of_models: tuple[Path, Path], tmp_path: Path
) -> None:
    work, alone = (work_in(tmp_path / name, *pair_of_models) for name in ("work", "alone"))
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")]
    assert sorted(RayExecutor().each(dying_once(names[3]), work, names)) == sorted(names)
    assert (tmp_path / "work" / "begun").exists()  # somebody died
    assert list(LocalExecutor().each(Matrices.compress, alone, names)) == names
    for name in names:
        ours, theirs = (load_file(store.path(name)) for store in (work.store, alone.store))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    def dies(work: Matrices, name: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DeltacomeError, match=f"Ray gave up on {names[0]}"):
        list(RayExecutor().each(dies, work, names[:1]))


def test_a_lost_node(cluster: Cluster, pair_of_models: tuple[Path, Path], tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    work = work_in(tmp_path / "work", *pair_of_models)

    def slow(work: Matrices, name: str) -> None:
        time.sleep(0.5)

    done: list[str] = []
    for name in RayExecutor().each(slow, work, sorted(work.pairs)[:9]):
        done.append(name)
        if len(done) == 3:
            cluster.remove_node(node, allow_graceful=False)
    assert len(set(done)) == 9


def test_bad_input_on_a_worker_is_one_sentence(cluster: Cluster, pair_of_models: Any, tmp_path: Path) -> None:
    work = work_in(tmp_path / "work", *pair_of_models)
    stranger = replace(work.pairs["lm_head.weight"], name="no.such.weight")
    work = replace(work, pairs={**work.pairs, stranger.name: stranger})
    with pytest.raises(KeyError):
        list(RayExecutor().each(Matrices.compress, work, ["no.such.weight"]))
    (tmp_path / "work").rmdir()
    with pytest.raises(DeltacomeError, match="must be on storage that all nodes share"):
        list(RayExecutor().each(Matrices.compress, work, ["lm_head.weight"]))


def test_engines_are_named(pair_of_models: Any, tmp_path: Path) -> None:
    with pytest.raises(DeltacomeError, match="no engine 'slurm'; choose local or ray"):
        make_executor("slurm")  # type: ignore[arg-type]


def test_calibration_layer_by_layer_is_local(pair_of_models: Any, examples: Path, tmp_path: Path) -> None:
    with pytest.raises(DeltacomeError, match="layer by layer; leave out --engine ray"):
        compress(*pair_of_models, tmp_path / "o", method="delta-come", calibration=examples, engine="ray")


@pytest.mark.parametrize("method", ["rate-distortion", "delta-come", "low-rank", "bitdelta", "lossless"])
def test_side_by_side_as_one_after_the_other(
    method: str, pair_of_models: tuple[Path, Path], tmp_path: Path, one_thread: None
) -> None:
    ratio = None if method in ("bitdelta", "lossless") else 4
    for threads in (1, 3):
        torch.set_num_threads(threads)
        compress(*pair_of_models, tmp_path / str(threads), ratio=ratio, method=method, device="cpu")
        assert torch.get_num_threads() == threads
    check_alike(*(Artifact(tmp_path / threads) for threads in "13"))
    if method == "lossless":
        assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_bad_input_side_by_side_is_one_sentence(pair_of_models: tuple[Path, Path], tmp_path: Path) -> None:
    base, finetuned = pair_of_models
    broken = tmp_path / "broken"
    shutil.copytree(finetuned, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(DeltacomeError, match="holds NaN or infinity"):
            compress(base, broken, tmp_path / "out", ratio=4, device="cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_weight_without_entries(pair_of_models: tuple[Path, Path], tmp_path: Path) -> None:
    places = []
    for folder in pair_of_models:
        place = tmp_path / f"with-{folder.name}"
        shutil.copytree(folder, place)
        tensors = load_file(place / "model.safetensors")
        save_file({**tensors, "empty": torch.zeros(0, 3)}, place / "model.safetensors", {"format": "pt"})
        places.append(place)
    for method in ("rate-distortion", "lossless"):
        compress(*places, tmp_path / method, method=method, device="cpu")
        assert Artifact(tmp_path / method).entries["empty"].shape == (0, 3)
