import csv
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import fail, succeed
from conftest import Save, fine_tune, make_model
from deltacome import Artifact, DeltacomeError
from deltacome.benchmark import gpu_check, random_model
from deltacome.benchmark import quality as module
from deltacome.benchmark.quality import quality
from deltacome.benchmark.suite import read_suite
from deltacome.data import Encoded, Encoder
from deltacome.evaluate.comparison import evaluate
from deltacome.evaluate.metrics import answer, divergence
from deltacome.restore.merging import load_merged

PROMPTS = {"math": [f"What is {i} + 3?" for i in range(6)], "intent": [f"Where is card number {i}?" for i in range(5)]}
METHODS = {
    "delta-come": {"method": "delta-come"},
    "low-rank 16 bit": {"method": "low-rank"},
    "sign": {"method": "bitdelta", "embeddings": "exact"},
}
CELLS = [
    ("base", None),
    ("fine-tuned", None),
    *((name, r) for name in list(METHODS)[:2] for r in (4, 8)),
    ("sign", None),
]


@pytest.fixture(scope="module")
def suite(save: Save, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite whose right answers are those of the fine-tuned models."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copytree(base, folder / "base")
    for seed, (name, prompts) in enumerate(PROMPTS.items(), 3):  # seeds that change every answer
        model = make_model(tie_word_embeddings=True)
        fine_tune(model, seed, 0.15)
        shutil.copytree(save(model), folder / name)
        loaded = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        encoder = Encoder(AutoTokenizer.from_pretrained(folder / name))
        asked = [Encoded(encoder.prompt(({"role": "user", "content": prompt},))) for prompt in prompts]
        answers = answer(loaded, encoder.tokenizer, asked, 6)
        write(folder / f"{name}.jsonl", [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)])
    write(folder / "prose.jsonl", [{"text": "Off the task."}, {"text": "More of it, and longer."}])
    finetunes = {name: {"model": name, "data": f"{name}.jsonl", "new_tokens": 6} for name in PROMPTS}
    content = {"base": "base", "finetunes": finetunes, "methods": METHODS, "ratios": [4, 8], "offtask": "prose.jsonl"}
    (folder / "suite.json").write_text(json.dumps(content))
    return folder / "suite.json"


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def changed(suite: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the suite, beside it, after a change."""
    content = json.loads(suite.read_text())
    change(content)
    path = suite.with_name(f"{name}.json")
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def finished(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark") / "out"
    rows = json.loads(succeed("benchmark", "quality", suite, "-o", out, "--json"))
    assert [(row["finetune"], row["name"], row["ratio"]) for row in rows] == [(f, *c) for f in PROMPTS for c in CELLS]
    (out / "rows.json").write_text(json.dumps(rows))
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A finished run to go on from."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been compressed, and rebuilt in order to be measured."""
    calls: list[str] = []
    monkeypatch.setattr(module, "_can_plot", lambda: False)  # it takes most of the time

    def watch(name: str, where: Callable[..., Path]) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(f"{name} {'/'.join(where(*arguments).parts[-3:])}")
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    watch("compress", lambda base, finetuned, out: out)
    watch("load_merged", lambda base, artifact: artifact.folder)
    return calls


def test_every_figure_is_in_every_place(finished: Path) -> None:
    rows = json.loads((finished / "rows.json").read_text())
    with (finished / "quality.csv").open() as file:
        lines = list(csv.DictReader(file))
    tables = (finished / "quality.md").read_text()
    assert len(lines) == len(rows) == tables.count("\n| ") - 4 and "\n\n## math\n\n| model |" in tables
    saved = json.loads((finished / "quality.json").read_text())
    assert saved["command"] and saved["machine"] and saved["date"] and len(saved["tables"]) == 2
    kept = [row for table in saved["tables"] for row in table["rows"]]
    assert kept == [{key: value for key, value in row.items() if key != "outputs"} for row in rows]
    for row, line in zip(rows, lines, strict=True):
        assert all(line[key] == ("" if row[key] is None else str(row[key])) for key in line.keys() & row.keys())
        assert line["retention"] and line["retention_error"] and line["other_kl"] and line["off_task_kl_error"]
        assert f"{row['on_task_kl']:.5f} ± {row['on_task_kl_error']:.5f}" in tables
        place = [row["name"].replace(" ", "-"), *([str(row["ratio"])] if row["ratio"] else [])]
        stored = json.loads((finished / "rows" / row["finetune"] / f"{'/'.join(place)}.json").read_text())
        assert stored.pop("digest") and stored == row
        if row["name"] not in ("base", "fine-tuned"):
            artifact = Artifact(finished.joinpath("artifacts", row["finetune"], *place))
            assert row["bytes"] == artifact.bytes and row["compress_seconds"] > 0
            assert row["ratio"] is None or artifact.ratio >= row["ratio"] * 0.99
    png = (finished / "quality.png").read_bytes()
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[20:24]) > 800  # two rows of panels
    by_cell = {(row["finetune"], row["name"], row["ratio"]): row for row in rows}
    for name in PROMPTS:
        assert by_cell[name, "base", None]["retention"] == 0 and by_cell[name, "fine-tuned", None]["retention"] == 1
        assert by_cell[name, "fine-tuned", None]["other_kl"] == pytest.approx(0, abs=1e-6)
        kl = [by_cell[name, "delta-come", ratio]["on_task_kl"] for ratio in (4, 8)]
        assert 0 < kl[0] < kl[1] < by_cell[name, "base", None]["on_task_kl"]


