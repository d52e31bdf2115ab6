import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("compress", "inspect", "verify", "merge", "generate", "evaluate", "search")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deltacome.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(message: str, *arguments: object) -> None:
    """Exit status 1 and one line on standard error, progress bars aside, that has the message in it."""
    result = run(*arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


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


def test_merge_and_generate(delta: Path, base: Path, tmp_path: Path) -> None:
    report = json.loads(succeed("merge", base, delta, "-o", tmp_path / "merged", "--dtype", "float32", "--json"))
    assert report["bytes"] > 2 * 10**5
    fail("exists already", "merge", base, delta, "-o", tmp_path / "merged")
    options = ("--delta", delta, "--prompt", "Hello", "--max-new-tokens", 5)
    plain = succeed("generate", base, *options)
    assert json.loads(succeed("generate", base, *options, "--json"))["answer"] == plain.removesuffix("\n")


def test_evaluate(delta: Path, base: Path, finetuned: Path, examples: Path, tmp_path: Path) -> None:
    options = ("--finetuned", finetuned, "--data", examples, "--limit", 2, "--max-new-tokens", 3)
    output = ("-o", tmp_path / "e.json")
    text = succeed("evaluate", base, *options, "--delta", f"d={delta}", *output, "--show", 1)
    assert "on-task KL" in text and "prompt: What is 2 + 3?" in text and "fine-tuned: " in text
    assert len(json.loads((tmp_path / "e.json").read_text())) == 3 and (tmp_path / "e.md").exists()
    for wrong in ("d", f"base={delta}", "=x"):
        fail("write NAME=DELTA", "evaluate", base, *options, "--delta", wrong, *output)
    fail("there is no folder", "evaluate", base, *options, "--delta", f"d={tmp_path / 'none'}", *output)
    fail("no regular expression", "evaluate", base, *options, "--delta", f"d={delta}", "--answer-pattern", "(", *output)


def test_errors_are_one_line(base: Path, finetuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail("there is no folder nowhere", "compress", "nowhere", finetuned, "-o", out)
    fail("there is no method", "compress", base, finetuned, "-o", out, "--method", "magic")
    fail("cannot be reached", "compress", base, finetuned, "-o", out, "--ratio", 5000)
    fail("no folder", "inspect", tmp_path / "nothing")
    fail("is no compressed delta", "verify", base)
    assert not list(tmp_path.iterdir())


def test_wrong_usage_has_its_own_exit_status() -> None:
    assert run("compress").returncode == 2
    assert run("nonsense").returncode == 2
