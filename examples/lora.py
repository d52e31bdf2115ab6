"""Against LoRA at equal bytes: trained on the fine-tune's own data, and extracted from it.

    python lora.py BASE FINETUNED train.jsonl test.jsonl --ratio 16 --chat-template chatml.jinja -o OUTPUT

PEFT trains an adapter of all linear layers, of the largest rank that an artifact of the ratio has room for in 16 bit;
the others are what `deltacome compress` makes of the fine-tuned model at that ratio. An adapter that OUTPUT has is
taken up, so that a killed run goes on. Everything on disk is counted.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltacome
from deltacome.benchmark.results import Table, save
from deltacome.benchmark.zoo.training import descend
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder, read_examples
from deltacome.evaluate.comparison import BASE, FINETUNED, Comparison, load
from deltacome.evaluate.metrics import ANSWER_PATTERN, compile_pattern
from deltacome.evaluate.summary import import_pyplot
from deltacome.format.artifact import Artifact
from deltacome.restore.merging import load_merged

METHODS = {"rate-distortion": "deltacome", "delta-come": "Delta-CoMe", "low-rank": "low-rank, extracted"}
COLUMNS = {
    "name": "model",
    "bytes": "bytes",
    "artifact_ratio": "ratio",
    "seconds": "seconds to make",
    "accuracy": "accuracy",
    "nll": "NLL of the right answers",
    "on_task_kl": "on-task KL to the fine-tuned model",
}


def largest_rank(model: torch.nn.Module, room: int) -> int:
    """The rank at which factors of all linear layers but the head, in 16 bit, take at most `room` bytes."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return room // (2 * sum(m.in_features + m.out_features for m in linears))


def train_adapter(base: Path, data: Path, out: Path, room: int, epochs: int, rate: float, template: str | None) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if template:
        tokenizer.chat_template = Path(template).read_text()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rank = largest_rank(model, room)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    encoder = Encoder(tokenizer)
    encoded = [encoder.example(example) for example in read_examples(data)] * epochs
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    descend(model.get_base_model().train(), encoded, [{"params": learned, "lr": rate}], batch=16)
    model.to(torch.bfloat16).save_pretrained(out.with_name("adapter.partial"))
    out.with_name("adapter.partial").rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "finetuned", "train", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ratio", type=float, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--chat-template")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    out: Path = arguments.output
    out.mkdir(parents=True, exist_ok=True)

    base, finetuned = Checkpoint(arguments.base), Checkpoint(arguments.finetuned)
    whole = 2 * finetuned.elements
    comparison = Comparison(
        finetuned,
        read_examples(arguments.test, arguments.limit),
        new_tokens=64,
        chat_template=arguments.chat_template,
        pattern=compile_pattern(ANSWER_PATTERN),
    )
    with torch.inference_mode():
        rows = [{"name": FINETUNED, **comparison.measure(FINETUNED, comparison.reference, comparison.tokenizer)}]
        rows.insert(0, {"name": BASE, **comparison.measure(BASE, *load(base))})
        for method, name in METHODS.items():
            place = out / method
            shutil.rmtree(place, ignore_errors=True)
            made = deltacome.compress(arguments.base, arguments.finetuned, place, ratio=arguments.ratio, method=method)
            artifact = Artifact(place)
            size = {"bytes": artifact.bytes, "artifact_ratio": artifact.ratio, "seconds": round(made["seconds"])}
            rows.append({"name": name, **size, **comparison.measure(name, *load_merged(base, artifact))})
    adapter = out / "adapter"
    started = time.perf_counter()
    if not adapter.exists():
        room, options = (
            int(whole / arguments.ratio),
            (arguments.epochs, arguments.learning_rate, arguments.chat_template),
        )
        train_adapter(arguments.base, arguments.train, adapter, room, *options)
        (adapter / "seconds").write_text(f"{time.perf_counter() - started:.0f}")
    model = PeftModel.from_pretrained(load(base)[0], adapter)
    name = f"LoRA, trained, rank {model.peft_config['default'].r}"
    files = (adapter / "adapter_model.safetensors", adapter / "adapter_config.json")
    size = sum(path.stat().st_size for path in files)
    row = {
        "name": name,
        "bytes": size,
        "artifact_ratio": whole / size,
        "seconds": int((adapter / "seconds").read_text()),
    }
    with torch.inference_mode():
        rows.append(row | comparison.measure(name, model.merge_and_unload(), comparison.tokenizer))
    for row in rows:
        row.pop("outputs", None)

    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    names = [row["name"] for row in rows][::-1]
    accuracy, error = ([row[key] for row in rows][::-1] for key in ("accuracy", "accuracy_error"))
    axes.errorbar(accuracy, names, xerr=error, fmt="o", capsize=3)
    axes.set(xlabel=f"accuracy on {len(comparison.tasks)} held-out examples, with its standard error", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    title = f"{arguments.finetuned.name}, 1/{arguments.ratio:g}; the adapter: {arguments.epochs} epochs"
    table = Table(f"{title}, learning rate {arguments.learning_rate:g}", COLUMNS, rows)
    save(out, "lora", [table], figure)
    print(table.markdown())


if __name__ == "__main__":
    main()
