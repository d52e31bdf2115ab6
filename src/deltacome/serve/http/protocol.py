"""What OpenAI's API takes and gives, as far as this server has it."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_CHOICES = 16
MOST_LOGPROBS = 20
MOST_STOP = 256  # characters of a stop string


def _is_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Strict = ConfigDict(extra="forbid", allow_inf_nan=False)
Stop = Annotated[Text, Field(min_length=1, max_length=MOST_STOP)]

# Fields of OpenAI's that change nothing here, and those of which only the values that change nothing are taken.
UNUSED = "Taken and not used."
NEUTRAL = "Not supported: leave it out, or send what changes nothing."
Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[list[Any], Field(max_length=0)]
UnusedText = Annotated[Text | None, Field(description=UNUSED)]


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
    frequency_penalty: Zero | None = Field(None, description=NEUTRAL)
    presence_penalty: Zero | None = Field(None, description=NEUTRAL)
    logit_bias: dict[str, Zero] | None = Field(None, description=NEUTRAL)
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
    echo: Literal[False] | None = Field(None, description=NEUTRAL)
    suffix: Literal[""] | None = Field(None, description=NEUTRAL)

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens or 16

    @property
    def likeliest(self) -> int | None:
        return None if self.logprobs is False else self.logprobs


class TextPart(BaseModel):
    model_config = Strict
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = Strict
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: Text | None = None
    refusal: None = Field(None, description=NEUTRAL)
    audio: None = Field(None, description=NEUTRAL)
    annotations: Empty | None = Field(None, description=NEUTRAL)
    function_call: None = Field(None, description=NEUTRAL)
    tool_calls: Empty | None = Field(None, description=NEUTRAL)

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template wants it."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ResponseFormat(BaseModel):
    model_config = Strict
    type: Literal["text"]


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
    response_format: ResponseFormat | None = Field(None, description=NEUTRAL)
    tool_choice: Literal["none", "auto"] | None = Field(None, description=NEUTRAL)
    tools: Empty | None = Field(None, description=NEUTRAL)
    verbosity: Literal["medium"] | None = Field(None, description=NEUTRAL)
    web_search_options: None = Field(None, description=NEUTRAL)
    metadata: dict[str, Any] | None = Field(None, description=UNUSED)
    parallel_tool_calls: bool | None = Field(None, description=UNUSED)
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
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


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


class Answer(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


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
    delta: Answer
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
