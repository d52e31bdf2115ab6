import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deltacome
from commands import fail, run, succeed
from deltacome import DeltacomeError
from deltacome.benchmark.activations import benchmark_activations
from deltacome.benchmark.kernel import benchmark_kernel
from deltacome.benchmark.memory import benchmark_memory
from deltacome.benchmark.random_model import SHAPES
from deltacome.benchmark.runtime import benchmark_runtime
from deltacome.cli.measuring import print_evaluation

COMMANDS = ("compress", "inspect", "verify", "merge", "export", "generate", "chat", "evaluate", "search", "report")


@pytest.fixture(scope="module")
def delta(base: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "delta"
    report = json.loads(succeed("compress", base, finetuned, "-o", out, "--ratio", 4, "--json"))
    assert report["artifact"] == str(out) and 4 <= report["artifact_ratio"] < 5
    assert report["seconds"] > 0 and report["peak_bytes"] > 0
    return out


@pytest.mark.parametrize("command", [*COMMANDS, "benchmark quality"])
def test_help_has_an_example_and_comes_without_torch(command: str) -> None:
    script = f"import sys; sys.argv = {['deltacome', *command.split(), '--help']}\n"
    script += "from deltacome.cli import main\ntry: main()\n"
    script += "except SystemExit: pass\nprint('torch' in sys.modules)"
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"Example: deltacome {command}" in text and text.endswith("False\n")


def test_version() -> None:
    import deltacome

    assert succeed("--version").strip() == deltacome.__version__


def test_inspect(delta: Path, tmp_path: Path) -> None:
    text = succeed("inspect", delta, "--plot", tmp_path / "plot.png")
    assert "model.layers.*.mlp.up_proj.weight" in text and "artifact ratio" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(succeed("inspect", delta, "--json"))
    sizes = sum(path.stat().st_size for path in delta.glob("delta*"))
    assert report["artifact_bytes"] == sizes
    assert 0.95 * sizes < sum(row["bytes"] for row in report["modules"]) < sizes
    by_weight = json.loads(succeed("inspect", delta, "--weights", "--json"))["modules"]
    assert len(by_weight) == 20 and sum(row["bytes"] for row in by_weight) == sum(
        row["bytes"] for row in report["modules"]
    )


def test_verify(delta: Path, base: Path, finetuned: Path, tmp_path: Path) -> None:
    assert "is whole" in succeed("verify", delta)
    assert json.loads(succeed("verify", delta, "--base", base, "--json"))["base_checked"] is True
    fail("is not the base of", "verify", delta, "--base", finetuned)
    shutil.copytree(delta, tmp_path / "copy")
    content = (delta / "delta.safetensors").read_bytes()
    (tmp_path / "copy" / "delta.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fail("SHA-256 differs", "verify", tmp_path / "copy")


def test_map_needs_two_sides(base: Path, finetuned: Path, tmp_path: Path) -> None:
    fail("--map model has no =", "compress", base, finetuned, "-o", tmp_path / "delta", "--map", "model")
    assert not (tmp_path / "delta").exists()


def test_export(delta: Path, base: Path, tmp_path: Path) -> None:
    result = run("export", base, delta, "-o", tmp_path / "adapter", "--max-rank", 2, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["rank"] == 2
    assert "weights have more components than --max-rank 2" in result.stderr
    assert "LoRA cannot express what changed in model.layers.0.input_layernorm.weight and 4 more" in result.stderr
    fail("exists already", "export", base, delta, "-o", tmp_path / "adapter")


def test_merge_and_generate(delta: Path, base: Path, tmp_path: Path) -> None:
    report = json.loads(succeed("merge", base, delta, "-o", tmp_path / "merged", "--dtype", "float32", "--json"))
    assert report["bytes"] > 2 * 10**5
    fail("exists already", "merge", base, delta, "-o", tmp_path / "merged")
    options = ("--prompt", "Hello", "--max-new-tokens", 5)
    plain = succeed("generate", base, "--delta", delta, *options)
    several = ("--delta", f"a={delta}", "--delta", f"b={delta}")
    answers = json.loads(succeed("generate", base, *several, *options, "--json"))["answers"]
    assert answers == {"a": plain.removesuffix("\n"), "b": plain.removesuffix("\n")}
    assert list(json.loads(succeed("generate", base, *options, "--json"))["answers"]) == ["base"]
    fail("write NAME=DELTA, each name once", "generate", base, *several, "--delta", f"a={delta}", *options)
    (tmp_path / "a=1").mkdir()
    for odd in ("ft=1", "a=1/b=2", "mit Leerzeichen und Ümläuten"):
        shutil.copytree(delta, tmp_path / odd)
        for given, name in ((f"{tmp_path / odd}/", (tmp_path / odd).name), (f"c={tmp_path / odd}", "c")):
            found = json.loads(succeed("generate", base, "--delta", given, *options, "--json"))["answers"]
            assert found == {name: plain.removesuffix("\n")}
    fail("there is no folder", "generate", base, "--delta", tmp_path / "none", *options)


def test_chat(delta: Path, base: Path) -> None:
    chat = ("chat", base, "--max-new-tokens", "4")
    said = "Hello\n\nAnd?\n/reset\nHello\n/exit\nnever\n"
    several = run(*chat, "--delta", f"a={delta}", "--delta", f"b={delta}", said=said)
    assert several.returncode == 0, several.stderr
    answers = [part.partition("b: ") for part in several.stdout.split("a: ")[1:]]
    assert len(answers) == 3 and answers[0] == answers[2]
    assert all(a.strip() == b.strip() for a, _, b in answers)
    one = run(*chat, "--delta", delta, said="Hello\n")
    assert one.returncode == 0 and one.stdout.strip() == answers[0][0].strip()


def test_benchmark_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny |= {"num_key_value_heads": 1, "vocab_size": 300, "tie_word_embeddings": True}
    monkeypatch.setitem(SHAPES, "135m", tiny)
    results = benchmark_runtime(tmp_path / "out", "135m", counts=(1, 3), device="cpu", rounds=2)
    rows = results["tables"][0]["rows"]
    assert [row["tenants"] for row in rows] == [1, 3]
    assert all(row[key] > 0 for row in rows for key in ("base_ms", "tenants_ms", "turns_ms", "speedup"))
    assert json.loads((tmp_path / "out/runtime.json").read_text()) == results
    assert "| 3 |" in (tmp_path / "out/runtime.md").read_text() and (tmp_path / "out/runtime.png").stat().st_size > 9999
    with pytest.raises(DeltacomeError, match="exists already"):
        benchmark_runtime(tmp_path / "out", "135m")
    fail("exists already", "benchmark", "runtime", "-o", tmp_path / "out")


def test_benchmark_kernel(tmp_path: Path) -> None:
    results = benchmark_kernel(tmp_path / "out", sizes=(40, 64), batches=(1, 2), device="cpu", rounds=2)
    rows = results["tables"][0]["rows"]
    assert [(row["size"], row["tenants"]) for row in rows] == [(40, 1), (40, 2), (64, 1), (64, 2)]
    assert all(row["kernel_us"] > 0 and (row["pytorch_us"] is None) == (row["tenants"] > 1) for row in rows)
    assert "| 64 | 2 |" in (tmp_path / "out/kernel.md").read_text() and (tmp_path / "out/kernel.png").exists()


def test_benchmark_memory(base: Path, delta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = benchmark_memory(out, base=str(base), deltas={"a": str(delta)}, counts=(1, 3), device="cpu")
    rows = results["tables"][0]["rows"]
    assert [row["tenants"] for row in rows] == [1, 3] and all(row["merged"] == "measured" for row in rows)
    assert "| 3 |" in (out / "memory.md").read_text() and (out / "memory.png").exists()
    fail("either a base", "benchmark", "memory", "-o", tmp_path / "none")
    fail("either a base", "benchmark", "memory", base, "-o", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_benchmark_activations(base: Path, finetuned: Path, examples: Path, tmp_path: Path) -> None:
    deltas = {}
    for ratio in (5, 9):
        deltas[f"d{ratio}"] = str(tmp_path / f"d{ratio}")
        deltacome.compress(base, finetuned, deltas[f"d{ratio}"], ratio=ratio, method="delta-come")
    results = benchmark_activations(tmp_path / "out", str(base), str(finetuned), deltas, examples)
    large, small = results["tables"][0]["rows"]
    keys = [f"{part}_{kind}" for part in ("low", "middle") for kind in ("all", "outliers")]
    assert all(0 < large[key] < small[key] < 1.5 for key in keys)  # of two layers
    assert (tmp_path / "out/activations.md").exists() and (tmp_path / "out/activations.png").exists()
    fail("there is no folder", "benchmark", "activations", base, "--finetuned", finetuned, "--delta", "none",
         "--data", examples, "-o", tmp_path / "none-out")  # fmt: skip


def test_evaluate(delta: Path, base: Path, finetuned: Path, examples: Path, tmp_path: Path) -> None:
    options = ("--finetuned", finetuned, "--data", examples, "--limit", 2, "--max-new-tokens", 3)
    output = ("-o", tmp_path / "e.json")
    text = succeed("evaluate", base, *options, "--delta", f"d={delta}", *output, "--show", 1)
    assert "on-task KL" in text and "prompt: What is 2 + 3?" in text and "fine-tuned: " in text
    assert len(json.loads((tmp_path / "e.json").read_text())) == 3 and (tmp_path / "e.md").exists()
    for wrong in (f"base={delta}", "=x", "d=", ""):
        fail("write NAME=DELTA", "evaluate", base, *options, "--delta", wrong, *output)
    fail("there is no folder", "evaluate", base, *options, "--delta", f"d={tmp_path / 'none'}", *output)
    for pattern, said in (("(", "no regular expression"), (r"(a|b) (\d+)", "has 2 groups, and one is the answer")):
        fail(said, "evaluate", base, *options, "--delta", f"d={delta}", "--answer-pattern", pattern, *output)


def test_errors_are_one_line(base: Path, finetuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail("there is no folder nowhere", "compress", "nowhere", finetuned, "-o", out)
    fail("there is no method", "compress", base, finetuned, "-o", out, "--method", "magic")
    fail("cannot be reached", "compress", base, finetuned, "-o", out, "--ratio", 5000)
    fail("no folder", "inspect", tmp_path / "nothing")
    fail("is no compressed delta", "verify", base)
    assert not list(tmp_path.iterdir())


def test_the_installed_program_says_the_same(tmp_path: Path) -> None:
    """In a process of its own, where an error that nobody foresaw would be a traceback."""
    command = [sys.executable, "-m", "deltacome.cli", "inspect", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"error: there is no folder {tmp_path / 'nothing'}\n"


def test_wrong_usage_has_its_own_exit_status() -> None:
    assert run("compress").returncode == 2
    assert run("nonsense").returncode == 2


@pytest.mark.parametrize("width", [80, 120, 200, None])
def test_the_first_column_of_a_table_is_whole(
    width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None: not a terminal. Figures are whole too; a narrow terminal does without some columns."""
    if width is not None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(width))
    figures = ("on_task_kl", "nll", "off_task_kl", "accuracy", "retention")
    row = {"method": "rate-distortion", "artifact_ratio": 16, "linear_ratio": 15.4, "seconds": 12.5}
    row |= {key: 0.12345 for figure in figures for key in (figure, f"{figure}_error")}
    print_evaluation([row | {"name": name} for name in ("fine-tuned", "rate-distortion")])
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= (width or 200)
    assert "│ fine-tuned      │" in text and "│ rate-distortion │" in text
    assert text.count("0.12345") == 8 and text.count("0.123") == 8 + (12 if width in (200, None) else 8)
    assert ("NLL" in text) == (width in (200, None)) and "other KL" not in text


@pytest.mark.parametrize("ratio", ["inf", "nan", "0", "-3", "1e309"])
def test_a_ratio_that_is_none(ratio: str, base: Path, finetuned: Path, tmp_path: Path) -> None:
    message = f"a ratio of {float(ratio):g} means nothing; give a number above 1"
    fail(message, "compress", base, finetuned, "-o", tmp_path / "out", "--ratio", ratio)
    fail(message, "search", base, finetuned, "--data", "none.jsonl", "-o", tmp_path / "out", "--ratio", ratio)
    if float(ratio) > 0:  # the others are refused with the usage
        for command in (["runtime"], ["kernel"], ["memory", "--shape", "135m"]):
            fail(message, "benchmark", *command, "-o", tmp_path / "out", "--ratio", ratio)
    assert list(tmp_path.iterdir()) == []


def test_folders_may_have_any_names(base: Path, finetuned: Path, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("Große Basis", "für März", "δ 1=2", "wieder da", "ein Adapter")]
    shutil.copytree(base, places[0])
    shutil.copytree(finetuned, places[1])
    succeed("compress", places[0], places[1], "-o", places[2], "--ratio", 4)
    succeed("verify", places[2], "--base", places[0])
    succeed("merge", places[0], places[2], "-o", places[3])
    succeed("export", places[0], places[2], "-o", places[4], "--max-rank", 4)
    assert deltacome.Artifact(places[2]).base_name == "Große Basis"
    assert f"base_model: {json.dumps('Große Basis')}" in (places[2] / "README.md").read_text(encoding="utf-8")