def test_the_figures_are_those_of_evaluate(suite: Path, finished: Path) -> None:
    folder = suite.parent
    rows = json.loads((finished / "rows.json").read_text())[:7]
    places = {"a": "delta-come/8", "b": "low-rank-16-bit/4", "c": "sign"}
    deltas: dict[str, Any] = {name: finished / "artifacts/math" / place for name, place in places.items()}
    options = {"offtask": folder / "prose.jsonl", "new_tokens": 6}
    expected = evaluate(folder / "base", folder / "math", deltas, folder / "math.jsonl", **options)
    for row, wanted in zip([rows[0], rows[1], rows[3], rows[4], rows[6]], expected, strict=True):
        for key in wanted.keys() - {"name", "seconds"}:
            same = row[key] == wanted[key]
            assert same or row[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6), (row["name"], key)


def test_other_kl_is_over_all_of_the_other_prompts(suite: Path, finished: Path, tmp_path: Path) -> None:
    folder = suite.parent
    base, math = (
        AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float32).eval() for n in ("base", "math")
    )
    encoder = Encoder(AutoTokenizer.from_pretrained(folder / "math"))
    prompts = [Encoded(encoder.prompt(({"role": "user", "content": prompt},))) for prompt in PROMPTS["intent"]]
    kl, _ = divergence(math, base, prompts, lambda _: None)
    row = json.loads((finished / "rows/math/base.json").read_text())
    assert row["other_kl"] == pytest.approx(kl.value, rel=1e-3)

    few = changed(suite, "few", lambda content: content.update(other_prompts=2, methods={"sign": METHODS["sign"]}))
    kl, _ = divergence(math, base, prompts[:2], lambda _: None)
    assert quality(few, tmp_path / "few")[0]["other_kl"] == pytest.approx(kl.value, rel=1e-3)


