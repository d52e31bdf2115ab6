"""The comparison of base, fine-tuned model and compressed deltas, as one table."""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltacome.checkpoints.architectures import auto_class
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import pair
from deltacome.data import Encoded, Encoder, Example, read_examples
from deltacome.errors import DeltacomeError, reason
from deltacome.evaluate.metrics import ANSWER_PATTERN, Mean, answer, compile_pattern, divergence, is_right, retention
from deltacome.files import write_atomically
from deltacome.format.artifact import Artifact
from deltacome.hub import UNFIT_FILES
from deltacome.language import load_processor, load_tokenizer
from deltacome.progress import bar
from deltacome.restore.merging import load_merged, model_of, open_checked
from deltacome.weights import split_stack

LONGEST = 2048  # tokens of an example that are used
BASE, FINETUNED = "base", "fine-tuned"


def evaluate(
    base: str | Path,
    finetuned: str | Path,
    deltas: Mapping[str, str | Path],
    data: str | Path,
    *,
    offtask: str | Path | None = None,
    limit: int | None = None,
    new_tokens: int = 64,
    chat_template: str | None = None,
    answer_pattern: str = ANSWER_PATTERN,
) -> list[dict[str, Any]]:
    """Compare the base, the fine-tuned model and compressed deltas, all in float32.

    Args:
        deltas: artifact folders by name.
        data: JSONL file of the fine-tune's own task, held out; on-task figures are over its completions. Images are for
            the fine-tuned model's processor.
        offtask: JSONL file with `text`; off-task KL is over all its positions.
        limit: how many of the first lines of `data` are used.
        new_tokens: the longest answer.
        chat_template: Jinja file, or `none`, in place of the tokenizers' own.
        answer_pattern: regular expression whose group is the answer; the last match counts.

    Returns:
        A row per model with its figures, each a value with its standard error under the same key + `_error`, and its
        `outputs`. What a file gives no ground for is absent.

    Raises:
        DeltacomeError: on bad input.
    """
    examples = read_examples(data, limit)
    texts = read_examples(offtask) if offtask is not None else []
    pattern = compile_pattern(answer_pattern)
    base_checkpoint = Checkpoint(base)
    artifacts = {name: open_checked(base_checkpoint, path) for name, path in deltas.items()}
    tuned = Checkpoint(finetuned)
    comparison = Comparison(
        tuned,
        examples,
        texts,
        new_tokens=new_tokens,
        chat_template=chat_template,
        pattern=pattern,
        base=base_checkpoint,
    )
    sources: dict[str, Callable[[], tuple[Any, Any]]] = {
        BASE: partial(load_base, base_checkpoint, tuned),
        FINETUNED: lambda: (comparison.reference, comparison.tokenizer),
        **{name: partial(load_merged, base_checkpoint, artifact) for name, artifact in artifacts.items()},
    }
    rows = []
    for name, source in sources.items():
        started = time.monotonic()
        row: dict[str, Any] = {"name": name}
        if name in artifacts:
            row |= sizes(artifacts[name])
        row |= comparison.measure(name, *source())
        row["seconds"] = round(time.monotonic() - started, 1)
        rows.append(row)
    for row in rows:
        row |= comparison.retention(row, rows[0], rows[1])
    return rows


