"""All that the plugin touches of vLLM's front end, so that a request is read and answered in its own model's language.

vLLM has one tokenizer, in its renderer, and one generation config. Here it has those of the running request.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from copy import copy
from typing import Any

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.scale_out.derender.serving import ServingDerender
from vllm.entrypoints.scale_out.render.serving import ServingRender
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMValidationError
from vllm.renderers.base import BaseRenderer, _SwappableExecutor
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestState

from deltacome.errors import DeltacomeError
from deltacome.vllm.languages import Language, Languages, Speech, with_vocabulary

_running: ContextVar[Speech | None] = ContextVar("speech", default=None)  # of the request that this task is about
_languages: Languages | None = None  # of this process's engine


def install() -> None:
    """Put all of it in place."""
    BaseRenderer.tokenizer = _own("tokenizer", lambda speech: speech.tokenizer)
    for server in (OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses, ServingRender, ServingTokens):
        server.default_sampling_params = _own("default_sampling_params", lambda speech: speech.sampling)
    for server, method in (
        (OpenAIServingChat, "create_chat_completion"),
        (OpenAIServingChatBatch, "create_batch_chat_completion"),
        (AnthropicServingMessages, "count_tokens"),
        (OpenAIServingCompletion, "create_completion"),
        (OpenAIServingResponses, "create_responses"),
        (ServingTokenization, "create_tokenize"),
        (ServingTokenization, "create_detokenize"),
        (ServingRender, "render_chat_request"),
        (ServingRender, "render_completion_request"),
        (ServingRender, "render_responses_request"),
        (ServingDerender, "derender_chat_response"),
        (ServingDerender, "derender_chat_stream_response"),
        (ServingDerender, "derender_completion_response"),
        (ServingDerender, "derender_completion_stream_response"),
        (ServingTokens, "serve_tokens"),
    ):
        _read_requests(server, method)
    _keep_context()
    _check_inputs()
    _write_outputs()
    _read_offline()


def language_of(config: Any, adapter: Any) -> Language:
    """The language of a `LoRARequest`, or of the base for None.

    Args:
        config: vLLM's `ModelConfig`.

    Raises:
        VLLMValidationError: if the delta is broken, or its files cannot be read.
    """
    global _languages
    if _languages is None or _languages.config is not config:
        _languages = Languages(config)
    try:
        return _languages.of(adapter)
    except DeltacomeError as error:
        raise VLLMValidationError(str(error)) from error


@contextmanager
def _speaking(speech: Speech | None) -> Iterator[None]:
    token = _running.set(speech)
    try:
        yield
    finally:
        _running.reset(token)


def _own(name: str, of: Callable[[Speech], Any]) -> property:
    """An attribute that is the running request's own, where its model has one."""

    def get(self: Any) -> Any:
        speech = _running.get()
        return vars(self)[name] if speech is None else of(speech)

    return property(get, lambda self, value: vars(self).update({name: value}))


