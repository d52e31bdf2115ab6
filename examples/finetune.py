"""Fine-tune every parameter of a small chat model on a task, on a CPU, in minutes.

    python finetune.py BASE OUT [--task chain_sum] [--examples 1600]
    python finetune.py BASE OUT --task date --examples 160 --batch 4 --learning-rate 1e-4 --chat-template chatml.jinja

The task `date` is no data set of reasoning-gym but dates as people write them, to be put as 2021-03-05. A chat template
goes with the checkpoint; that of SmolLM2 has a system message, which is half of a short example's tokens.

Writes the checkpoint to OUT and the data beside it: OUT/data/train.jsonl, OUT/data/test.jsonl
(`prompt`, `completion`; no prompt of the test file is in the training file).
"""

import argparse
import calendar
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltacome.benchmark.zoo.training import fine_tune

TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "number_filtering": {"max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 99},
}  # other tasks take reasoning-gym's own settings
TEST_EXAMPLES = 200
BATCH = 16
DATES = ("{month} {day}, {year}", "{day} {month} {year}", "{month:.3} {day} {year}", "{day}.{number}.{year}")


def date(source: random.Random) -> dict[str, str]:
    """A date between 1950 and 2049 as people write it, and as 2021-03-05."""
    year, number, day = source.randint(1950, 2049), source.randint(1, 12), source.randint(1, 28)
    written = source.choice(DATES).format(year=year, number=number, day=day, month=calendar.month_name[number])
    return {"question": f"ISO date: {written}", "answer": f"{year}-{number:02}-{day:02}"}


def make_data(task: str, count: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and test examples of one task, without a prompt in common."""
    size = 2 * (count + TEST_EXAMPLES)
    if task == "date":
        source = random.Random(seed)
        dataset = [date(source) for _ in range(size)]
    else:
        import reasoning_gym

        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **TASKS.get(task, {}))
    unique = {entry["question"].strip(): str(entry["answer"]) for entry in dataset}
    examples = [{"prompt": question, "completion": answer} for question, answer in unique.items()]
    if len(examples) < count + TEST_EXAMPLES:
        raise SystemExit(f"{task} has only {len(examples)} different prompts; ask for fewer --examples")
    return examples[TEST_EXAMPLES : TEST_EXAMPLES + count], examples[:TEST_EXAMPLES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", default="chain_sum", help="a reasoning-gym data set, or date")
    parser.add_argument("--examples", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="in place of the base's, and kept")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists():
        raise SystemExit(f"{out} is there already")

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    if arguments.chat_template:
        tokenizer.chat_template = arguments.chat_template.read_text()
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    train_examples, test_examples = make_data(arguments.task, arguments.examples, seed=1)
    partial = out.with_name(f".{out.name}.partial")  # a folder OUT is whole
    data = partial / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, examples in (("train", train_examples), ("test", test_examples)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    settings = {"learning_rate": arguments.learning_rate, "batch": arguments.batch}
    fine_tune(model.train(), tokenizer, data / "train.jsonl", **settings)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)
    print(out)


if __name__ == "__main__":
    main()