class Comparison:
    """The fine-tuned model as the reference, and the encoded data, on which any number of models are measured.

    Args:
        examples: of the fine-tune's own task, for on-task KL, NLL and answers.
        texts: for off-task KL, over all their positions.
        others: of other tasks, for KL over all positions of their prompts.
        new_tokens, chat_template: as of `evaluate`.
        pattern: regular expression whose group is the answer.
        base: whose tokenizer is used where the fine-tuned model has none.

    Raises:
        DeltacomeError: as `load_for`.
    """

    def __init__(
        self,
        finetuned: Checkpoint,
        examples: list[Example],
        texts: Iterable[Example] = (),
        others: Iterable[Example] = (),
        *,
        new_tokens: int,
        chat_template: str | None,
        pattern: re.Pattern[str],
        base: Checkpoint | None = None,
    ) -> None:
        self.new_tokens, self.chat_template, self.pattern = new_tokens, chat_template, pattern
        self.reference, encoder = load_for(examples, finetuned, base, chat_template)
        self.tokenizer, self.processor = encoder.tokenizer, encoder.processor
        self.tasks = [example for example in examples if example.messages]
        prompts = (encoder.prompt(other.messages) for other in others if other.messages)
        self.encoded = {
            "on_task": [cut(encoder.example(example)) for example in examples],
            "off_task": [cut(encoder.example(text)) for text in texts],
            "other": [cut(Encoded(prompt)) for prompt in prompts if prompt],
        }

    def measure(self, name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
        """One model's figures with their standard errors, and its answers, prompted through its own tokenizer.

        Returns:
            `on_task_kl`, `off_task_kl`, `other_kl` and `nll` in nats a token, `accuracy`, each with + `_error`, and
            `outputs`. What there is no data for is absent.
        """
        add_tokens(model, self.reference.get_input_embeddings().num_embeddings)
        encoder = Encoder(tokenizer, self.chat_template, self.processor)
        row: dict[str, Any] = {}
        figures: dict[str, Mean] = {}
        total = sum(map(len, self.encoded.values())) + len(self.tasks)
        with bar(f"evaluating {name}", total) as advance:
            for kind, encoded in self.encoded.items():
                if encoded:
                    figures[f"{kind}_kl"], nll = divergence(self.reference, model, encoded, advance)
                    if kind == "on_task":
                        figures["nll"] = nll
            if self.tasks:
                prompts = [encoder.question(example) for example in self.tasks]
                row["outputs"] = answer(model, encoder.tokenizer, prompts, self.new_tokens, advance)
                figures["accuracy"] = Mean.of_successes(int(self._right(row["outputs"]).sum()), len(self.tasks))
        return row | _with_errors(figures)

    def retention(self, row: dict[str, Any], base: dict[str, Any], finetuned: dict[str, Any]) -> dict[str, float]:
        """`retention` with its error from three rows of `measure`; nothing if the fine-tune changes no score."""
        if not self.tasks:
            return {}
        kept = retention(*(self._right(one["outputs"]) for one in (row, base, finetuned)))
        return _with_errors({"retention": kept}) if kept else {}

    def _right(self, outputs: list[str]) -> Tensor:
        """1 for each answer that is right, 0 for the others."""
        return torch.tensor([float(is_right(o, e, self.pattern)) for o, e in zip(outputs, self.tasks, strict=True)])


def _with_errors(figures: dict[str, Mean]) -> dict[str, float]:
    """Each value under its key, its standard error under the same key + `_error`."""
    return {name: x for key, mean in figures.items() for name, x in ((key, mean.value), (f"{key}_error", mean.error))}


def sizes(artifact: Artifact) -> dict[str, Any]:
    """Method, ratios and bytes of an artifact, as a row has them."""
    return {
        "method": artifact.method["name"],
        "artifact_ratio": round(artifact.ratio, 3),
        "linear_ratio": artifact.manifest["linear_ratio"],
        "bytes": artifact.bytes,
    }


def load(checkpoint: Checkpoint, base: Checkpoint | None = None) -> tuple[Any, Any]:
    """A checkpoint's model in float32, in evaluation mode, and its tokenizer, or the base's where it has none.

    Raises:
        DeltacomeError: if transformers cannot load it.
    """
    kind = auto_class(checkpoint.config.get("model_type"))
    try:
        model = kind.from_pretrained(checkpoint.folder, dtype=torch.float32, trust_remote_code=False)
    except UNFIT_FILES as error:
        raise DeltacomeError(f"transformers cannot load {checkpoint.source}: {reason(error)}") from error
    return model.eval(), load_tokenizer(checkpoint.source, checkpoint.folder, None if base is None else base.folder)


def load_for(
    examples: list[Example], checkpoint: Checkpoint, base: Checkpoint | None, chat_template: str | None
) -> tuple[Any, Encoder]:
    """A checkpoint's model, see `load`, and the encoder for examples, which may have images.

    Raises:
        DeltacomeError: if transformers cannot load it, on a bad template, or on images that it cannot see.
    """
    has_images = any(example.image for example in examples)
    processor = load_processor(checkpoint.source, checkpoint.folder) if has_images else None
    model, tokenizer = load(checkpoint, base)
    return model, Encoder(tokenizer, chat_template, processor)


def load_base(base: Checkpoint, finetuned: Checkpoint) -> tuple[Any, Any]:
    """The base's model and tokenizer, as `load` has them.

    A plain language model as the base of a vision-language model is that one with the base's weights in the place of
    its own, and with its own where the base has none.

    Raises:
        DeltacomeError: if transformers cannot load it, or the weights do not correspond.
    """
    text = finetuned.config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") != base.config.get("model_type"):
        return load(base)
    matrices: dict[str, dict[int | None, Tensor]] = {}
    for p in pair(base, finetuned):
        weight = finetuned.read_float(p.name) if p.dtype.is_floating_point else finetuned.read(p.name)
        if p.base_name is not None:
            ours = base.read_float(p.base_name)
            weight = torch.cat((ours[: p.rows], weight[p.rows :])) if p.shape else ours
        stack, number = split_stack(p.name)
        matrices.setdefault(stack, {})[number] = weight
    weights = {
        name: found[None] if None in found else torch.stack([found[i] for i in range(len(found))])
        for name, found in matrices.items()
    }
    model = model_of(weights, finetuned.folder, f"{base.source} as {finetuned.source}", torch.float32)
    return model, load_tokenizer(finetuned.source, finetuned.folder, base.folder)


def add_tokens(model: Any, size: int) -> None:
    """Give a model whose vocabulary is smaller than `size` the missing tokens, with embeddings of zero."""
    old = model.get_input_embeddings().num_embeddings
    if old < size:
        model.resize_token_embeddings(size, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.data[old:] = 0


def cut(example: Encoded) -> Encoded:
    """An encoded example without what is over the longest length; one with an image stays, its tokens go together."""
    return example if example.image else Encoded(example.ids[:LONGEST], min(example.start, LONGEST - 1))


COLUMNS = {
    "name": "model",
    "method": "method",
    "artifact_ratio": "artifact ratio",
    "linear_ratio": "linear ratio",
    "on_task_kl": "on-task KL",
    "nll": "NLL",
    "off_task_kl": "off-task KL",
    "accuracy": "accuracy",
    "retention": "retention",
    "seconds": "seconds",
}


def cells(row: dict[str, Any], columns: Iterable[str] = COLUMNS) -> list[str]:
    """The figures of those names as text, with their standard errors; empty where the row lacks one."""

    def text(key: str) -> str:
        value = row.get(key)
        if value is None:
            return ""
        if key.endswith("_ratio"):
            return f"1/{value:.1f}"
        if f"{key}_error" in row:
            digits = 5 if key.endswith("kl") else 3
            return f"{value:.{digits}f} ± {row[f'{key}_error']:.{digits}f}"
        return f"{value:,}" if isinstance(value, int | float) else str(value)

    return [text(key) for key in columns]


def markdown(rows: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    """The rows as a Markdown table. columns: headings by the rows' keys."""
    return markdown_table([list(columns.values()), ["---"] * len(columns), *(cells(row, columns) for row in rows)])


def markdown_table(lines: list[list[str]]) -> str:
    """Lines of cells, the second one of dashes, as Markdown."""
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def save_table(rows: list[dict[str, Any]], path: Path, columns: dict[str, str] = COLUMNS) -> None:
    """Write the rows as JSON to `path` and as a Markdown table beside it. columns: headings by the rows' keys."""
    write_atomically(path, (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomically(path.with_suffix(".md"), markdown(rows, columns).encode())
