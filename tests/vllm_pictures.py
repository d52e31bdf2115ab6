"""Random vision-language models with processors, and deltas of them in a real vLLM, beside transformers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from conftest import Save, fine_tune, make_tokenizer
from deltacome import compress, merge
from vllm_models import LLM, SIZES, LoRARequest, SamplingParams, request, start

TOKENS = {  # those for images, which come after the tokenizer's 258; the first of each stands for a patch
    "llava": ["<image>"],
    "qwen2-vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
}
TOKENS["qwen2.5-vl"] = TOKENS["qwen2-vl"]
PATCH = 258
TEXT = {**SIZES, "vocab_size": 262, "hidden_size": 128, "num_attention_heads": 4}
QWEN = {"image_token_id": PATCH, "video_token_id": 259, "vision_start_token_id": 260, "vision_end_token_id": 261}
QWEN_TEXT = {
    **{name: value for name, value in TEXT.items() if name != "head_dim"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def place(family: str) -> str:
    """Where an image is in a prompt."""
    return "<|vision_start|><|image_pad|><|vision_end|>" if "qwen" in family else "<image>"


def make_processor(family: str, template: str = CHAT) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS[family]})
    template = tokenizer.chat_template = template.replace("PLACE", place(family))
    if family == "llava":
        pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(pictures, tokenizer, chat_template=template, **options)
    if family == "idefics3":
        pictures = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pictures = Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 1024})
    processor = Qwen2VLProcessor if family == "qwen2-vl" else Qwen2_5_VLProcessor
    return processor(pictures, tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=template)


def turned(processor: Any) -> Any:
    """With other numbers for the same tokens, but for those of images."""
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    numbers = dict(zip(words, reversed(words.values()), strict=True))
    content["model"]["vocab"] = {word: numbers[word] for word in sorted(numbers, key=numbers.__getitem__)}
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), chat_template=processor.chat_template
    )
    return processor


def make_vision(family: str) -> PreTrainedModel:
    """A random model whose images matter, with biases and norms that are not all alike."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    model: PreTrainedModel
    if family == "llava":
        tower = CLIPVisionConfig(**size, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8)
        config = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**TEXT), image_token_index=PATCH)
        model = LlavaForConditionalGeneration(config)
    elif family == "idefics3":
        own = {**size, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
        options = {"image_token_id": PATCH, "scale_factor": 2, "pad_token_id": 0}
        text = LlamaConfig(**TEXT)
        model = Idefics3ForConditionalGeneration(Idefics3Config(vision_config=own, text_config=text, **options))
    elif family == "qwen2-vl":
        own = {**VISION, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=own, **QWEN))
    else:
        own = {**VISION, **size, "out_hidden_size": 128, "window_size": 16, "fullatt_block_indexes": [1]}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=own, **QWEN))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            elif name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def language_tower(model: Any) -> Any:
    """The part of a model that reads text."""
    return model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model


def save_as_on_the_hub(folder: Path) -> None:
    """Give CLIP's weights the names that the hub's LLaVAs have for them, and vLLM alone knows."""
    weights = load_file(folder / "model.safetensors")
    old, new = "vision_tower.", "vision_tower.vision_model."
    save_file({name.replace(old, new): value for name, value in weights.items()}, folder / "model.safetensors")


class Question(NamedTuple):
    """Text, and images for where it has places."""

    text: str
    images: tuple[Image.Image, ...] = ()


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((20, 24), Image.Resampling.NEAREST)


