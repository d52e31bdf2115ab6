"""The plugin in a real vLLM, against merged checkpoints in transformers; skipped where vLLM is not installed."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its state can be looked at
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import httpx
from openai import APIConnectionError, NotFoundError, OpenAI
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from conftest import Save, fine_tune, make_model
from deltacome import compress, load, merge
from deltacome.restore.exporting import export

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
}


def make(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model with biases and norms that are not all alike."""
    torch.manual_seed(seed)
    sizes = {**SIZES, **options}
    model = (
        make_model(seed, **sizes) if family == "llama" else AutoModelForCausalLM.from_config(CONFIGS[family](**sizes))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_delta(save: Save, base: Path, model: PreTrainedModel, seed: int, out: Path, **options: Any) -> Path:
    fine_tune(model, seed, size=0.2)
    compress(base, save(model, "finetuned"), out, **{"ratio": 4, **options})
    return out


class Served:
    """A base with two deltas in vLLM, and the same models in transformers."""

    def __init__(
        self, save: Save, folder: Path, family: str, options: dict[str, Any], engine: Any = (), **sizes: Any
    ) -> None:
        self.base = save(make(family, **sizes), "base", torch.float32)
        self.deltas = {
            name: make_delta(save, self.base, make(family, **sizes), seed, folder / name, **options)
            for seed, name in ((1, "a"), (2, "b"))
        }
        self.models = {"base": AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()}
        for name, delta in self.deltas.items():
            self.add_model(name, delta, folder)
        self.llm = start(self.base, **dict(engine))

    def add_model(self, name: str, delta: Path, folder: Path) -> None:
        merge(self.base, delta, folder / f"merged-{name}", torch.float32)
        place = folder / f"merged-{name}"
        self.models[name] = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()

    def requests(self, names: list[str]) -> list[LoRARequest | None]:
        return [request(name, self.deltas[name]) if name in self.deltas else None for name in names]

    def check(self, names: list[str], prompts: list[list[int]], tolerance: float = 2e-3) -> None:
        """Greedy answers and the log-probabilities of their tokens, and of the prompts', are each model's own."""
        asked = SamplingParams(max_tokens=8, temperature=0, logprobs=1, prompt_logprobs=1, ignore_eos=True)
        for output, name, prompt in zip(
            ask(self.llm, prompts, self.requests(names), asked), names, prompts, strict=True
        ):
            tokens = [*prompt, *output.outputs[0].token_ids]
            with torch.no_grad():
                logits = self.models[name](torch.tensor([tokens])).logits[0].float()
            expected = logits.log_softmax(-1)
            assert tokens[len(prompt) :] == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
            steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            for place, step in enumerate(steps):
                assert abs(step[tokens[place + 1]].logprob - float(expected[place, tokens[place + 1]])) < tolerance


def start(base: Path, **options: Any) -> LLM:
    return LLM(
        str(base),
        **{
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            "block_size": 32,
            "enable_lora": True,
            "max_loras": 3,
            "enforce_eager": True,
            "disable_log_stats": True,
            **options,
        },
    )


def stop(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()


NUMBERS: dict[tuple[str, Path], int] = {}


def request(name: str, folder: Path) -> LoRARequest:
    return LoRARequest(name, NUMBERS.setdefault((name, folder), len(NUMBERS) + 1), str(folder))


def ask(llm: LLM, prompts: list[list[int]], requests: Any, sampling: SamplingParams) -> list[Any]:
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, lora_request=requests, use_tqdm=False)


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (count,), generator=generator).tolist()
    return [torch.randint(2, 259, (length,), generator=generator).tolist() for length in lengths]


def manager_of(llm: LLM) -> Any:
    executor = llm.llm_engine.model_executor
    return executor.driver_worker.worker.model_runner.lora_manager._adapter_manager


