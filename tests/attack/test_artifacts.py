"""Thousands of damaged and forged artifacts through every door: `make attack` does 10,000 and more, the tests a few."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import mutations
import pytest
import torch
from mutations import DAMAGE, FORGERIES, Files

from commands import run
from conftest import Save, fine_tune, make_model, make_other
from deltacome import Artifact, DeltacomeError, compress, load, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.compression.methods import rate_distortion
from deltacome.format.artifact import digests
from deltacome.memory import Peak, peak_memory

MOST_MEMORY = 2**30  # bytes more than at the start
MOST_SECONDS = 20  # for one artifact through one door, on a machine that has other work
IDS = torch.arange(2, 8)[None]


class Doors:
    """Ways in for an artifact of one base. Each returns what `merge` or `load` made of it, or raises."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.model: Any = load(base)
        self.out = folder / "out"

    def open(self, delta: Path) -> None:
        Artifact(delta)

    def verify(self, delta: Path) -> None:
        """The command; its one sentence stands for the error."""
        result = run("verify", delta, "--base", self.base)
        if result.returncode:
            assert result.returncode == 1 and result.stderr.count("error: ") == 1, result.stderr
            raise DeltacomeError(result.stderr)

    def inspect(self, delta: Path) -> None:
        result = run("inspect", delta, "--json")
        if result.returncode:
            raise DeltacomeError(result.stderr)

    def merge(self, delta: Path) -> None:
        """What is accepted has the shapes that the artifact names, and there is no half of it otherwise."""
        shutil.rmtree(self.out, ignore_errors=True)
        try:
            merge(self.base, delta, self.out)
        except DeltacomeError:
            assert not self.out.exists()
            raise
        artifact, merged = Artifact(delta), Checkpoint(self.out)
        found = {name: list(info.shape) for name, info in merged.tensors.items()}
        assert found == {name: list(entry.shape) for name, entry in artifact.entries.items()}

    def load(self, delta: Path) -> None:
        """What is accepted computes."""
        tenant = self.model.tenants.read("x", delta)
        with torch.inference_mode():
            assert self.model(input_ids=IDS, tenants=[tenant]).logits.shape[:2] == IDS.shape


DOORS: dict[str, Callable[[Doors, Path], None]] = {
    "open": Doors.open,
    "verify": Doors.verify,
    "merge": Doors.merge,
    "load": Doors.load,
    "inspect": Doors.inspect,
}
CHECKING = ("verify", "merge", "load")  # promise to notice any damage


@pytest.fixture(scope="module")
def artifacts(save: Save, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Doors, Files]]:
    """Sketches, embeddings by rows, a grown vocabulary, biases and groups, signs, coded bits, a delta on another."""
    found = []
    kinds: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (lambda: make_model(num_hidden_layers=1, tie_word_embeddings=True), {"ratio": 3}),
        (
            lambda: make_other("qwen2", num_hidden_layers=1),
            {"precision": "8:1,2:6", "scale": "minmax", "group_size": 16},
        ),
        (lambda: make_model(num_hidden_layers=1), {"method": "bitdelta"}),
        (lambda: make_model(num_hidden_layers=1), {"method": "lossless"}),  # which is not to be loaded beside the base
        (lambda: make_model(num_hidden_layers=1, tie_word_embeddings=True), {"ratio": 3, "parent": "parent"}),
    ]
    for number, (make, options) in enumerate(kinds):
        model = make()
        base = save(model, "base")
        fine_tune(model)
        if "ratio" in options:
            model.resize_token_embeddings(262, mean_resizing=False)
        finetuned = save(model, "finetuned")
        (finetuned / "chat_template.jinja").write_text("{{ messages }}")
        (finetuned / "generation_config.json").write_text('{"eos_token_id": 1, "max_length": 20, "more": {"a": [1]}}')
        folder = tmp_path_factory.mktemp("doors")
        if "parent" in options:
            options["parent"] = folder / "parent"
            compress(base, finetuned, folder / "parent", ratio=3)
            fine_tune(model, 2)
            finetuned = save(model, "next")
        with pytest.MonkeyPatch.context() as patch:
            if not number:
                patch.setattr(rate_distortion, "FLAT", 0.0)
            compress(base, finetuned, folder / "delta", **options)
        files = {path.name: path.read_bytes() for path in (folder / "delta").iterdir()}
        assert {"config.json", "generation_config.json", "chat_template.jinja"} <= files.keys() or number
        doors = Doors(base, folder)
        doors.is_served = options.get("method") != "lossless"
        for door, through in DOORS.items():
            if door != "load" or doors.is_served:
                through(doors, folder / "delta")  # compiles kernels too
        found.append((doors, files))
    return found


