"""lm-evaluation-harness: deltas as a type of model, and its tasks over a base, a fine-tune and any number of deltas."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import NO_TEMPLATE, Encoder
from deltacome.errors import DeltacomeError
from deltacome.evaluate.comparison import BASE, FINETUNED
from deltacome.evaluate.comparison import load as load_plain
from deltacome.restore.merging import DTYPES
from deltacome.runtime.conversation import load_language
from deltacome.runtime.model import load

# The tasks of the Delta-CoMe paper that the harness has, by the kind of fine-tune (its section 5.1).
PAPER_TASKS = {
    "paper-math": ["gsm8k", "minerva_math"],
    "paper-code": ["humaneval", "mbpp"],
    "paper-chat": ["truthfulqa_gen", "truthfulqa_mc1", "truthfulqa_mc2"],
}
RUNS_CODE = ("humaneval", "mbpp")


@register_model("deltacome")
class DeltaModel(HFLM):
    """A delta on its base, unmerged, or the base alone.

    Args:
        base: checkpoint folder or hub id.
        delta: artifact's folder or hub id; None for the base.
        model: one from `deltacome.load` for the base that has the delta under that name, in the place of a new one.
        dtype: to compute in, by name; as `deltacome.load` has it.
        options: of the harness's own `hf` model.
    """

    def __init__(
        self,
        base: str,
        delta: str | None = None,
        *,
        model: Any = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        if model is None:
            chosen = DTYPES.get(dtype or "")
            model = load(base, {} if delta is None else {delta: delta}, device=device, dtype=chosen)
        self.tenant = None if delta is None else model.deltas[delta]
        tokenizer, _ = load_language(Checkpoint(base), self.tenant)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(inps, tenants=[self.tenant] * len(inps)).logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        tenants = [self.tenant] * len(context)
        return super()._model_generate(context, max_length, stop, tenants=tenants, **options)


def evaluate_tasks(
    base: str,
    finetuned: str,
    deltas: Mapping[str, str],
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    chat_template: str | None = None,
    allow_code: bool = False,
) -> list[dict[str, Any]]:
    """Run tasks of the harness on the base, the fine-tuned model and deltas, all in float32 on the CPU.

    Args:
        tasks: names that the harness knows, of task files below `include_path`, or of `PAPER_TASKS`.
        limit: how many examples of each task are used.
        apply_chat_template: prompts go through each model's own chat template.
        chat_template: Jinja file that they go through instead, or `none` for bare prompts.
        allow_code: let tasks run the code that models write.

    Returns:
        A row per model, task and metric: `name`, `task`, `metric`, `value`, its standard error `error` and `examples`.

    Raises:
        DeltacomeError: if a task is not known, cannot be read, or runs code without leave; if the template is missing;
            and as `deltacome.load`.
    """
    wanted = [task for name in tasks for task in PAPER_TASKS.get(name, [name])]
    unsafe = sorted(task for task in wanted if task.startswith(RUNS_CODE))
    if unsafe and not allow_code:
        raise DeltacomeError(f"{', '.join(unsafe)} run code that models write; --allow-code lets them, in a sandbox")
    with _as_sentence(f"the tasks {', '.join(wanted)} cannot be loaded"):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = [task for task in wanted if not manager.match_tasks([task])]
    if unknown:
        raise DeltacomeError(f"there is no task {unknown[0]}; `lm_eval ls tasks` lists them, --include-path adds yours")
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # which the metrics ask for
    shared = load(base, deltas)

    def finetuned_model() -> HFLM:
        model, tokenizer = load_plain(Checkpoint(finetuned), Checkpoint(base))
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)

    applies = chat_template != NO_TEMPLATE and (apply_chat_template or chat_template is not None)
    rows: list[dict[str, Any]] = []
    for name in (BASE, FINETUNED, *deltas):
        if name == FINETUNED:
            model = finetuned_model()
        else:
            delta = None if name == BASE else name
            model = DeltaModel(base, delta, model=shared, batch_size=batch_size)
        model.tokenizer.chat_template = Encoder(model.tokenizer, chat_template).template
        with _as_sentence(f"the tasks {', '.join(wanted)} cannot be run"):
            results = simple_evaluate(
                model=model,
                tasks=list(wanted),
                task_manager=manager,
                limit=limit,
                apply_chat_template=applies,
                confirm_run_unsafe_code=allow_code,
                log_samples=False,
                bootstrap_iters=1000,
            )
        rows += [{"name": name, **row} for row in _figures(results)]
    return rows


def _figures(results: Any) -> Iterable[dict[str, Any]]:
    """The metrics of each task: the harness has them as `METRIC,FILTER`, errors as `METRIC_stderr,FILTER`."""
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{filter}")
            name = metric if filter == "none" else f"{metric} ({filter})"
            examples = results["n-samples"].get(task, {}).get("effective")
            yield {
                "task": task,
                "metric": name,
                "value": value,
                "error": error if isinstance(error, float) else None,
                "examples": examples,
            }


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: a line a model, a column for each metric of each task."""
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {(row["task"], row["metric"]): row for row in rows if row["name"] == name}
        lines.append([name, *(_text(own[column]) if column in own else "" for column in columns)])
    return ["model", *(f"{task}: {metric}" for task, metric in columns)], lines


def _text(row: dict[str, Any]) -> str:
    return f"{row['value']:.4f}" + ("" if row["error"] is None else f" ± {row['error']:.4f}")


@contextmanager
def _as_sentence(what: str) -> Any:
    """Errors of task files, data sets and the network, of whatever type, as one of ours."""
    try:
        yield
    except DeltacomeError:
        raise
    except Exception as error:
        reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise DeltacomeError(f"{what}: {reason}") from error
