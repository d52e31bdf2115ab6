"""vLLM with other families of models, compiled, on two ranks, and its server; skipped where it is not installed.

Each test has an engine of its own, whose end leaves none to others of this process: so they come after `test_vllm`.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")

import httpx
from openai import APIConnectionError, NotFoundError, OpenAI
from vllm.forward_context import is_forward_context_available

from conftest import Save
from deltacome import Artifact
from deltacome.runtime.kernels import reference
from deltacome.vllm import internals, layers, manager
from deltacome.vllm.norms import Norm
from graphs import Watched
from vllm_models import Models, Served, make_adapter, make_prompts, manager_of, stop


@pytest.mark.parametrize(
    "family, options, sizes",
    [
        ("qwen2", {}, {"tie_word_embeddings": True}),
        ("qwen2", {"method": "delta-come"}, {"tie_word_embeddings": False}),
        ("qwen3", {}, {"tie_word_embeddings": False}),
        ("gemma", {}, {}),
        ("mistral", {"method": "bitdelta"}, {"tie_word_embeddings": False}),
        ("phi3", {"factor": 0.92}, {"tie_word_embeddings": False}),
        ("llama", {"embeddings": "exact"}, {"tie_word_embeddings": False}),
        ("llama", {"method": "delta-come", "scale": "minmax"}, {"tie_word_embeddings": True, "attention_bias": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("method", "")),
)
def test_families_and_methods(
    family: str, options: dict[str, Any], sizes: dict[str, Any], save: Save, tmp_path: Path
) -> None:
    served = Served(save, tmp_path, family, options, **sizes)
    assert ("rescaled" in Artifact(served.deltas["a"]).method) == ("factor" in options)
    try:
        # Exact embeddings are stored in bfloat16, and here the base in float32: their difference is rounded.
        served.check(["base", "a", "b", "a"], make_prompts(4), 1e-2 if "embeddings" in options else 2e-3)
    finally:
        stop(served.llm)


def test_compiled_models(save: Save, tmp_path: Path) -> None:
    # Triton's interpreter fails at a kernel for structured output, which vLLM would try at the start.
    engine = {"enforce_eager": False, "kernel_config": {"enable_jit_warmup": False}}
    served = Served(save, tmp_path, "llama", {}, engine, tie_word_embeddings=True)
    try:
        served.check(["a", "base", "b", "a"], make_prompts(4))
    finally:
        stop(served.llm)


def check_that_nothing_waits(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer reads a value, or has operators that depend on one; the kernels are watched in test_kernels."""
    monkeypatch.setattr(reference.SlotWork, "add", lambda self, y, x: None)
    watched, count = Watched(), 0
    for module in manager.modules.values():
        if isinstance(module, layers.Linear):
            x, y = (torch.randn(6, size) for size in (module.base_layer.input_size, sum(module.output_slices)))
        elif isinstance(module, Norm):
            x = y = torch.randn(6, module.base_layer.weight.shape[-1])
        else:
            continue
        with watched:
            module.change(y, x)
        count += 1
    assert manager.step.slots.used and count > 10 and not watched.forbidden