@pytest.fixture(autouse=True)
def every_digest_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(digests, "_known", {})
    yield


class Tally:
    """What came of it all, by kind of change and door."""

    def __init__(self, peak: Peak) -> None:
        self.peak = peak
        self.refused: Counter[tuple[str, str]] = Counter()
        self.accepted: Counter[tuple[str, str]] = Counter()
        self.slowest, self.started = 0.0, time.monotonic()
        self.kinds: Counter[str] = Counter()

    def go(self, kind: str, door: str, doors: Doors, delta: Path) -> bool:
        """Whether the artifact gets through."""
        before = time.monotonic()
        try:
            DOORS[door](doors, delta)
            passed = True
        except DeltacomeError as error:
            passed = False
            assert "\n" not in str(error).strip() or door in ("verify", "inspect")
        seconds = time.monotonic() - before
        self.slowest = max(self.slowest, seconds)
        assert seconds < MOST_SECONDS
        (self.accepted if passed else self.refused)[kind, door] += 1
        return passed

    def __str__(self) -> str:
        lines = []
        for kind, count in self.kinds.items():
            parts = [
                f"{door} {self.refused[kind, door]:,} refused, {self.accepted[kind, door]:,} not" for door in DOORS
            ]
            lines.append(f"{count:,} of {kind}: {'; '.join(parts)}")
        seconds = time.monotonic() - self.started
        lines.append(
            f"{seconds:.0f} s, the slowest {self.slowest:.2f} s, peak memory {self.peak.bytes / 2**20:.0f} MiB"
        )
        return "\n".join(lines)


def attack(tally: Tally, kind: str, seed: int, doors: Doors, original: Files) -> None:
    """One artifact, changed by its seed, through every door."""
    random, files = Random(f"{kind} {seed}"), dict(original)
    delta = doors.folder / "changed"
    if kind == "links":
        mutations.write(files, delta)
        same = mutations.links(delta, random)
    else:
        if kind == "damage":
            random.choice(DAMAGE)(files, random)
        else:
            random.choice(FORGERIES)(files, random)
            if random.random() < 0.25:
                with suppress(Exception):  # the first may have left nothing that can be edited
                    random.choice(FORGERIES)(files, random)
        same = files == original
        mutations.write(files, delta)
    tally.kinds[kind] += 1
    passed = {door: tally.go(kind, door, doors, delta) for door in DOORS}
    if same:
        assert all(passed[door] for door in DOORS if door != "load" or doors.is_served)
    elif kind != "forgeries":
        assert not any(passed[door] for door in CHECKING)
    elif not passed["verify"]:
        assert not passed["merge"] and not passed["load"]
    if not passed["open"]:
        assert not any(passed.values())


@pytest.mark.parametrize("is_long", [False, pytest.param(True, marks=pytest.mark.attack)])
def test_no_artifact_gets_through_that_should_not(
    is_long: bool, artifacts: list[tuple[Doors, Files]], pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    count = pytestconfig.getoption("--attack-count") if is_long else 60
    failures: list[str] = []
    with peak_memory() as peak:
        tally = Tally(peak)
        for seed in range(count):
            kind = "links" if seed % 20 == 19 else "damage" if seed % 5 < 2 else "forgeries"
            try:
                attack(tally, kind, seed, *artifacts[seed % len(artifacts)])
            except Exception as error:
                failures.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]}")
            if is_long and (seed + 1) % 1000 in (0, count % 1000):
                with capsys.disabled():
                    print(f"\n{tally}\n{len(failures)} failures {failures[-3:]}", flush=True)
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:40])
    assert peak.bytes < MOST_MEMORY
