"""Measure vLLM with deltas against the other ways to serve fine-tunes with it, on the same cores, in one run.

    python vllm_benchmark.py BASE --tenant math=MATH=MATH_DELTA --tenant intent=INTENT=INTENT_DELTA --data prompts.jsonl

Ways: one server with the base and deltas; one server of stock vLLM with PEFT adapters of rank 256, extracted from the
fine-tunes' linear weights; a server of each merged checkpoint, all at once. Each gets the same prompts, as many of
every tenant, and answers all at once. To be run where both vLLM and deltacome are installed.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.data import Encoder, read_examples
from deltacome.restore.merging import DTYPES, merge
from deltacome.weights import is_embedding

RANK = 256
Requests = list[tuple[str | None, list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--tenant", action="append", required=True, metavar="NAME=FINETUNED=DELTA")
    parser.add_argument("--data", required=True, help="prompts")
    parser.add_argument("--requests", type=int, default=8, help="of each tenant")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

    tenants = [item.split("=") for item in arguments.tenant]
    encoder = Encoder(AutoTokenizer.from_pretrained(arguments.base))
    examples = read_examples(arguments.data, arguments.requests)
    prompts = [encoder.prompt(example.messages) for example in examples]
    names = [name for name, _, _ in tenants]
    asked: Requests = [(name, prompt) for prompt in prompts for name in names]
    print(f"{len(names)} tenants, {len(asked)} requests, {arguments.new_tokens} new tokens, {arguments.dtype}")

    with tempfile.TemporaryDirectory() as temporary:
        adapters, merged = {}, {}
        for name, finetuned, delta in tenants:
            adapters[name] = extract(arguments.base, finetuned, Path(temporary) / f"adapter-{name}", arguments.dtype)
            merged[name] = str(Path(temporary) / f"merged-{name}")
            merge(arguments.base, delta, merged[name], DTYPES[arguments.dtype])
        deltas = {name: str(Path(delta).resolve()) for name, _, delta in tenants}
        base = str(arguments.base)
        own = {name: [(None, prompt) for who, prompt in asked if who == name] for name in names}
        ways: dict[str, list[tuple[str, dict[str, str], Requests, bool]]] = {
            "the base alone": [(base, {}, [(None, prompt) for _, prompt in asked], False)],
            "deltas": [(base, deltas, asked, True)],
            f"PEFT adapters of rank {RANK}": [(base, adapters, asked, False)],
            f"{len(names)} servers of merged models": [(merged[name], {}, own[name], False) for name in names],
        }
        for way, servers in ways.items():
            tokens, seconds, memory = measure(servers, arguments)
            print(f"{way}: {tokens / seconds:.1f} tokens/s, {memory / 1e9:.2f} GB of memory", flush=True)


def measure(servers: list[Any], arguments: argparse.Namespace) -> tuple[int, float, int]:
    """Tokens, seconds from the first server's begin to the last one's end, and bytes of all processes."""
    with (
        ProcessPoolExecutor(len(servers), mp_context=get_context("spawn")) as pool,
        tempfile.TemporaryDirectory() as go,
    ):
        runs = [pool.submit(serve, i, len(servers), Path(go), arguments, *server) for i, server in enumerate(servers)]
        results = [run.result() for run in runs]
    tokens = sum(tokens for tokens, _, _, _ in results)
    first, last = min(start for _, start, _, _ in results), max(end for _, _, end, _ in results)
    return tokens, last - first, sum(memory for _, _, _, memory in results)


def serve(
    number: int,
    count: int,
    go: Path,
    arguments: argparse.Namespace,
    model: str,
    adapters: dict[str, str],
    asked: Requests,
    with_plugin: bool,
) -> tuple[int, float, float, int]:
    """Answer the requests when all servers are ready."""
    if not with_plugin:
        os.environ["VLLM_PLUGINS"] = ""
    if count > 1:  # more threads than cores in all would be slower
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    rank = 16 if with_plugin else RANK
    options = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": rank} if adapters else {}
    llm = LLM(
        model,
        dtype=arguments.dtype,
        max_model_len=1024,
        max_num_seqs=len(asked),
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    requests = {name: LoRARequest(name, i + 1, adapters[name]) for i, name in enumerate(adapters)}

    def answer(some: Requests, new_tokens: int) -> int:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in some],
            SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True),
            lora_request=[requests[name] for name, _ in some] if adapters else None,
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    try:
        answer(asked, 2)  # everything is loaded and compiled
        (go / str(number)).touch()
        while len(list(go.iterdir())) < count:
            time.sleep(0.05)
        start = time.time()
        tokens = answer(asked, arguments.new_tokens)
        end = time.time()
        memory = sum(process.memory_info().rss for process in psutil.Process().children(recursive=True))
        return tokens, start, end, memory
    finally:
        llm.llm_engine.engine_core.shutdown()


def extract(base: Path, finetuned: str, folder: Path, dtype: str, rank: int = RANK) -> str:
    """The nearest PEFT adapter of the rank: the largest singular vectors of every linear layer's delta."""
    checkpoint, theirs = Checkpoint(base), Checkpoint(finetuned)
    tensors, modules = {}, set()
    for own in pair(checkpoint, theirs):
        if not own.is_matrix or is_embedding(own.name):
            continue
        assert own.base_name is not None
        delta = theirs.read(own.name).float() - checkpoint.read(own.base_name).float()
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        name = own.name.removesuffix(".weight")
        root = s[:rank].sqrt()
        tensors[f"base_model.model.{name}.lora_A.weight"] = (root[:, None] * v[:rank]).to(DTYPES[dtype]).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (u[:, :rank] * root).to(DTYPES[dtype]).contiguous()
        modules.add(name.rpartition(".")[2])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


if __name__ == "__main__":
    main()
