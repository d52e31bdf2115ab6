"""The zoo's vision-language member: questions on scikit-learn's handwritten digits, of 8 by 8 pixels."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from deltacome.benchmark.zoo.tasks import TEST_EXAMPLES, Row, Split
from deltacome.benchmark.zoo.training import adamw, descend, likelihood
from deltacome.data import Encoder, read_examples

SCALE, PATCH = 4, 8  # an image has 32 by 32 pixels in 16 patches
TOWER_STEPS, TEMPERATURE = 300, 0.05
IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{IMAGE}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = {
    "Which digit is this?": lambda digit: str(digit),
    "Write this digit as a word.": lambda digit: NAMES[digit],
    "Is this digit even or odd?": lambda digit: "odd" if digit % 2 else "even",
}


def digits(count: int) -> Split:
    """Questions on images, each image once."""
    from sklearn.datasets import load_digits

    source = random.Random(1)
    labels = load_digits().target.tolist()
    rows = []
    for i in source.sample(range(len(labels)), count + TEST_EXAMPLES):
        question, reply = source.choice(list(QUESTIONS.items()))
        rows.append({"prompt": question, "image": f"images/{i:04}.png", "completion": reply(labels[i])})
    return rows[TEST_EXAMPLES:], rows[:TEST_EXAMPLES]


def write_images(rows: list[Row], folder: Path) -> None:
    """The rows' images as PNG files in color, at their paths in the folder."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images = load_digits().images
    (folder / "images").mkdir()
    for row in rows:
        ink = images[int(Path(row["image"]).stem)].repeat(SCALE, 0).repeat(SCALE, 1)
        Image.fromarray((255 - ink * 255 / 16).astype("uint8")).convert("RGB").save(folder / row["image"])


def make_processor(tokenizer: Any) -> Any:
    """The tokenizer, with a token for a patch of an image, and what makes tensors of images."""
    from transformers import LlavaProcessor, SiglipImageProcessorPil

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = CHAT_TEMPLATE
    pixels = 8 * SCALE
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": pixels, "width": pixels}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def see(model: Any, processor: Any, data: Path, *, learning_rate: float, epochs: int) -> Any:
    """A Llava of a language model and a small tower: the tower is trained with the projector first, then all of it.

    The parts around the language model learn ten times as fast.
    """
    encoder = Encoder(processor.tokenizer, processor=processor)
    encoded = [encoder.example(example) for example in read_examples(data)]
    llava = make_llava(model, processor).train()
    train_tower(llava, processor.tokenizer, {int(path.stem) for path in (data.parent / "images").iterdir()})
    text = {id(parameter) for parameter in llava.model.language_model.parameters()}
    groups: list[list[Tensor]] = [[], []]
    for parameter in llava.parameters():
        groups[id(parameter) in text].append(parameter)
    rates = (10 * learning_rate, learning_rate)
    optimizer = adamw([{"params": own, "lr": rate} for own, rate in zip(groups, rates, strict=True)])
    descend(llava, encoded, [optimizer], likelihood, epochs=epochs)
    return llava


def make_llava(model: Any, processor: Any) -> Any:
    """A language model, its vocabulary grown, behind a random tower."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    tower = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8 * SCALE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    tied = bool(model.config.tie_word_embeddings)
    config = LlavaConfig(
        vision_config=tower,
        text_config=model.config,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.language_model.load_state_dict(model.model.state_dict())
    if not tied:
        llava.lm_head.load_state_dict(model.lm_head.state_dict())
    llava.generation_config = model.generation_config
    return llava


def train_tower(llava: Any, tokenizer: Any, left_out: set[int]) -> None:
    """Train tower and projector to make a digit's image like the embedding of its token, but for some images."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    kept = [i for i in range(len(labels)) if i not in left_out]
    pixels = 1 - torch.tensor(images[kept], dtype=torch.float32).view(-1, 1, 8, 8) / 8  # as the processor has them
    pixels = pixels.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3).expand(-1, 3, -1, -1)
    targets = torch.tensor(labels[kept])
    tokens = [tokenizer(str(digit), add_special_tokens=False).input_ids[0] for digit in range(10)]
    embeddings = normalize(llava.get_input_embeddings().weight[tokens].detach(), dim=1)
    tower, projector = llava.model.vision_tower, llava.model.multi_modal_projector
    optimizer = torch.optim.AdamW([*tower.parameters(), *projector.parameters()], lr=1e-3)
    for _ in range(TOWER_STEPS):
        chosen = torch.randint(len(kept), (64,))
        hidden = tower(pixel_values=pixels[chosen], output_hidden_states=True).hidden_states[-1]
        likeness = normalize(projector(hidden).mean(1), dim=1) @ embeddings.T
        cross_entropy(likeness / TEMPERATURE, targets[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