@pytest.mark.parametrize(
    "family, sizes, engine",
    [
        ("llama", {"tie_word_embeddings": True}, {}),
        ("llama", {"tie_word_embeddings": False}, {"enforce_eager": False}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 2}, {"tensor_parallel_size": 2}),
        ("qwen3", {"tie_word_embeddings": False}, {}),
        ("phi3", {"tie_word_embeddings": False, "num_key_value_heads": 2}, {"tensor_parallel_size": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_as_in_cuda_graphs(
    family: str,
    sizes: dict[str, Any],
    engine: dict[str, Any],
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layers that a CUDA graph would have, by the plain kernel, in steps of up to 24 tokens; others in the rest.

    What is not in the graph, embeddings and logits, is computed outside as it would be then.
    """
    if "tensor_parallel_size" in engine:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        sizes |= {"hidden_size": 128, "num_attention_heads": 4}
    for module in (manager, layers):
        monkeypatch.setattr(module, "kernels_for", lambda device: reference)
    monkeypatch.setattr(internals, "graph_tokens", lambda config: 24)
    in_model: list[bool] = []
    embed = layers.embed
    monkeypatch.setattr(layers, "embed", lambda *own: in_model.append(is_forward_context_available()) or embed(*own))
    served = Served(save, tmp_path, family, {}, engine, **sizes)
    try:
        names = ["a", "base", "b", "a"]
        if family != "phi3":
            served.deltas["peft"] = make_adapter(served, tmp_path / "peft")
            names += ["peft", "b"]
        served.check(names, make_prompts(len(names)))
        served.check(names[1:3], make_prompts(2, seed=1))
        if "tensor_parallel_size" not in engine:
            check_that_nothing_waits(manager_of(served.llm), monkeypatch)
            assert in_model and not any(in_model)  # ahead of the graph
    finally:
        stop(served.llm)


@pytest.mark.parametrize(
    "family, options, sizes",
    [
        ("qwen2", {}, {"num_key_value_heads": 2}),
        ("llama", {"embeddings": "exact"}, {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
        ("phi3", {}, {"num_key_value_heads": 2}),
        ("qwen2", {"method": "delta-come", "scale": "minmax"}, {"num_key_value_heads": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_two_ranks(
    family: str,
    options: dict[str, Any],
    sizes: dict[str, Any],
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    sizes |= {"hidden_size": 128, "num_attention_heads": 4, "tie_word_embeddings": False}
    served = Served(save, tmp_path, family, options, {"tensor_parallel_size": 2}, **sizes)
    try:
        served.deltas["peft"] = make_adapter(served, tmp_path / "peft")
        names = ["base", "a", "b", "peft", "a"] if family != "phi3" else ["base", "a", "b", "a"]
        served.check(names, make_prompts(len(names)), 1e-2 if "embeddings" in options else 2e-3)
    finally:
        stop(served.llm)


def test_a_base_that_is_quantized_as_it_is_loaded(save: Save, tmp_path: Path) -> None:
    """Deltas are added to what the layers of 8 bits compute."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "tie_word_embeddings": False}
    engine = {"quantization": "int8_per_channel_weight_only", "dtype": "float16"}
    served = Served(save, tmp_path, "llama", {}, engine, **sizes)
    plain = {name: value.clone() for name, value in served.models["base"].state_dict().items()}
    for model in served.models.values():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                weight = plain[f"{name}.weight"]
                scale = weight.abs().amax(1, keepdim=True) / 127
                module.weight.data += (weight / scale).round() * scale - weight
    try:
        served.check(["base", "a", "b", "a"], make_prompts(4), 0.2)  # in float16; 4.6 and more without the rounding
    finally:
        stop(served.llm)


def test_the_server(save: Save, tmp_path: Path) -> None:
    models = Models(save, tmp_path, "llama", {}, tie_word_embeddings=True)
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    shutil.copytree(models.deltas["b"], deltas / "found")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("w+")
    program = Path(sys.executable).with_name("deltacome")
    command = [program, "serve", models.base, "--engine", "vllm", "--delta", f"a={models.deltas['a']}"]
    command += ["--delta-dir", deltas, "--port", port, "--name", "base", "--max-length", "128", "--dtype", "float32"]
    environment = {**os.environ, "DELTACOME_API_KEY": "secret", "VLLM_LOGGING_LEVEL": "INFO"}
    server = subprocess.Popen([*map(str, command), "--", "--enforce-eager"], env=environment, stdout=log, stderr=log)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
    prompt = make_prompts(1, seed=4)[0]

    def check(name: str, like: str) -> None:
        found = client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0, logprobs=1)
        with torch.no_grad():
            own = models.models[like].generate(
                torch.tensor([prompt]),
                max_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = own.sequences[0, len(prompt) :].tolist()
        expected = [float(step.float().log_softmax(-1)[0, t]) for step, t in zip(own.logits, tokens, strict=True)]
        assert found.choices[0].logprobs.token_logprobs == pytest.approx(expected, abs=2e-3)

    def change(what: str, **body: str | bool) -> int:
        answer = httpx.post(
            f"{client.base_url}{what}_lora_adapter", json=body, headers={"Authorization": "Bearer secret"}, timeout=60
        )
        return answer.status_code

    try:
        for _ in range(240):
            try:
                names = {model.id for model in client.models.list()}
                break
            except APIConnectionError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.5)
        assert names == {"base", "a"}
        check("a", "a")
        check("base", "base")
        check("found", "b")  # in the folder
        assert change("load", lora_name="again", lora_path=str(models.deltas["b"])) == 200
        check("again", "b")
        assert change("load", lora_name="bad", lora_path=str(tmp_path)) >= 400
        assert change("load", lora_name="again", lora_path=str(models.deltas["a"]), load_inplace=True) == 200
        reads = (tmp_path / "log").read_text().count("its artifact")
        check("again", "a")  # and its steps do not read it again
        assert reads == (tmp_path / "log").read_text().count("its artifact") == 4
        assert change("unload", lora_name="again") == 200
        for name in ("again", "bad", "../deltas/found"):
            with pytest.raises(NotFoundError):
                check(name, "b")
        check("a", "a")
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert "vllm:lora_requests_info" in metrics
    finally:
        server.terminate()
        server.wait(60)
        log.close()