class Pictured:
    """A base with deltas in vLLM, and the models of all in transformers. engine: `start`'s options."""

    def __init__(self, save: Save, folder: Path, family: str, **engine: Any) -> None:
        self.save, self.folder, self.family = save, folder, family
        self.processor = make_processor(family)
        self.base = save(make_vision(family), "base")  # in the fine-tunes' dtype: what they leave alone is the same
        self.processor.save_pretrained(self.base)
        if family == "llava":
            save_as_on_the_hub(self.base)
        self.deltas: dict[str, Path] = {}
        self.models = {"base": self.load(self.base)}
        self.engine = {
            "limit_mm_per_prompt": {"image": 2, **({"video": 0} if "qwen" in family else {})},
            "max_model_len": 192,
            **engine,
        }

    def start(self) -> "Pictured":
        """Begin to serve."""
        self.llm: LLM = start(self.base, **self.engine)
        return self

    @staticmethod
    def load(folder: Path) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def add(self, name: str, model: PreTrainedModel, processor: Any = None, **options: Any) -> None:
        """A delta of a fine-tuned model; processor: its own, if not the base's."""
        tuned = self.save(model, name)
        (processor or self.processor).save_pretrained(tuned)
        self.deltas[name] = self.folder / name
        compress(self.base, tuned, self.deltas[name], **{"ratio": 4, **options})
        self.add_merged(name)

    def add_merged(self, name: str) -> None:
        merged = self.folder / f"merged-{name}"
        merge(self.base, self.deltas[name], merged, torch.float32)
        self.models[name] = self.load(merged)

    def add_language(self, name: str, seed: int, **options: Any) -> None:
        """A delta of the language tower and the head."""
        model = make_vision(self.family)
        fine_tune(language_tower(model), seed, size=0.2)
        fine_tune(model.lm_head, seed + 100, size=0.2)
        self.add(name, model, **options)

    def add_part(self, name: str, part: str, seed: int) -> None:
        """A delta of the weights whose names in transformers begin so."""
        model, whole = make_vision(self.family), make_vision(self.family)
        fine_tune(whole, seed, size=0.2)
        changed = dict(whole.named_parameters())
        with torch.no_grad():
            for own, parameter in model.named_parameters():
                if own.startswith(part):
                    parameter.copy_(changed[own])
        self.add(name, model, ratio=2)

    def inputs(self, question: Question) -> Any:
        images = list(question.images) or None
        return self.processor(images=images, text=question.text, return_tensors="pt")

    def question(self, seed: int, images: int = 1) -> Question:
        text = "".join(chr(97 + (seed * 7 + i * i) % 26) for i in range(5 + seed % 4))
        return Question(f"{place(self.family) * images}{text}", tuple(picture(seed + i) for i in range(images)))

    def prompt(self, question: Question) -> dict[str, Any]:
        return {
            "prompt": question.text,
            **({"multi_modal_data": {"image": list(question.images)}} if question.images else {}),
        }

    def requests(self, names: Iterable[str]) -> list[LoRARequest | None]:
        return [request(name, self.deltas[name]) if name in self.deltas else None for name in names]

    def expected(self, name: str, question: Question, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities of a model of transformers behind each token of prompt and answer."""
        inputs = self.inputs(question)
        count = len(tokens)
        more = torch.tensor([tokens[inputs["input_ids"].shape[1] :]], dtype=torch.long)
        assert inputs["input_ids"][0].tolist() == tokens[: inputs["input_ids"].shape[1]]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        inputs["attention_mask"] = torch.ones(1, count, dtype=torch.long)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
        with torch.no_grad():
            return torch.log_softmax(self.models[name](**inputs).logits[0].float(), -1)

    def greedy(self, name: str, question: Question) -> tuple[list[int], list[int]]:
        """The tokens of the prompt, and of a model's answer in transformers."""
        prompt = self.inputs(question)["input_ids"][0].tolist()
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(self.expected(name, question, tokens)[-1, :PATCH].argmax()))
        return prompt, tokens[len(prompt) :]

    def ask(self, names: list[str], questions: list[Question], requests: Any = None, **options: Any) -> list[Any]:
        greedy = {"max_tokens": 6, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        sampling = SamplingParams(**{**greedy, "allowed_token_ids": list(range(PATCH)), **options})  # nothing of images
        prompts = [self.prompt(question) for question in questions]
        return self.llm.generate(prompts, sampling, lora_request=requests or self.requests(names), use_tqdm=False)

    def check(
        self, names: list[str], questions: list[Question], tolerance: float = 2e-3, requests: Any = None
    ) -> list[list[int]]:
        """Greedy answers, and the log-probabilities of their tokens, are each model's own.

        Returns:
            The answers' tokens.
        """
        outputs = self.ask(names, questions, requests)
        for output, name, question in zip(outputs, names, questions, strict=True):
            answer = list(output.outputs[0].token_ids)
            tokens, first = [*output.prompt_token_ids, *answer], len(output.prompt_token_ids)
            expected = self.expected(name, question, tokens)
            assert answer == expected[first - 1 : -1, :PATCH].argmax(-1).tolist()
            for place, step in enumerate(output.outputs[0].logprobs, first - 1):
                assert abs(step[tokens[place + 1]].logprob - float(expected[place, tokens[place + 1]])) < tolerance
        return [list(output.outputs[0].token_ids) for output in outputs]
