"""Small random models, saved as real checkpoints."""

import copy
import gc
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deltacome.format.artifact import Artifact
from deltacome.format.terms import Factored, Sign
from deltacome.runtime import kernels

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreting  # noqa: F401 -- Triton's interpreter in half the time

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.register_assert_rewrite("serving")  # fixtures and helpers of several files

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Save = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take long")
    parser.addoption("--attack", action="store_true", help="also run the attacks in full")
    parser.addoption("--attack-count", type=int, default=12_000, help="how many artifacts an attack changes")
    parser.addoption("--churn", type=float, default=3600, help="seconds that an attack keeps a server under load")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--attack"):
        for item in items:
            if item.get_closest_marker("attack"):  # the folder has that name too
                item.add_marker(pytest.mark.skip(reason="an attack in full; run with --attack"))
    if config.getoption("--slow"):
        # What takes longest begins first, and small files come last: no process is left alone with a long one.
        items.sort(key=lambda item: ("slow" not in item.keywords, -item.path.stat().st_size))
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes long; run with --slow"))


def pytest_collection_finish() -> None:
    gc.freeze()  # all that is imported would be gone through by each full collection of garbage


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def make_model(seed: int = 0, **options: object) -> LlamaForCausalLM:
    """A random Llama whose sizes are no multiples of anything."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 60,
            "intermediate_size": 109,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **options,
        }
    )
    return LlamaForCausalLM(config)


def make_other(family: str, seed: int = 0, **options: object) -> PreTrainedModel:
    """A random model of another family: Qwen2 has biases, GPT-NeoX also layer norms and fused attention weights."""
    if family == "llama":
        return make_model(seed, **options)
    torch.manual_seed(seed)
    sizes = {"vocab_size": 259, "hidden_size": 60, "intermediate_size": 109, "num_hidden_layers": 2}
    sizes |= {"max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1}
    sizes |= {"num_attention_heads": 3, **options}
    if family == "qwen2":
        model = AutoModelForCausalLM.from_config(Qwen2Config(**{"num_key_value_heads": 1, **sizes}))
    else:
        model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 60,
    "intermediate_size": 109,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "gpt_oss": GptOssConfig,
}
EVEN: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 112}  # grouped products in torch ask for that
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {**EVEN, "num_local_experts": 3, "num_experts_per_tok": 2},
    # 17 experts make the router a matrix that is compressed.
    "qwen3_moe": {**EVEN, "num_experts": 17, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "gpt_oss": {**EVEN, "num_local_experts": 3, "num_experts_per_tok": 2},  # its stacks lie the other way round
}


def make_any(family: str) -> PreTrainedModel:
    """A random model of a family, with biases and norms that are not all alike."""
    if family in ("llama", "qwen2", "gpt_neox"):
        return make_other(family)
    torch.manual_seed(0)
    if family in CONFIGS:
        options = {**SIZES, "num_key_value_heads": 1, "head_dim": 20, "pad_token_id": 0, **MORE.get(family, {})}
        config = CONFIGS[family](**options)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=259, n_embd=60, n_layer=2, n_head=3, n_positions=512, bos_token_id=0, eos_token_id=1)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def fine_tune(model: PreTrainedModel, seed: int = 1, size: float = 0.05) -> None:
    """Change every parameter a little, matrices by deltas whose singular values decay as those of real ones do.

    Only the sinks of gpt-oss stay: deltas of them can be merged, and not served.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                continue
            change = torch.randn_like(parameter)
            if parameter.ndim in (2, 3):
                u, s, v = torch.linalg.svd(change, full_matrices=False)
                change = (u * (s * torch.arange(1, s.shape[-1] + 1) ** -0.7)[..., None, :]) @ v
            parameter += size * change * parameter.norm() / change.norm()


def train(model: PreTrainedModel, steps: int = 5) -> None:
    """Fine-tune every parameter for a few steps on random tokens; sinks stay, as above."""
    torch.manual_seed(0)
    ids = torch.randint(2, 250, (8, 16))
    trained = [parameter for name, parameter in model.named_parameters() if not name.endswith("sinks")]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The GPU's kernels for models on the CPU, in Triton's interpreter; a sum is in two parts, not eight."""
    found = pytest.importorskip("deltacome.runtime.kernels.triton", reason="Triton is not there")
    monkeypatch.setitem(kernels.BACK_ENDS, "cpu", "triton")
    monkeypatch.setattr("deltacome.runtime.kernels.plans.MOST_SPLITS", 2)
    return found


def term_bytes(term: Factored | Sign) -> int:
    """Bytes of a term's tensors."""
    found = [term.words, term.scale] if isinstance(term, Sign) else [term.u, term.v, term.scale]
    if isinstance(term, Factored) and term.groups is not None:
        groups = term.groups
        found += [groups.u_scale, groups.u_zero, groups.v_scale, groups.v_zero]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Saves a model with the tokenizer in a new folder."""

    def do(model: PreTrainedModel, name: str = "model", dtype: torch.dtype = torch.bfloat16, **options: object) -> Path:
        folder = tmp_path_factory.mktemp(name)
        copy.deepcopy(model).to(dtype).save_pretrained(folder, **options)
        make_tokenizer().save_pretrained(folder)
        return folder

    return do


@pytest.fixture(scope="session")
def base(save: Save) -> Path:
    return save(make_model(tie_word_embeddings=True), "base")


@pytest.fixture(scope="session")
def finetuned(save: Save) -> Path:
    model = make_model(tie_word_embeddings=True)
    fine_tune(model)
    return save(model, "finetuned")


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file with a line of each kind."""
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    lines = [
        {"prompt": "What is 2 + 3?", "completion": "2 + 3 = 5\n#### 5", "answer": "5"},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]},
        {"text": "Some plain text, a little longer than the others are."},
        *({"prompt": f"Say {i}", "completion": str(i)} for i in range(9)),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_alike(one: Artifact, other: Artifact) -> None:
    """See that two artifacts of the same model have the same size and errors, but for rounding."""
    assert abs(one.bytes - other.bytes) < 0.02 * other.bytes
    for name, entry in other.entries.items():
        found = one.entries[name].error
        assert (found is None) == (entry.error is None)
        assert found is None or found == pytest.approx(entry.error, rel=0.05, abs=0.02), name
