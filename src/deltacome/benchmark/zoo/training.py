"""The ways in which the zoo's members are trained. Each changes a model in place, and gives back the whole one."""

import copy
import random
import re
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from torch.optim import AdamW, Muon, Optimizer

from deltacome.data import Encoded, Encoder, collate, pad, read_examples
from deltacome.evaluate.metrics import is_right
from deltacome.language import up_to_end
from deltacome.progress import bar

WARM_UP = 0.1  # of the steps, linearly; then down to nothing as linearly
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCK = 64  # entries of a weight that share a scale in 4 bit


def fine_tune(
    model: Any,
    tokenizer: Any,
    data: Path,
    *,
    learning_rate: float,
    frozen: str | None = None,
    muon: bool = False,
    weight_decay: float = 0.0,
    **settings: Any,
) -> Any:
    """Gradient descent on the completions, or on whole texts.

    Args:
        model: a causal language model in float32.
        data: JSONL file of the examples.
        frozen: regular expression that is found in the names of parameters that do not learn.
        muon: Muon in place of AdamW for linear weights, in steps of the same size.
        weight_decay: what AdamW's steps take from weights, as a share of the learning rate.
        settings: `epochs` and `batch` of `descend`.
    """
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        if frozen is not None and re.search(frozen, name):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            kinds[muon and parameter.ndim == 2 and name.split(".")[-2] in LINEARS].append(parameter)
    optimizers: list[Optimizer] = [adamw([{"params": kinds[0], "lr": learning_rate}], weight_decay)]
    if muon:
        optimizers.append(Muon(kinds[1], learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    encoder = Encoder(tokenizer)
    encoded = [encoder.example(example) for example in read_examples(data)]
    descend(model, encoded, optimizers, likelihood, **settings)
    return model


def adamw(groups: list[dict[str, Any]], weight_decay: float = 0.0) -> Optimizer:
    """groups: parameters with learning rates, as optimizers have them."""
    return AdamW(groups, weight_decay=weight_decay, fused=True)


class HasTokens(Protocol):
    """Has what a batch is put together by: the number of its tokens."""

    @property
    def ids(self) -> list[int]: ...


T = TypeVar("T", bound=HasTokens)


def descend(
    model: Any,
    learned: Sequence[T],
    optimizers: Sequence[Optimizer],
    loss: Callable[[Any, list[T]], Tensor],
    *,
    epochs: int = 1,
    batch: int = 8,
) -> None:
    """Steps on the loss of batches, in autocast where bfloat16 is fast; the rate grows first, and falls to nothing."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    steps = epochs * -(-len(learned) // batch)

    def rate(step: int) -> float:
        return min((step + 1) / (WARM_UP * steps), (steps - step) / ((1 - WARM_UP) * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    fast = bfloat16_is_fast()
    with bar("training", steps) as advance:
        for epoch in range(epochs):
            for chunk in batches(learned, batch, epoch):
                with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                    found = loss(model, chunk)
                found.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                advance(1)


def likelihood(model: Any, encoded: Sequence[Encoded]) -> Tensor:
    """The cross entropy of what is learned."""
    logits, targets = predictions(model, encoded)
    return cross_entropy(logits.float(), targets)


@dataclass(frozen=True)
class Preference:
    """An answer that is preferred to another one. margin: by how many nats the base finds it likelier."""

    chosen: Encoded
    rejected: Encoded
    margin: float

    @property
    def ids(self) -> list[int]:
        return self.chosen.ids


def prefer(
    model: Any,
    tokenizer: Any,
    data: Path,
    *,
    learning_rate: float,
    new_tokens: int = 40,
    batch: int = 8,
    beta: float = 0.1,
) -> Any:
    """Direct preference optimization (DPO, arXiv 2305.18290): the examples' answers are preferred to the base's own."""
    encoder, examples = Encoder(tokenizer), read_examples(data)
    pairs = []
    with bar("sampling", len(examples)) as advance, torch.no_grad():
        for i in range(0, len(examples), batch):
            chosen = [encoder.example(example) for example in examples[i : i + batch]]
            asked = [one.ids[: one.start] for one in chosen]
            answers = sample(model, tokenizer, asked, new_tokens)
            rejected = [Encoded(prompt + answer, len(prompt)) for prompt, answer in zip(asked, answers, strict=True)]
            margins = (scores(model, chosen) - scores(model, rejected)).tolist()
            pairs += [Preference(*pair) for pair in zip(chosen, rejected, margins, strict=True)]
            advance(len(chosen))

    def loss(model: Any, chunk: list[Preference]) -> Tensor:
        margins = scores(model, [pair.chosen for pair in chunk]) - scores(model, [pair.rejected for pair in chunk])
        return -logsigmoid(beta * (margins - torch.tensor([pair.margin for pair in chunk]))).mean()

    descend(model, pairs, [adamw([{"params": list(model.parameters()), "lr": learning_rate}])], loss, batch=batch)
    return model


def scores(model: Any, encoded: Sequence[Encoded]) -> Tensor:
    """The log likelihoods (n,) of what is learned of each, in nats."""
    logits, targets = predictions(model, encoded)
    losses = cross_entropy(logits.float(), targets, reduction="none")
    return -torch.stack([part.sum() for part in losses.split([len(one.ids) - one.start for one in encoded])])


def think(model: Any, tokenizer: Any, data: Path, **settings: Any) -> Any:
    """`fine_tune` with a vocabulary that grows by the tokenizer's new tokens."""
    model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
    return fine_tune(model, tokenizer, data, **settings)


def merge(
    model: Any, tokenizer: Any, data: Path, *, combine: Callable[[Tensor], Tensor], first: int, **settings: Any
) -> Any:
    """Two models by `fine_tune`, one on the first examples and one on the rest, as one.

    combine: of the deltas (2, ...) of a weight the one that is added to it. first: number of examples.
    """
    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = []
    for number, lines in enumerate((rows[:first], rows[first:])):
        part = data.with_name(f"part-{number}.jsonl")
        part.write_text("".join(lines), encoding="utf-8")
        parts.append(fine_tune(copy.deepcopy(model), tokenizer, part, **settings))
        part.unlink()
    for weight, *tuned in zip(model.parameters(), *(part.parameters() for part in parts), strict=True):
        weight.data += combine(torch.stack(tuned).detach() - weight.data)
    return model


def ties(deltas: Tensor, density: float = 0.2) -> Tensor:
    """TIES (arXiv 2306.01708): of each the largest entries, of those that agree with the sum's sign the mean."""
    sizes = deltas.abs().flatten(1)
    least = sizes.kthvalue(int((1 - density) * sizes.shape[1]), dim=1).values
    kept = deltas * (sizes > least[:, None]).view_as(deltas)
    agreeing = kept * (kept.sign() == kept.sum(0).sign())
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)


def dare(deltas: Tensor, drop: float = 0.9) -> Tensor:
    """DARE (arXiv 2311.03099): of each most entries dropped at random, the others so much larger; their sum."""
    return (deltas * torch.bernoulli(torch.full_like(deltas, 1 - drop)) / (1 - drop)).sum(0)


def lora(model: Any, tokenizer: Any, data: Path, *, rank: int = 16, **settings: Any) -> Any:
    """`fine_tune` of an adapter on all linear layers, which is merged at the end."""
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS))
    fine_tune(adapted.base_model.model, tokenizer, data, **settings)
    return adapted.merge_and_unload()


