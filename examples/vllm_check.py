"""Check deltas in vLLM on real models: what a delta answers there is what its merged checkpoint answers there.

    python vllm_check.py BASE --delta math=MATH_DELTA=math_test.jsonl --delta intent=INTENT_DELTA=intent_test.jsonl

First every merged checkpoint alone in vLLM, then one vLLM with the base and all deltas, their prompts mixed in one
batch: tokens, and how near a tie they were where they differ; accuracy. Then the memory of a delta, of coming and
going, and the time from disk to the first token. To be run where both vLLM and deltacome are installed.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from transformers import AutoTokenizer

from deltacome.data import Encoder, Example, read_examples
from deltacome.evaluate.metrics import is_right
from deltacome.format.artifact import Artifact
from deltacome.restore.merging import DTYPES, merge

CHANGES = 100
WARM_UP = 10  # of them, before memory is looked at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--delta", action="append", required=True, metavar="NAME=DELTA=PROMPTS.jsonl")
    parser.add_argument("--limit", type=int, default=150, help="prompts of each delta")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--chat-template", default=None)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of `bytes_held`, to the worker
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")

    deltas = {name: (folder, file) for name, folder, file in (item.split("=") for item in arguments.delta)}
    encoder = Encoder(AutoTokenizer.from_pretrained(arguments.base), arguments.chat_template)
    examples = {name: read_examples(file, arguments.limit) for name, (_, file) in deltas.items()}
    prompts = {name: [encoder.prompt(example.messages) for example in own] for name, own in examples.items()}

    merged: dict[str, dict[str, list[Any]]] = {name: {} for name in deltas}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (folder, _) in deltas.items():
            for dtype in dict.fromkeys((arguments.dtype, "float32")):
                place = str(Path(temporary) / f"{name}-{dtype}")
                merge(arguments.base, folder, place, DTYPES[dtype])
                merged[name][dtype] = in_a_process(answer, place, dtype, arguments, [(None, p) for p in prompts[name]])
    folders = {name: folder for name, (folder, _) in deltas.items()}
    longest = max(map(len, prompts.values()))
    mixed = [(name, prompts[name][i]) for i in range(longest) for name in prompts if i < len(prompts[name])]
    mixed += [(None, prompt) for own in prompts.values() for prompt in own[:8]]  # some of the base's in between
    together = in_a_process(answer, str(arguments.base), arguments.dtype, arguments, mixed, folders)

    for name in deltas:
        own = [found for (who, _), found in zip(mixed, together, strict=True) if who == name]
        answers = {f"merged, {dtype}": found for dtype, found in merged[name].items()}
        report(name, {**answers, f"delta, {arguments.dtype}": own}, examples[name], encoder.tokenizer)
    in_a_process(changes, str(arguments.base), arguments, folders, next(iter(prompts.values()))[0])


def in_a_process(task: Any, *arguments: Any) -> Any:
    """The result of a function in a process of its own, whose end frees all that vLLM has."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


@contextmanager
def engine(model: str, dtype: str, deltas: int) -> Iterator[Any]:
    from vllm import LLM

    options = {"enable_lora": True, "max_loras": deltas, "max_cpu_loras": deltas} if deltas else {}
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=16,
        enforce_eager=True,
        hf_overrides={"head_dtype": "float32"},  # logits rounded to bfloat16 are often equal
        disable_log_stats=True,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def answer(
    model: str,
    dtype: str,
    arguments: argparse.Namespace,
    asked: list[tuple[str | None, list[int]]],
    folders: Any = (),
) -> list[list[tuple[int, dict[int, float]]]]:
    """Greedy answers: each token with the two largest logits' log-probabilities."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = {name: LoRARequest(name, i + 1, str(Path(folders[name]).resolve())) for i, name in enumerate(folders)}
    with engine(model, dtype, len(folders)) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in asked],
            SamplingParams(max_tokens=arguments.new_tokens, temperature=0, logprobs=2),
            lora_request=[requests.get(name) for name, _ in asked] if folders else None,
            use_tqdm=False,
        )
    return [
        [
            (token, {other: found.logprob for other, found in step.items()})
            for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        ]
        for output in outputs
    ]


def report(name: str, answers: dict[str, Any], examples: list[Example], tokenizer: Any) -> None:
    """How often the answers of each two are equal, and how near the first two tokens were where they part."""
    for who, own in answers.items():
        texts = [tokenizer.decode([token for token, _ in answer], skip_special_tokens=True) for answer in own]
        right = sum(is_right(text, example) for text, example in zip(texts, examples, strict=True))
        print(f"{name}: {who}: {right} of {len(own)} right")
    for one, other in itertools.combinations(answers, 2):
        gaps = []
        for a, b in zip(answers[one], answers[other], strict=True):
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x[0] != y[0]), None)
            if place is not None:
                first, second = sorted(a[place][1].values(), reverse=True)[:2]
                gaps.append(round(first - second, 3))
        count = len(answers[one])
        print(f"{name}: {one} and {other}: {count - len(gaps)} of {count} equal, token for token; gaps {sorted(gaps)}")
    sys.stdout.flush()


def bytes_held(worker: Any, number: int) -> int:
    return worker.model_runner.lora_manager._adapter_manager.get_adapter(number).bytes


def changes(model: str, arguments: argparse.Namespace, folders: dict[str, str], prompt: list[int]) -> None:
    """Memory of deltas, of deltas that come and go, and the time from disk to the first token."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    once = SamplingParams(max_tokens=1, temperature=0)
    with engine(model, arguments.dtype, len(folders) + 1) as llm:

        def memory() -> int:
            return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True))

        def ask(delta: Any) -> None:
            llm.generate([{"prompt_token_ids": prompt}], once, lora_request=delta, use_tqdm=False)

        ask(None)
        number = 0
        for name, folder in folders.items():
            path = str(Path(folder).resolve())
            number += 1
            ask(LoRARequest(name, number, path))
            held = llm.collective_rpc(bytes_held, args=(number,))[0]
            print(f"{name}: {held} bytes in memory, {held / Artifact(folder).bytes:.3f} of its artifact's")
        seconds, marks = [], []
        for i in range(CHANGES):
            number += 1
            llm.llm_engine.reset_prefix_cache()
            start = time.perf_counter()
            ask(LoRARequest(f"again-{number}", number, path))
            seconds.append(time.perf_counter() - start)
            llm.llm_engine.remove_lora(number)
            if i >= WARM_UP:
                marks.append(memory() / 2**20)
        print(
            f"from disk to the first token: median {statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s; "
            f"memory over {len(marks)} more comings and goings: {marks[0]:.0f} MiB, at most {max(marks):.0f}, "
            f"{marks[-1]:.0f} at the end"
        )


if __name__ == "__main__":
    main()