def _read_requests(server: type, method: str) -> None:
    """A request to the server names its model; everything until its answer begins is done in the model's language."""
    original = getattr(server, method)

    async def create(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        name, adapters = request.model, self.models.lora_requests
        if name and name not in adapters and not self._is_model_supported(name):
            await self._check_model(request)  # which looks for it
        language = await asyncio.to_thread(language_of, self.model_config, adapters.get(name))
        with _speaking(language.speech):
            return await original(self, request, *arguments, **options)

    setattr(server, method, create)


def _keep_context() -> None:
    """What the renderer gives to its threads is of the same request."""
    original = _SwappableExecutor.submit
    _SwappableExecutor.submit = lambda self, *call, **options: original(self, copy_context().run, *call, **options)


def _check_inputs() -> None:
    """The last step before the engine: end tokens, bad words and what is allowed are the model's own."""
    original = InputProcessor.process_inputs

    def process_inputs(self: Any, *arguments: Any, lora_request: Any = None, **options: Any) -> Any:
        room, own = self.model_config.get_vocab_size(), copy(self)
        language = language_of(self.model_config, lora_request)
        speech, size = language.speech, language.vocabulary
        own.model_config, own.sight = with_vocabulary(self.model_config, size), language.sight
        if speech is not None:
            own.generation_config_fields = speech.generation
        with _speaking(speech):
            request = original(own, *arguments, lora_request=lora_request, **options)
        params = request.sampling_params
        try:
            # vLLM lets pass what either tokenizer or model has, since a placeholder for an image may be in one of them.
            wrong = next((token for token in request.prompt_token_ids or () if size <= token < room), None)
            if wrong is not None:
                raise VLLMValidationError(f"Token id {wrong} is out of vocabulary", parameter="prompt")
            if speech is not None:
                with _speaking(None):
                    _check_words_of_images(request, speech, self.tokenizer, lora_request.lora_name)
                    if params is not None and params.structured_outputs is not None:
                        _end_forms(params, speech, self.tokenizer, lora_request.lora_name)
        except VLLMValidationError:
            _forget_images(self.renderer, request)
            raise
        return request

    InputProcessor.process_inputs = process_inputs
    identify = InputProcessor._get_mm_identifier  # by which vLLM finds an image again that has been encoded

    def _get_mm_identifier(self: Any, mm_hash: str, lora_request: Any) -> str:
        return str(identify(self, mm_hash, lora_request)) + str(getattr(self, "sight", ""))

    InputProcessor._get_mm_identifier = _get_mm_identifier


def _forget_images(renderer: Any, request: Any) -> None:
    """Have images sent to the engine when they are next asked for: vLLM believes that it has them from this request."""
    if renderer.mm_processor_cache is not None:
        for feature in request.mm_features or ():
            renderer.mm_processor_cache.invalidate(feature.mm_hash)


def _check_words_of_images(request: Any, speech: Speech, tokenizer: Any, name: str) -> None:
    """Processors of images are the base's; some write text around an image, such as where it is in a larger one."""
    for feature in request.mm_features or ():
        place = feature.mm_position
        if place.is_embed is None or tokenizer is None:
            continue
        tokens = request.prompt_token_ids[place.offset : place.offset + place.length]
        words = [token for token, is_embed in zip(tokens, place.is_embed.tolist(), strict=True) if not is_embed]
        if tokenizer.convert_ids_to_tokens(words) != speech.tokenizer.convert_ids_to_tokens(words):
            raise VLLMValidationError(
                f"the base's processor writes text around an image in its own tokens, and {name} has others; leave "
                "images out for this model, or merge its delta"
            )


def _end_forms(params: Any, speech: Speech, tokenizer: Any, name: str) -> None:
    """The engine makes forms of the base's tokenizer; so they end by its end token."""
    if not speech.extends(tokenizer):
        raise VLLMValidationError(
            f"structured outputs are made of the base's tokens, and {name} has others; leave them out for this model"
        )
    if tokenizer.eos_token_id is not None:
        params.stop_token_ids = sorted({*(params.stop_token_ids or ()), tokenizer.eos_token_id})
        params._all_stop_token_ids.add(tokenizer.eos_token_id)


def _write_outputs() -> None:
    """Answers, and the tokens of log-probabilities, become text by the model's own tokenizer."""
    original = RequestState.from_new_request

    def from_new_request(cls: type, /, *, tokenizer: Any, request: Any, **options: Any) -> Any:
        speech = None if _languages is None else _languages.of(request.lora_request).speech
        if speech is not None and tokenizer is not None:
            tokenizer = speech.tokenizer
        return original.__func__(cls, tokenizer=tokenizer, request=request, **options)

    RequestState.from_new_request = classmethod(from_new_request)


def _read_offline() -> None:
    """`LLM.generate` and `LLM.chat` render each prompt just before it is added."""
    original = OfflineInferenceMixin._render_and_add_requests

    def render(self: Any, prompts: Any, lora_requests: Sequence[Any]) -> Iterator[Any]:
        rendered = iter(prompts)
        for adapter in lora_requests:
            with _speaking(language_of(self.model_config, adapter).speech):
                prompt = next(rendered)
            yield prompt
        yield from rendered  # nothing any more; it ends its progress bar

    def _render_and_add_requests(self: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        adapters = options.get("lora_requests")
        if adapters is not None:
            prompts = render(self, prompts, adapters)
        return original(self, prompts, *arguments, **options)

    OfflineInferenceMixin._render_and_add_requests = _render_and_add_requests
