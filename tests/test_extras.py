"""What is not installed: a command that needs it says so in a sentence, and the others work without it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from safetensors.torch import load_file, save_file

from deltacome import compress
from deltacome.cli.commands import app

# Pydantic is not among them: typer may need it itself.
EXTRAS = (
    "bitsandbytes",
    "fastapi",
    "llguidance",
    "lm_eval",
    "matplotlib",
    "PIL",
    "prometheus_client",
    "ray",
    "uvicorn",
    "vllm",
)
SCRIPT = """
import sys
missing, sys.argv = sys.argv[1].split(","), ["deltacome", *sys.argv[2:]]
sys.modules |= dict.fromkeys(missing)  # imports of them fail, as those of a package that is not there
from deltacome.cli import main
main()
"""


def run_without(missing: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, missing, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def fails_without(missing: str, message: str, *arguments: object) -> None:
    result = run_without(missing, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"error: {message}\n")


@pytest.fixture(scope="module")
def quantized(finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that calls itself quantized to 4 bit by bitsandbytes."""
    folder = tmp_path_factory.mktemp("quantized") / "quantized"
    shutil.copytree(finetuned, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file({**tensors, f"{name}.absmax": tensors[name][0].clone()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client", "llguidance"])
def test_serve(missing: str, base: Path) -> None:
    fails_without(
        missing, "deltacome serve needs FastAPI, uvicorn and llguidance; pip install 'deltacome[serve]'", "serve", base
    )


def test_benchmark_zoo(tmp_path: Path) -> None:
    message = "the zoo's members are made with more packages; pip install 'deltacome[zoo]'"
    options = ("-o", tmp_path / "out", "--cache", tmp_path / "cache")
    for missing in ("peft", "sklearn"):
        fails_without(missing, message, "benchmark", "zoo", *options)


def test_benchmark_serve(base: Path, examples: Path, tmp_path: Path) -> None:
    message = "deltacome serve needs FastAPI, uvicorn and llguidance; pip install 'deltacome[serve]'"
    options = ("--delta", "a=nothing", "--data", examples, "-o", tmp_path / "out")
    fails_without("fastapi", message, "benchmark", "serve", base, *options)


def test_serve_by_vllm(base: Path) -> None:
    """It needs vLLM, and nothing of the embedded server."""
    message = "vLLM is not installed in this environment; docs/vllm.md says how, or leave out --engine"
    fails_without("fastapi,prometheus_client,uvicorn,vllm", message, "serve", base, "--engine", "vllm")


def test_plots(tmp_path: Path) -> None:
    message = "plots need matplotlib: pip install 'deltacome[plot]'"
    fails_without("matplotlib", message, "benchmark", "kernel", "-o", tmp_path / "out")


def test_ray(base: Path, finetuned: Path, tmp_path: Path) -> None:
    message = "--engine ray needs Ray; pip install 'deltacome[ray]'"
    fails_without("ray", message, "compress", base, finetuned, "-o", tmp_path / "out", "--engine", "ray")


def test_lm_eval(base: Path, finetuned: Path, tmp_path: Path) -> None:
    message = "this needs lm-evaluation-harness; pip install 'deltacome[lm-eval]'"
    fails_without("lm_eval", message, "lm-eval", "run")
    options = ("--finetuned", finetuned, "--delta", "a=nothing", "--tasks", "gsm8k", "-o", tmp_path / "out.json")
    fails_without("lm_eval", message, "evaluate", base, *options)


def test_images(base: Path, finetuned: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Q", "completion": "A", "image": "data.jsonl"}))
    compress(base, finetuned, tmp_path / "delta", ratio=4)
    options = ("--finetuned", finetuned, "--delta", tmp_path / "delta", "--data", data, "-o", tmp_path / "out.json")
    result = run_without("PIL", "evaluate", base, *options)
    assert result.returncode == 1 and result.stderr.endswith(
        "error: images need Pillow: pip install 'deltacome[images]'\n"
    )


@pytest.mark.parametrize("command", ["compress", "generate"])
def test_bitsandbytes(command: str, base: Path, quantized: Path, tmp_path: Path) -> None:
    message = "are quantized by bitsandbytes; pip install 'deltacome[bitsandbytes]' to read them"
    words = {
        "compress": ("compress", base, quantized, "-o", tmp_path / "out"),
        "generate": ("generate", quantized, "--prompt", "Hello"),
    }
    fails_without("bitsandbytes", f"the weights of {quantized} {message}", *words[command])


def test_help_needs_none_of_them() -> None:
    commands = typer.main.get_command(app).commands
    pages = [[], *([name] for name in commands if name != "lm-eval")]  # whose help is its own
    pages += [["benchmark", name] for name in commands["benchmark"].commands]
    each = f"for words in {pages}:\n    sys.argv = ['deltacome', *words, '--help']\n    try: main()\n"
    each += "    except SystemExit as end: assert not end.code, words\n"
    command = [sys.executable, "-c", SCRIPT.replace("main()\n", each), ",".join(EXTRAS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.count("Usage:") == len(pages) > 15, result.stderr
