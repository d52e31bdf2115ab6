"""Texts and conversations as tokens, and back, as vLLM has it."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from deltacome.serve.http.completions import lease
from deltacome.serve.http.errors import ApiError, unknown_model
from deltacome.serve.http.fields import Strict, Text, Token
from deltacome.serve.http.messages import Message, Tools
from deltacome.serve.http.prompts import encode_chat
from deltacome.serve.http.service import FromService, Key
from deltacome.serve.registry import Loaded

router = APIRouter()


class TokenizeRequest(BaseModel):
    """Of a prompt, or of messages."""

    model_config = Strict
    model: Text
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = Field(
        None, description="Whether the prompt begins an answer; true if left out."
    )
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = Field(None, description="To a prompt; true if left out.")
    return_token_strs: bool | None = None


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(BaseModel):
    model_config = Strict
    model: Text
    tokens: list[Token]


class Detokenized(BaseModel):
    prompt: str


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest, service: FromService, key: Key) -> Tokenized:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "send either a prompt or messages", param="prompt")
    if body.model not in key:
        raise unknown_model(body.model)
    loaded = await lease(service, request, body.model)
    try:
        tokens = await asyncio.to_thread(_encode, body, loaded)
        texts = loaded.language.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return Tokenized(count=len(tokens), max_model_len=service.max_length, tokens=tokens, token_strs=texts)
    finally:
        service.registry.release(loaded)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest, service: FromService, key: Key) -> Detokenized:
    if body.model not in key:
        raise unknown_model(body.model)
    loaded = await lease(service, request, body.model)
    try:
        largest = max(body.tokens, default=0)
        if largest >= loaded.vocabulary:
            raise ApiError(400, f"tokens hold {largest}; this model has {loaded.vocabulary}", param="tokens")
        return Detokenized(prompt=await asyncio.to_thread(loaded.language.tokenizer.decode, body.tokens))
    finally:
        service.registry.release(loaded)


def _encode(body: TokenizeRequest, loaded: Loaded) -> list[int]:
    if body.messages is not None:
        tools = [tool.plain for tool in body.tools or []]
        return encode_chat(loaded, body.messages, tools, body.add_generation_prompt, body.continue_final_message)
    found: list[int] = loaded.language.tokenizer(
        body.prompt, add_special_tokens=body.add_special_tokens is not False
    ).input_ids
    return found