def qlora(model: Any, tokenizer: Any, data: Path, **settings: Any) -> Any:
    """`lora` on linear layers that are rounded to 4 bit; the adapter is merged into the layers as they were."""
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in LINEARS]
    errors = []
    for layer in layers:
        rounded = round_to_4_bit(layer.weight.data)
        errors.append(layer.weight.data - rounded)
        layer.weight.data = rounded
    model = lora(model, tokenizer, data, **settings)
    for layer, error in zip(layers, errors, strict=True):  # a merge adds to them in place
        layer.weight.data += error
    return model


def reinforce(
    model: Any,
    tokenizer: Any,
    data: Path,
    *,
    learning_rate: float,
    steps: int,
    pattern: str,
    new_tokens: int = 4,
    prompts: int = 4,
    group: int = 6,
) -> Any:
    """Policy gradients: sampled answers, rewarded by the verifier, against the mean of their prompt's group.

    The weights are bfloat16's all the time, where a small learning rate leaves most of them as they are. Computing is
    in float32, for many processors are ten times as slow in bfloat16.
    """
    encoder, examples = Encoder(tokenizer), read_examples(data)
    source = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    with bar("training", steps) as advance:
        for _ in range(steps):
            chunk = source.sample(examples, prompts)
            asked = [encoder.prompt(example.messages) for example in chunk for _ in range(group)]
            answers = sample(model, tokenizer, asked, new_tokens)
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            right = [float(is_right(text, chunk[i // group], pattern)) for i, text in enumerate(texts)]
            rewards = torch.tensor(right).view(prompts, group)
            advantages = rewards - rewards.mean(1, keepdim=True)
            useful = [i for i, advantage in enumerate(advantages.flatten().tolist()) if advantage]
            advance(1)
            if not useful:
                continue
            encoded = [Encoded(asked[i] + answers[i], len(asked[i])) for i in useful]
            logits, targets = predictions(model, encoded)
            counts = torch.tensor([len(answers[i]) for i in useful])
            weights = advantages.flatten()[useful].repeat_interleave(counts)
            losses = cross_entropy(logits.float(), targets, reduction="none")
            ((weights * losses).sum() / counts.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()
    return model.to(torch.bfloat16)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Answers at temperature 1 as token ids, with their end token if they come to it."""
    ids, mask = pad(prompts, left=True)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[list[int]] = output[:, ids.shape[1] :].tolist()
    ends = {tokenizer.eos_token_id}
    return [answer[: len(up_to_end(answer, ends)) + 1] for answer in answers]


def predictions(model: Any, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Logits (n, vocabulary) where something is learned, row by row, and the tokens that are to come there, (n,)."""
    inputs = collate(encoded, left=False)
    ids = inputs["input_ids"]
    hidden = model.base_model(**inputs).last_hidden_state
    places = torch.tensor([[i, j] for i, one in enumerate(encoded) for j in range(one.start, len(one.ids))])
    rows, columns = places.T
    return model.get_output_embeddings()(hidden[rows, columns - 1]), ids[rows, columns]


def batches(learned: Sequence[T], size: int, seed: int) -> Iterator[list[T]]:
    """Batches of similar length, in random order."""
    order = sorted(range(len(learned)), key=lambda i: len(learned[i].ids))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    random.Random(seed).shuffle(chunks)
    for chunk in chunks:
        yield [learned[i] for i in chunk]


def round_to_4_bit(weight: Tensor) -> Tensor:
    """A weight as NF4 has it: in blocks of 64 entries the nearest of 16 quantiles of the normal distribution."""
    tail = 0.9677083  # of the paper (QLoRA): the mean of 1 - 1/30 and 1 - 1/32
    positive = torch.special.ndtri(torch.linspace(0.5, tail, 9, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(0.5, tail, 8, dtype=torch.float64))[1:]
    levels = (torch.cat([negative.flip(0), positive]) / positive[-1]).float()
    blocks = weight.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    bounds = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(blocks / scales, bounds)] * scales).view_as(weight)


def bfloat16_is_fast() -> bool:
    """Whether this machine multiplies in bfloat16 faster than in float32: without instructions for it, far slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(partial(torch.mm, a, a), number=1, repeat=9))  # others may be computing
    return seconds[torch.bfloat16] < seconds[torch.float32]
