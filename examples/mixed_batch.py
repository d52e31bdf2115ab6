"""Check on real models that a mixed batch answers as each merged model does alone: greedy, float32, token for token.

    python mixed_batch.py BASE --delta math=MATH_DELTA=math_test.jsonl --delta intent=INTENT_DELTA=intent_test.jsonl

Takes prompts from each file in turn and deals them to the deltas and the base, whoever the prompts were meant for. Then
the same in another order, so that each has other neighbors. Says too how long each delta takes from disk to its first
token, and how many bytes in memory.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltacome
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder, pad, read_examples
from deltacome.restore.merging import load_merged, open_checked


def answers(model, rows: list[list[int]], end: int, new_tokens: int, **options) -> list[list[int]]:
    """Token ids of the answers to a batch of prompts, up to their ends."""
    ids, mask = pad(rows, left=True)
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
        **options,
    )
    found = [row[ids.shape[1] :].tolist() for row in output]
    return [row[: row.index(end) + 1] if end in row else row for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--delta", action="append", required=True, metavar="NAME=DELTA=PROMPTS.jsonl")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--chat-template")
    arguments = parser.parse_args()

    torch.set_grad_enabled(False)
    base, tokenizer = Checkpoint(arguments.base), AutoTokenizer.from_pretrained(arguments.base)
    encoder, end = Encoder(tokenizer, arguments.chat_template), tokenizer.eos_token_id
    deltas = {name: (folder, file) for name, folder, file in (item.split("=") for item in arguments.delta)}
    share = -(-arguments.prompts // len(deltas))
    prompts = [
        encoder.prompt(example.messages)
        for row in zip(*(read_examples(file, share) for _, file in deltas.values()), strict=True)
        for example in row
    ][: arguments.prompts]
    names = [None, *deltas]
    tenants = [names[(i + i // len(names)) % len(names)] for i in range(len(prompts))]

    alone: dict[int, list[int]] = {}
    for name in names:
        if name is None:
            model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32).eval()
        else:
            model, _ = load_merged(base, open_checked(base, deltas[name][0]))
        for i, tenant in enumerate(tenants):
            if tenant == name:
                alone[i] = answers(model, [prompts[i]], end, arguments.new_tokens)[0]
    model = deltacome.load(arguments.base, {name: folder for name, (folder, _) in deltas.items()}, dtype=torch.float32)
    for name, (folder, _) in deltas.items():
        prompt = next(prompt for prompt, tenant in zip(prompts, tenants, strict=True) if tenant == name)
        started = time.perf_counter()
        model.add_delta(name, folder)
        answers(model, [prompt], end, 1, tenants=[name])
        seconds, tenant = time.perf_counter() - started, model.deltas[name]
        print(f"{name}: {seconds:.2f} s from disk to the first token of an answer to {len(prompt)} tokens;", end=" ")
        print(f"{tenant.bytes:,} bytes in memory, {tenant.bytes / tenant.artifact.bytes:.3f} times its artifact's")
    wrong = 0
    for seed in (0, 1):
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        same = 0
        for start in range(0, len(order), arguments.batch):
            chunk = order[start : start + arguments.batch]
            own = {"tenants": [tenants[i] for i in chunk]}
            together = answers(model, [prompts[i] for i in chunk], end, arguments.new_tokens, **own)
            same += sum(alone[i] == answer for i, answer in zip(chunk, together, strict=True))
        print(f"{same} of {len(prompts)} answers are the merged model's, token for token")
        wrong += len(prompts) - same
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
