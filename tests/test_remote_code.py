"""A checkpoint's own code is never run, and nobody is asked whether it may be."""

import ast
import json
from pathlib import Path

import pytest

import deltacome
from commands import fail, succeed
from conftest import Save, fine_tune, make_model

LOADERS = {"from_pretrained", "from_config"}
WITHOUT_CODE = {"GenerationConfig"}  # which has none to run


def test_every_loader_says_so() -> None:
    """Left out, transformers asks on the terminal."""
    found = 0
    for path in Path(deltacome.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
                found += 1
                given = {option.arg: ast.unparse(option.value) for option in node.keywords}
                is_local = ast.unparse(node.func.value) in WITHOUT_CODE or "state_dict" in given
                assert is_local or given.get("trust_remote_code") == "False", f"{path.name}: {ast.unparse(node)}"
    assert found > 8


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_it_is_not_run(save: Save, tmp_path: Path, examples: Path, model_type: str) -> None:
    model, ran = make_model(), tmp_path / "ran"
    fine_tune(model)
    base, tuned = save(make_model(), "base"), save(model, "tuned")
    for folder in (base, tuned):
        (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
        for name, classes in (
            ("config.json", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}),
        ):
            settings = {**json.loads((folder / name).read_text()), "auto_map": classes}
            if name == "config.json":
                settings["model_type"] = model_type
            (folder / name).write_text(json.dumps(settings))
    delta, prompt = tmp_path / "delta", ("--prompt", "x", "--max-new-tokens", 2)
    calibrated = ("--method", "delta-come", "--calibration", examples)
    evaluated = ("--finetuned", tuned, "--data", examples, "--limit", 2, "-o", tmp_path / "e.json")
    succeed("compress", base, tuned, "-o", delta, "--ratio", 4, *(calibrated if model_type == "llama" else ()))
    succeed("merge", base, delta, "-o", tmp_path / "merged")
    if model_type == "llama":
        succeed("generate", base, "--delta", delta, *prompt)
        succeed("evaluate", base, *evaluated, "--delta", f"d={delta}")
        succeed("export", base, delta, "-o", tmp_path / "adapter", "--max-rank", 4)
    else:
        fail("transformers cannot", "compress", base, tuned, "-o", tmp_path / "other", "--ratio", 4, *calibrated)
        fail("transformers cannot load", "generate", base, "--delta", delta, *prompt)
        fail("transformers cannot load", "evaluate", base, *evaluated, "--delta", f"d={delta}")
        fail("transformers cannot", "export", base, delta, "-o", tmp_path / "adapter", "--max-rank", 4)
    assert not ran.exists()
