"""Attention of one token a row, several query heads sharing keys, without repeating the keys in memory."""

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_shared_keys"


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """As transformers' attention functions: query (rows, heads, tokens, size) to (rows, tokens, heads, size).

    Transformers repeats keys and values for all heads at every step where there is a mask, which takes four times as
    long as the attention. The heads that share a key are as well so many queries of one head.
    """
    rows, heads, tokens, size = query.shape
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    odd = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if tokens > 1 or heads == key.shape[1] or not shared_mask or odd:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    output = scaled_dot_product_attention(grouped, key, value, attention_mask, scale=options.get("scaling"))
    return output.reshape(rows, 1, heads, value.shape[-1]), None


def share_keys(model: Any) -> None:
    """Let a model that uses transformers' `sdpa` use this instead."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
