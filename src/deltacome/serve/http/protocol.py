"""What OpenAI's API takes and gives, as far as this server has it."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_CHOICES = 16
MOST_LOGPROBS = 20


def _is_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Strict = ConfigDict(extra="forbid", allow_inf_nan=False)
Zero = Annotated[float, Field(ge=0, le=0, description="Not supported: leave it out, or 0.")]


class StreamOptions(BaseModel):
    model_config = Strict
    include_usage: bool = False


class GenerationRequest(BaseModel, ABC):
    """What completions and chat completions have in common."""

    model_config = Strict
    model: Text = Field(description="A delta's name, or the base's.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[Text, Field(min_length=1)]
        | Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    ignore_eos: bool = Field(False, description="Not OpenAI's but vLLM's, for benchmarks: go on behind an end token.")
    user: Text | None = Field(None, description="Taken and not used.")
    metadata: dict[str, Any] | None = Field(None, description="Taken and not used.")
    store: bool | None = Field(None, description="Taken and not used.")

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
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens or 16

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    model_config = Strict
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = Strict
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template wants it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="As many as there is room for if left out."
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The new name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

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
    load_inplace: bool = Field(False, description="Replace one of that name.")


class UnloadRequest(BaseModel):
    model_config = Strict
    lora_name: Text


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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
    bytes: list[int]


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
