"""Attention of several query heads that share keys, without repeating the keys in memory."""

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

    Transformers repeats keys and values for all heads where there is a mask, which takes four times as long as the
    attention of a token. The heads that share a key are as well so many queries of one head.
    """
    rows, heads, tokens, size = query.shape
    is_shared = heads > key.shape[1] and (attention_mask.shape[1] == 1 if attention_mask is not None else tokens == 1)
    odd = any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if odd or not is_shared:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sharing = heads // key.shape[1]
    grouped = query.reshape(rows, key.shape[1], sharing * tokens, size)
    mask = attention_mask
    if mask is not None and tokens > 1:
        mask = mask.expand(rows, 1, tokens, -1).repeat(1, 1, sharing, 1)
    output = scaled_dot_product_attention(grouped, key, value, mask, scale=options.get("scaling"))
    return output.reshape(rows, heads, tokens, value.shape[-1]).transpose(1, 2).contiguous(), None


def share_keys(model: Any) -> None:
    """Let a model that uses transformers' `sdpa` use this instead."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
