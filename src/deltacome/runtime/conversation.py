"""Conversations with several tenants at once, each through its own chat template."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.data import Encoder, pad
from deltacome.errors import DeltacomeError
from deltacome.language import as_set, end_tokens, load_tokenizer, up_to_end
from deltacome.restore.merging import copy_sidecars
from deltacome.runtime.ends import end_options
from deltacome.runtime.tenant import Tenant

Messages = tuple[dict[str, str], ...]


def load_language(base: Checkpoint, tenant: Tenant | None) -> tuple[Any, set[int]]:
    """The tokenizer of a tenant, or of the base for None, and the tokens that end its answers.

    A fine-tune without a tokenizer of its own has the base's.

    Raises:
        DeltacomeError: if transformers cannot load them.
    """
    with TemporaryDirectory() as temporary:
        folder = base.folder
        if tenant is not None and tenant.artifact is not None:
            folder = Path(temporary)
            copy_sidecars(tenant.artifact, base, folder)
        tokenizer = load_tokenizer(base.source, folder, base.folder)
        ends = end_tokens(folder / "generation_config.json", folder / "config.json")
    return tokenizer, ends | as_set(tokenizer.eos_token_id)


class Conversation:
    """One user and several tenants of a model from `deltacome.load`, None being the base; each sees its own answers.

    chat_template: as for `Encoder`.
    """

    def __init__(
        self, model: Any, base: Checkpoint, tenants: Sequence[str | None], chat_template: str | None = None
    ) -> None:
        self.model, self.tenants = model, list(tenants)
        deltas = model.deltas
        languages = [load_language(base, None if name is None else deltas[name]) for name in self.tenants]
        self.tokenizers = [tokenizer for tokenizer, _ in languages]
        self.ends = [ends for _, ends in languages]
        self.encoders = [Encoder(tokenizer, chat_template) for tokenizer in self.tokenizers]
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[Messages] = [() for _ in self.tenants]

    @torch.inference_mode()
    def say(self, text: str, new_tokens: int, stream: bool = False) -> list[str]:
        """The greedy answers to the user's next message. stream: print a single tenant's as it comes.

        Raises:
            DeltacomeError: if a conversation has grown longer than the model allows.
        """
        from transformers import TextStreamer

        said = [(*messages, {"role": "user", "content": text}) for messages in self.messages]
        prompts = [encoder.prompt(messages) for encoder, messages in zip(self.encoders, said, strict=True)]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = max(map(len, prompts))
        if longest is not None and length + new_tokens > longest:
            raise DeltacomeError(
                f"the conversation takes {length} tokens and the answer up to {new_tokens}, and the model has room for "
                f"{longest}; begin a new one, or ask for a shorter answer"
            )
        ids, mask = pad(prompts, left=True)
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            tenants=self.tenants,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=min(set().union(*self.ends), default=0),
            streamer=TextStreamer(self.tokenizers[0], skip_prompt=True, skip_special_tokens=True) if stream else None,
            **end_options(self.ends),
        )
        answers = [
            tokenizer.decode(up_to_end(row, ends), skip_special_tokens=True)
            for tokenizer, row, ends in zip(self.tokenizers, output[:, ids.shape[1] :].tolist(), self.ends, strict=True)
        ]
        self.messages = [
            (*messages, {"role": "assistant", "content": answer})
            for messages, answer in zip(said, answers, strict=True)
        ]
        return answers
