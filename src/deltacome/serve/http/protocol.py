"""What OpenAI's API takes and gives, as far as this server has it."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from deltacome.serve.http.fields import NEUTRAL, UNUSED, Empty, Strict, Text, Token, UnusedText
from deltacome.serve.http.formats import ResponseFormat
from deltacome.serve.http.messages import Message, ToolChoice, Tools

MOST_CHOICES = 16
MOST_LOGPROBS = 20
MOST_STOP = 256  # characters of a stop string
MOST_BIASED = 1024  # tokens of a logit_bias
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


Stop = Annotated[Text, Field(min_length=1, max_length=MOST_STOP)]


class StreamOptions(BaseModel):
    model_config = Strict
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description=UNUSED)


class GenerationRequest(BaseModel, ABC):
    """What completions and chat completions have in common."""

    model_config = Strict
    model: Text = Field(description="A delta's name, or the base's.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="vLLM's, for benchmarks: go on behind an end token.")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MOST_BIASED)] | None = None
    user: UnusedText = None

    @property
    @abstractmethod
    def answer_tokens(self) -> int | None:
        """The most that an answer may take, None for as many as there is room for."""

    @property
    @abstractmethod
    def likeliest(self) -> int | None:
        """How many tokens to tell with their log-probabilities at each place; None for no log-probabilities."""

    @property
    def biases(self) -> dict[int, float]:
        """What is added to tokens' logits."""
        return {int(token): value for token, value in (self.logit_bias or {}).items() if value}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(GenerationRequest):
    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="16 if left out.")
    logprobs: Literal[False] | Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: Literal[1] | None = Field(None, description=NEUTRAL)
    echo: bool | None = Field(None, description="Give the prompt before each answer; with logprobs, its tokens' too.")
    suffix: Literal[""] | None = Field(None, description=NEUTRAL)

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens or 16

    @property
    def likeliest(self) -> int | None:
        return None if self.logprobs is False else self.logprobs


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="As many as there is room for if left out."
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The new name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    audio: None = Field(None, description=NEUTRAL)
    function_call: Literal["none", "auto"] | None = Field(None, description=NEUTRAL)
    functions: Empty | None = Field(None, description=NEUTRAL)
    modalities: list[Literal["text"]] | None = Field(None, description=NEUTRAL)
    moderation: None = Field(None, description=NEUTRAL)
    prediction: None = Field(None, description=NEUTRAL)
    reasoning_effort: Literal["none"] | None = Field(None, description=NEUTRAL)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(None, description="auto if left out.")
    parallel_tool_calls: bool | None = Field(None, description="Whether an answer may have several calls.")
    add_generation_prompt: bool | None = Field(None, description="vLLM's: whether the prompt begins an answer.")
    continue_final_message: bool | None = Field(
        None, description="vLLM's: the answer goes on with the assistant's last message."
    )
    verbosity: Literal["medium"] | None = Field(None, description=NEUTRAL)
    web_search_options: None = Field(None, description=NEUTRAL)
    metadata: dict[str, Any] | None = Field(None, description=UNUSED)
    prompt_cache_key: UnusedText = None
    prompt_cache_options: dict[str, Any] | None = Field(None, description=UNUSED)
    prompt_cache_retention: UnusedText = None
    safety_identifier: UnusedText = None
    service_tier: UnusedText = None
    store: bool | None = Field(None, description=UNUSED)

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class LoadRequest(BaseModel):
    """As vLLM's. `lora_path` is a folder inside the server's --delta-dir."""

    model_config = Strict
    lora_name: Text
    lora_path: Text
    load_inplace: bool | None = Field(None, description="Replace one of that name.")


class UnloadRequest(BaseModel):
    model_config = Strict
    lora_name: Text


class PromptTokens(BaseModel):
    """cached_tokens: those that an earlier request of the same model had in common with this one."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def followed_by(self, other: "CompletionLogprobs") -> "CompletionLogprobs":
        """Those of tokens, and of others behind them."""
        ours, theirs = self.model_dump(), other.model_dump()
        return CompletionLogprobs(**{name: values + theirs[name] for name, values in ours.items()})


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Logprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Logprob):
    top_logprobs: list[Logprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class FunctionOfCall(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionOfCall


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[Call] | None = None


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    """id, type and the function's name come with the first part of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """parent: the base's name, None for the base. bytes: of a delta's artifact. full_bytes: of the model's weights if
    it were not a delta. loaded: whether it is in memory now.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["deltacome"] = "deltacome"
    parent: str | None
    max_model_len: int | None
    bytes: int
    full_bytes: int
    loaded: bool


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


class Health(BaseModel):
    status: Literal["ok"] = "ok"