def test_a_finished_run_has_nothing_to_do(
    suite: Path, out: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Comparison", None)  # nothing is loaded
    assert quality(suite, out) == json.loads((out / "rows.json").read_text()) and log == []


def test_a_killed_run_does_only_what_is_missing(
    suite: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = changed(suite, "one", lambda content: content["finetunes"].pop("intent"))
    out = tmp_path / "out"

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    def killed_on_second(base: Any, artifact: Artifact) -> Any:
        return load_merged(base, artifact) if artifact.folder.name == "4" else killed()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "load_merged", killed_on_second)  # after compressing the second cell
        quality(one, out)
    assert log == ["compress math/delta-come/4", "compress math/delta-come/8"]
    with (out / "quality.csv").open() as file:
        assert [(line["name"], line["ratio"]) for line in csv.DictReader(file)] == [
            *(("base", ""), ("fine-tuned", "")),
            ("delta-come", "4"),
        ]
    log.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("deltacome.compression.pipeline.write_artifact", killed)  # within the third
        quality(one, out)
    assert log == ["load_merged math/delta-come/8", "compress math/low-rank-16-bit/4"]
    log.clear()
    rows = quality(one, out)
    rest = ["math/low-rank-16-bit/4", "math/low-rank-16-bit/8", "out/artifacts/math/sign"]
    assert [call.split()[1].removeprefix("out/") for call in log] == [
        place.removeprefix("out/") for place in rest for _ in range(2)
    ]
    assert [(row["name"], row["ratio"]) for row in rows] == CELLS
    assert [row["name"] for row in rows if row.get("compress_seconds", 0) is None] == ["low-rank 16 bit"]
    assert all("other_kl" not in row for row in rows)


def test_changed_entries_are_done_again(suite: Path, out: Path, log: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("rows/**/*.json")}
    least = changed(suite, "least", lambda c: c["methods"]["delta-come"].update(scale="least-squares"))
    rows = quality(least, out)
    assert [call.split()[1] for call in log] == [f"{f}/delta-come/{r}" for f in PROMPTS for r in (4, 8) for _ in "ab"]
    assert Artifact(out / "artifacts/math/delta-come/4").method["scale"] == "least-squares"
    touched = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert touched == {path for path in before if path.parent.name == "delta-come"}
    log.clear()
    longer = changed(least, "longer", lambda c: c["finetunes"]["math"].update(new_tokens=7))
    again = quality(longer, out)
    assert len(log) == 5 and all(call.startswith("load_merged ") and "math/" in call for call in log)
    assert again[7:] == rows[7:] and again[2]["outputs"] != rows[2]["outputs"]


def test_the_bases_row_alone_is_done_again(suite: Path, out: Path, log: list[str]) -> None:
    (out / "rows/math/base.json").unlink()
    before = json.loads((out / "rows.json").read_text())
    assert quality(suite, out)[0].keys() == before[0].keys() and log == []


def test_calibration_is_what_an_artifact_depends_on(suite: Path, tmp_path: Path, log: list[str]) -> None:
    shutil.copy(suite.with_name("math.jsonl"), suite.with_name("train.jsonl"))
    finetune = {"model": "math", "data": "math.jsonl", "new_tokens": 1, "calibration": "train.jsonl"}
    gptq = {"method": "delta-come", "calibrate": True, "calibration_examples": 2}
    content = {"base": "base", "finetunes": {"math": finetune}, "methods": {"gptq": gptq}, "ratios": [4]}
    calibrated = changed(suite, "calibrated", lambda c: (c.clear(), c.update(content)))
    quality(calibrated, tmp_path / "out")
    assert Artifact(tmp_path / "out/artifacts/math/gptq/4").method["calibration_examples"] == 2
    write(suite.with_name("train.jsonl"), [{"text": "Another one."}, {"text": "And one more."}])
    quality(calibrated, tmp_path / "out")
    assert log == ["compress math/gptq/4", "load_merged math/gptq/4"] * 2


def test_a_ratio_that_cannot_be_reached_is_a_row(suite: Path, out: Path, log: list[str]) -> None:
    high = changed(suite, "high", lambda content: content.update(ratios=[4, 8, 5000]))
    rows = quality(high, out)
    failed = [row for row in rows if "failed" in row]
    assert len(rows) == 18 and len(failed) == 4 and len(log) == 4
    assert all("a ratio of 5000 cannot be reached" in row["failed"] and row["ratio"] == 5000 for row in failed)
    assert (out / "quality.md").read_text().count("a ratio of 5000 cannot be reached") == 4
    with (out / "quality.csv").open() as file:
        assert [line["failed"] for line in csv.DictReader(file)] == [row.get("failed", "") for row in rows]
    assert quality(high, out) == rows and len(log) == 4
    assert {path.name for path in (out / "artifacts/math/delta-come").iterdir()} == {"4", "4.json", "8", "8.json"}


def test_a_full_disk_is_not_the_cells_fault(
    suite: Path, out: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(out / "rows/math/delta-come")
    shutil.rmtree(out / "artifacts/math/delta-come")

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch, pytest.raises(DeltacomeError, match="the disk is full"):
        patch.setattr("deltacome.compression.pipeline.write_artifact", full)
        quality(suite, out)
    assert not (out / "rows/math/delta-come").exists()
    assert "failed" not in {key for row in quality(suite, out) for key in row}


def test_without_matplotlib(
    suite: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "quality.png").unlink()
    (out / "rows/math/sign.json").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    quality(suite, out)
    assert capsys.readouterr().err.count("warning: no picture: plots need matplotlib") == 1
    assert not (out / "quality.png").exists()


def test_a_limit_and_two_at_once(suite: Path, finished: Path, tmp_path: Path) -> None:
    plain = {"base": "base", "finetunes": {"math": {"model": "math", "data": "math.jsonl", "new_tokens": 1}}}
    small = changed(suite, "small", lambda c: (c.clear(), c.update(plain, methods={"s": METHODS["sign"]}, ratios=[4])))
    rows = quality(small, tmp_path / "out", limit=2)
    assert all(len(row["outputs"]) == 2 and "off_task_kl" not in row for row in rows) and len(rows) == 3
    with FileLock(tmp_path / "out/.lock"), pytest.raises(DeltacomeError, match="another process is writing"):
        quality(small, tmp_path / "out")


BAD: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("there is no key `ration`", lambda c: c.update(ration=[3])),
    ("there is no key `tokens`", lambda c: c["finetunes"]["math"].update(tokens=3)),
    ("`ratios` is missing", lambda c: c.pop("ratios")),
    ("`ratios` must be a list", lambda c: c.update(ratios=4)),
    ("`new_tokens` must be a whole number", lambda c: c["finetunes"]["math"].update(new_tokens=True)),
    ("leave no room", lambda c: c["finetunes"]["math"].update(new_tokens=0)),
    ("a ratio of '4' means nothing", lambda c: c.update(ratios=["4"])),
    ("a ratio of -4 means nothing", lambda c: c.update(ratios=[-4])),
    ("`ratios`: '4' is like '4'", lambda c: c.update(ratios=[4, 4.0])),
    ("`ratios` is empty", lambda c: c.update(ratios=[])),
    ("`methods` is empty", lambda c: c.update(methods={})),
    ("method x: there is no method 'magic'", lambda c: c["methods"].update(x={"method": "magic"})),
    ("method low-rank has no setting scale", lambda c: c["methods"].update(x={"method": "low-rank", "scale": "mean"})),
    ("method x: needs an object", lambda c: c["methods"].update(x={"scale": "mean"})),
    ("method x: ", lambda c: c["methods"].update(x={"method": "delta-come", "precision": 3})),
    ("method x: ", lambda c: c["methods"].update(x={"method": "delta-come", "group_size": "3"})),
    ("`embeddings` must be", lambda c: c["methods"]["sign"].update(embeddings="drop")),
    ("`calibration_examples` must be", lambda c: c["methods"]["sign"].update(calibration_examples="8")),
    ("`calibrate` must be", lambda c: c["methods"]["sign"].update(calibrate=1)),
    ("`ratio` is no setting", lambda c: c["methods"]["sign"].update(ratio=4)),
    ("has no `calibration`, which method sign", lambda c: c["methods"]["sign"].update(calibrate=True)),
    ('add "calibrate": true', lambda c: c["methods"]["sign"].update(scale="refit")),
    ("'base' is like 'base'", lambda c: c["methods"].update(base={"method": "bitdelta"})),
    ("'Sign' is like 'sign'", lambda c: c["methods"].update(Sign={"method": "bitdelta"})),
    ("there is no file", lambda c: c["finetunes"]["math"].update(data="none.jsonl")),
    ("there is no file", lambda c: c["finetunes"]["math"].update(calibration="none.jsonl")),
    ("there is no file", lambda c: c.update(chat_template="none.jinja")),
    ("there is no file", lambda c: c.update(offtask="none.jsonl")),
    ("`other_prompts` must be", lambda c: c.update(other_prompts=0)),
    ("suite.json, line 1: needs the texts", lambda c: c.update(offtask="suite.json")),
    ("is no regular expression", lambda c: c["finetunes"]["math"].update(answer_pattern="(")),
    ("there is no folder", lambda c: c.update(base="nowhere")),
    ("there is no folder", lambda c: c["finetunes"]["math"].update(model="nowhere")),
]


@pytest.mark.parametrize(("message", "change"), BAD)
def test_bad_suites(suite: Path, tmp_path: Path, message: str, change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(DeltacomeError) as caught:
        quality(changed(suite, "bad", change), tmp_path / "out")
    assert message in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("example", sorted((Path(__file__).parents[1] / "examples" / "suites").glob("*.json")), ids=str)
def test_the_suites_of_the_examples(example: Path, suite: Path, tmp_path: Path) -> None:
    shutil.copytree(suite.parent, tmp_path, dirs_exist_ok=True)
    for name in ("math_dev.jsonl", "math_train.jsonl", "intent_test.jsonl", "intent_train.jsonl", "offtask.jsonl"):
        shutil.copy(suite.with_name("math.jsonl"), tmp_path / name)
    for path in (example, example.parents[1] / "chatml.jinja"):
        shutil.copy(path, tmp_path)
    assert [finetune.name for finetune in read_suite(tmp_path / example.name).finetunes] == ["math", "intent"]


def test_bad_suites_are_one_line(suite: Path, tmp_path: Path) -> None:
    fail(
        "there is no key", "benchmark", "quality", changed(suite, "bad", lambda c: c.update(x=1)), "-o", tmp_path / "o"
    )
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(DeltacomeError, match="is not valid JSON"):
        read_suite(tmp_path / "text.json")
    with pytest.raises(DeltacomeError, match="there is no file"):
        read_suite(tmp_path / "none.json")


def test_gpu_check_measures_slots(gpu_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels have them: here in the interpreter."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setitem(gpu_check.SHAPES, "135m", gpu_check.SHAPES["135m"] | small | {"num_key_value_heads": 2})
    for name, value in (("CASES", ((2, 1, 16),)), ("ROUNDS", 1), ("MOST_COPIES", 1)):
        monkeypatch.setattr(gpu_check, name, value)
    _, table = gpu_check._steps("135m", torch.device("cpu"), 100)
    [row] = table.rows
    assert row["tenants"] == 2 and row["slots_ms"] > 0


def test_gpu_check_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it measures a small model; a part that fails, and one without time left, are lines in the table."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 128}
    monkeypatch.setitem(random_model.SHAPES, "135m", random_model.SHAPES["135m"] | small)
    monkeypatch.setattr(gpu_check, "_tests", lambda left: 1 / 0)
    monkeypatch.setattr(gpu_check, "_compress", lambda folder, left: ("1 s", None))
    for name, value in (("CASES", ((1, 1, 16), (2, 3, 16))), ("ROUNDS", 1), ("MOST_COPIES", 1)):
        monkeypatch.setattr(gpu_check, name, value)
    gpu_check.gpu_check(tmp_path / "out", seconds=100.1)
    monkeypatch.setattr(gpu_check, "_serve", lambda folder: ("1 s", None))
    gpu_check.gpu_check(tmp_path / "more", seconds=80)
    results = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    *tables, parts = results["tables"]
    figures = [row["figure"] for row in parts["rows"]]
    assert figures[0].startswith("failed: ZeroDivisionError") and "tokens a second" in figures[4]
    assert [(row["tenants"], row["rows"]) for row in tables[0]["rows"]] == [(1, 1), (2, 3)]
    assert [row["tenants"] for row in tables[1]["rows"]] == [1, 4]
    rest = json.loads((tmp_path / "more" / "gpu-check.json").read_text())["tables"][-1]["rows"]
    assert [row["figure"] for row in rest[:2]] == ["no time left", "no time left"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu-check.json", "gpu-check.md"]