@pytest.fixture(scope="module")
def served(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(save, tmp_path_factory.mktemp("served"), "llama", {}, tie_word_embeddings=True)
    yield served
    stop(served.llm)


def test_a_mixed_batch_answers_as_the_merged_models(served: Served) -> None:
    names = ["a", "base", "b", "b", "a", "base", "b", "a", "a"]
    served.check(names, make_prompts(len(names)))
    served.check(names[::-1], make_prompts(len(names), seed=1))


def test_tenants_share_no_cached_blocks(served: Served) -> None:
    prompt, once = make_prompts(1, seed=3)[0] + list(range(2, 66)), SamplingParams(max_tokens=1, temperature=0)
    cached = {}
    for name in ("base", "a", "b", "a"):
        [output] = ask(served.llm, [prompt], served.requests([name]), once)
        cached.setdefault(name, []).append(output.num_cached_tokens)
    assert cached["base"] == cached["b"] == [0]
    assert cached["a"][0] == 0 and cached["a"][1] > 0
    served.check(["a", "b", "base"], [prompt] * 3)


def test_memory_is_that_of_the_embedded_engine(served: Served) -> None:
    served.check(["a", "b"], make_prompts(2))
    alone = load(served.base, served.deltas)
    wanted = sum(alone.deltas[name].bytes for name in ("a", "b"))
    found = sum(manager_of(served.llm).get_adapter(r.lora_int_id).bytes for r in served.requests(["a", "b"]))
    assert wanted / 2 < found <= 1.02 * wanted  # one copy


def test_more_deltas_than_slots(served: Served, save: Save, tmp_path: Path) -> None:
    for seed in (3, 4, 5):
        name = f"more{seed}"
        model = make("llama", tie_word_embeddings=True)
        served.deltas[name] = make_delta(save, served.base, model, seed, tmp_path / name)
        served.add_model(name, served.deltas[name], tmp_path)
    names = ["a", "more3", "more4", "more5", "b", "a", "more3", "base"]
    served.check(names, make_prompts(len(names)))
    assert len(manager_of(served.llm).list_adapters()) == 3


def test_replaced_in_place(served: Served, tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(served.deltas["a"], place)
    served.deltas["x"], served.models["x"] = place, served.models["a"]
    served.check(["x", "b"], make_prompts(2))
    number = request("x", place).lora_int_id
    shutil.rmtree(place)
    shutil.copytree(served.deltas["b"], place)
    served.llm.llm_engine.reset_prefix_cache()
    served.llm.llm_engine.add_lora(LoRARequest("x", number, str(place), load_inplace=True))
    served.models["x"] = served.models["b"]
    served.check(["x", "a"], make_prompts(2))


def make_adapter(served: Served, folder: Path) -> Path:
    """A PEFT adapter of some layers, and its merged model as `peft` among the models."""
    merged = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32).eval()
    rank, tensors = 4, {}
    generator = torch.Generator().manual_seed(9)
    for name, module in merged.named_modules():
        if name.endswith(("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")):
            m, n = module.weight.shape
            a, b = torch.randn(rank, n, generator=generator), 0.1 * torch.randn(m, rank, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            module.weight.data += 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    served.models["peft"] = merged
    return folder


def test_peft_adapters_in_the_same_batch(served: Served, tmp_path: Path) -> None:
    served.deltas["peft"] = make_adapter(served, tmp_path / "peft")
    names = ["peft", "a", "base", "peft", "b"]
    served.check(names, make_prompts(len(names)))


def test_exported_deltas(served: Served, tmp_path: Path) -> None:
    export(served.base, served.deltas["a"], tmp_path / "exported", max_rank=8, dtype=torch.float32)
    served.deltas["exported"] = tmp_path / "exported"
    model = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32).eval()
    tensors = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    for name, module in model.named_modules():
        start = f"base_model.model.{name}.lora_"
        if f"{start}embedding_A" in tensors:  # and the head's, which is the same parameter
            module.weight.data += (tensors[f"{start}embedding_B"] @ tensors[f"{start}embedding_A"]).T
        elif f"{start}A.weight" in tensors and name != "lm_head":
            module.weight.data += tensors[f"{start}B.weight"] @ tensors[f"{start}A.weight"]
    served.models["exported"] = model
    names = ["exported", "a", "base", "exported"]
    served.check(names, make_prompts(len(names)))


def test_a_delta_that_cannot_be_served_changes_nothing(served: Served, save: Save, tmp_path: Path) -> None:
    def fails(folder: Path, message: str) -> None:
        with pytest.raises(Exception, match=message):
            served.llm.llm_engine.add_lora(request("bad", folder))
        served.check(["a", "base"], make_prompts(2))

    other = save(make("llama", seed=7, tie_word_embeddings=True), "other", torch.float32)
    model = make("llama", seed=7, tie_word_embeddings=True)
    fails(make_delta(save, other, model, 1, tmp_path / "foreign"), "fingerprint differs")

    broken = tmp_path / "broken"
    shutil.copytree(served.deltas["a"], broken)
    content = bytearray((broken / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "delta.safetensors").write_bytes(content)
    fails(broken, "is a broken artifact")

    grown = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32)
    grown.resize_token_embeddings(262)
    fails(make_delta(save, served.base, grown, 1, tmp_path / "grown"), "has more rows than the base's")

    longer = make("llama", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    fails(make_delta(save, served.base, longer, 1, tmp_path / "longer"), "rope_theta is 500000.0 in the fine-tuned")


def test_a_folder_of_deltas(served: Served, tmp_path: Path) -> None:
    from deltacome.vllm.resolver import DeltaResolver

    (tmp_path / "deltas").mkdir()
    shutil.copytree(served.deltas["a"], tmp_path / "deltas" / "math")
    shutil.copytree(served.deltas["b"], tmp_path / "outside")
    (tmp_path / "deltas" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "deltas" / "empty").mkdir()
    resolver = DeltaResolver(tmp_path / "deltas")
    found = asyncio.run(resolver.resolve_lora("base", "math"))
    assert found is not None and found.lora_path == str((tmp_path / "deltas" / "math").resolve())
    for name in ("link", "empty", "none", "../outside", "/math", ".", "..", "", "math/../math", "a\0b"):
        assert asyncio.run(resolver.resolve_lora("base", name)) is None


def test_what_vllm_must_not_be_asked_for(served: Served) -> None:
    with pytest.raises(Exception, match="leave out --fully-sharded-loras"):
        start(served.base, fully_sharded_loras=True)


# From here on each test has an engine of its own, whose end leaves none to others of this process.


@pytest.mark.parametrize(
    "family, options, sizes",
    [
        ("qwen2", {}, {"tie_word_embeddings": True}),
        ("qwen2", {"method": "delta-come"}, {"tie_word_embeddings": False}),
        ("qwen3", {}, {"tie_word_embeddings": False}),
        ("gemma", {}, {}),
        ("mistral", {"method": "bitdelta"}, {"tie_word_embeddings": False}),
        ("phi3", {}, {"tie_word_embeddings": False}),
        ("llama", {"embeddings": "exact"}, {"tie_word_embeddings": False}),
        ("llama", {"method": "delta-come", "scale": "minmax"}, {"tie_word_embeddings": True, "attention_bias": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("method", "")),
)
def test_families_and_methods(
    family: str, options: dict[str, Any], sizes: dict[str, Any], save: Save, tmp_path: Path
) -> None:
    served = Served(save, tmp_path, family, options, **sizes)
    try:
        # Exact embeddings are stored in bfloat16, and here the base in float32: their difference is rounded.
        served.check(["base", "a", "b", "a"], make_prompts(4), 1e-2 if "embeddings" in options else 2e-3)
    finally:
        stop(served.llm)


def test_compiled_models(served: Served) -> None:
    eager = served.llm
    served.llm = start(served.base, enforce_eager=False)
    try:
        served.check(["a", "base", "b", "a"], make_prompts(4))
    finally:
        stop(served.llm)
        served.llm = eager


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


def test_the_server(served: Served, tmp_path: Path) -> None:
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    shutil.copytree(served.deltas["b"], deltas / "found")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path / "log").open("w+")
    program = Path(sys.executable).with_name("deltacome")
    command = [program, "serve", served.base, "--engine", "vllm", "--delta", f"a={served.deltas['a']}"]
    command += ["--delta-dir", deltas, "--port", port, "--name", "base", "--max-length", "128", "--dtype", "float32"]
    environment = {**os.environ, "DELTACOME_API_KEY": "secret"}
    server = subprocess.Popen([*map(str, command), "--", "--enforce-eager"], env=environment, stdout=log, stderr=log)
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
    prompt = make_prompts(1, seed=4)[0]

    def check(model: str, like: str) -> None:
        found = client.completions.create(model=model, prompt=prompt, max_tokens=6, temperature=0, logprobs=1)
        with torch.no_grad():
            own = served.models[like].generate(
                torch.tensor([prompt]),
                max_new_tokens=6,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = own.sequences[0, len(prompt) :].tolist()
        expected = [float(step.float().log_softmax(-1)[0, t]) for step, t in zip(own.logits, tokens, strict=True)]
        assert found.choices[0].logprobs.token_logprobs == pytest.approx(expected, abs=2e-3)

    def change(what: str, **body: str) -> int:
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
        assert change("load", lora_name="again", lora_path=str(served.deltas["b"])) == 200
        check("again", "b")
        assert change("load", lora_name="bad", lora_path=str(tmp_path)) >= 400
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
