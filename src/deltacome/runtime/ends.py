"""The end of generated answers, where each row of the batch has end tokens of its own."""

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class EndTokens(StoppingCriteria):  # type: ignore[misc]
    """Stops each row of transformers' `generate` at that row's own end tokens.

    ends: of each row; with beams, the rows of a batch repeat.
    """

    def __init__(self, ends: Sequence[Set[int]]) -> None:
        most = max(map(len, ends))
        self.ends = torch.tensor([[*row, *[-1] * (most - len(row))] for row in ends], dtype=torch.long)
        self.eos_token_id = self.ends.unique()  # by its name `generate` knows that rows that have ended are padded

    def __call__(self, input_ids: Tensor, scores: Any, new_token_length: int = 1, **_: Any) -> Tensor:
        """Whether a row of `input_ids` (rows, tokens) has ended: (rows,)."""
        ends = self.ends.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.ends), 0)
        return (input_ids[:, -new_token_length:, None] == ends[:, None]).flatten(1).any(1)


def end_options(ends: Sequence[Set[int]], criteria: Sequence[Any] = ()) -> dict[str, Any]:
    """The options of `generate` by which each row ends at its own tokens.

    ends: of each row. criteria: others that are to hold too.
    """
    options: dict[str, Any] = {"eos_token_id": sorted(ends[0]) or None, "stopping_criteria": [*criteria]}
    if any(row != ends[0] for row in ends):
        options = {"eos_token_id": None, "stopping_criteria": [*criteria, EndTokens(ends)]}
    return options
