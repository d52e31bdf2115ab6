"""`evaluate` of a vision-language model on its plain language model, with images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from commands import fail, succeed
from conftest import TEMPLATE, Save, fine_tune, make_model, make_tokenizer
from deltacome import DeltacomeError, compress
from deltacome.benchmark.quality import quality
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.compression.calibration import CalibrationStream, random_tokens
from deltacome.data import Encoded, Encoder, Example, collate, read_examples
from deltacome.evaluate.comparison import evaluate, load_base
from deltacome.evaluate.metrics import answer, divergence
from deltacome.evaluate.parts import evaluate_parts
from test_compression import make_llava

IMAGE = 258  # the token of a patch; a picture has four
# As LLaVA's: contents that are no lists of parts are left out.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(save: Save) -> Path:
    return save(make_model(head_dim=20), "base")


@pytest.fixture(scope="module")
def llava(save: Save) -> Path:
    model = make_llava(make_model(head_dim=20))
    folder = save(model, "llava")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pictures, tokenizer, chat_template=TEMPLATE, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines with and without an image, of several lengths."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    lines: list[dict[str, Any]] = [{"text": "Some plain text."}, {"prompt": "Say 1", "completion": "1"}]
    for i, color in enumerate(((250, 3, 3), (3, 250, 3), (9, 9, 250))):
        Image.new("RGB", (20 + i, 24), color).save(folder / f"images/{i}.png")
        lines.append({"prompt": "Color?" * (i + 1), "completion": "xyz"[i], "image": f"images/{i}.png"})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def delta(base: Path, llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deltas") / "delta"
    compress(base, llava, out, ratio=2)
    return out


def encoder_of(folder: Path, template: str | None = None) -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(folder), template, AutoProcessor.from_pretrained(folder))


def test_the_table(base: Path, llava: Path, delta: Path, data: Path, tmp_path: Path) -> None:
    rows = evaluate(base, llava, {"d": delta}, data, offtask=data, new_tokens=4)
    plain, tuned, ours = rows
    assert tuned["on_task_kl"] == pytest.approx(0, abs=1e-6)
    assert 1e-6 < ours["on_task_kl"] < plain["on_task_kl"] and 1e-6 < ours["off_task_kl"] < plain["off_task_kl"]
    assert all(len(row["outputs"]) == 4 for row in rows)
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(llava)
    asked = "<|im_start|>user\n<image>\nColor?Color?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=Image.open(data.parent / "images/1.png"), text=asked, return_tensors="pt")
    assert (inputs.input_ids == IMAGE).sum() == 4
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=1)
    answered = processor.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert tuned["outputs"][2] == answered
    parts = {(row["part"], row["module"]): row for row in evaluate_parts(base, llava, {"d": delta}, data)}
    assert parts["attention", ""]["on_task_kl"] > 0 and ("vision", "") not in parts  # kept exactly
    assert parts["all", ""]["on_task_kl"] == pytest.approx(ours["on_task_kl"], rel=1e-3)
    command = ("evaluate", base, "--finetuned", llava, "--delta", f"d={delta}", "--data", data, "--limit", 4)
    printed = succeed(*command, "--max-new-tokens", 2, "--show", 2, "-o", tmp_path / "out.json")
    assert "prompt: Color?" in printed


def test_inputs_are_measured(base: Path, llava: Path, tmp_path: Path) -> None:
    """Transformers saves a vision-language model's weights under other names than the model's own."""
    assert "language_model.model.layers.0.mlp.up_proj.weight" in Checkpoint(llava).tensors
    messages: list[str] = []
    compress(base, llava, tmp_path / "delta", ratio=2, warn=messages.append)
    assert messages == []
    checkpoint = Checkpoint(llava)
    stream = CalibrationStream(checkpoint, *random_tokens(checkpoint))
    own = {name: parameter.shape for name, parameter in stream.model.named_parameters()}
    assert len(set(stream.sources.names.values())) == len(own)
    assert all(checkpoint.tensors[stored].shape == own[name] for name, stored in stream.sources.names.items())
    assert stream.sources.names["model.language_model.layers.1.self_attn.q_proj.weight"].startswith(
        "language_model.model."
    )


def test_other_images_are_measured_again(base: Path, llava: Path, data: Path, tmp_path: Path) -> None:
    own = shutil.copytree(data.parent, tmp_path / "data") / data.name
    finetunes = {"digits": {"model": str(llava), "data": str(own), "new_tokens": 2}}
    suite = tmp_path / "suite.json"
    methods = {"bitdelta": {"method": "bitdelta"}}
    suite.write_text(json.dumps({"base": str(base), "finetunes": finetunes, "methods": methods, "ratios": [4]}))
    first = quality(suite, tmp_path / "out")
    assert quality(suite, tmp_path / "out") == first
    Image.new("RGB", (20, 24), (99, 250, 250)).save(own.parent / "images/0.png")
    again = quality(suite, tmp_path / "out")
    assert again[-1]["on_task_kl"] != first[-1]["on_task_kl"]


def test_the_base_has_the_towers_of_the_fine_tuned_model(base: Path, llava: Path) -> None:
    model, tokenizer = load_base(Checkpoint(base), Checkpoint(llava))
    plain = make_model(head_dim=20).bfloat16().state_dict()
    tower = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        counterpart = name.replace("model.language_model.", "model.")
        expected = plain[counterpart].float() if counterpart in plain else tower[name]
        assert torch.equal(tensor, expected), name
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE


def test_another_type_of_language_model_is_measured_as_it_is(base: Path, tmp_path: Path) -> None:
    """Such a delta was made with --map."""
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    model, _ = load_base(Checkpoint(base), Checkpoint(tmp_path / "other"))
    assert model.config.model_type == "llama"


def test_images_matter_and_batches_do_not(llava: Path, data: Path) -> None:
    """Rows without and with images of their own, in one batch and alone."""
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    other = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32).eval()
    fine_tune(other, 3, 0.3)
    encoder = encoder_of(llava)
    encoded = [encoder.example(example) for example in read_examples(data)]
    assert [bool(example.image) for example in encoded] == [False, False, True, True, True]
    together = divergence(model, other, encoded, lambda _: None)
    alone = [divergence(model, other, [example], lambda _: None) for example in encoded]
    counts = torch.tensor([len(example.ids) - example.start for example in encoded])
    for i in range(2):
        mean = (torch.tensor([pair[i].value for pair in alone]) * counts).sum() / counts.sum()
        assert together[i].value == pytest.approx(float(mean), rel=1e-4)
    swapped = Encoded(encoded[2].ids, encoded[2].start, encoded[3].image)
    assert divergence(model, other, [swapped], lambda _: None)[1].value != alone[2][1].value
    prompts = [encoder.question(example) for example in read_examples(data) if example.messages]
    answers = answer(model, encoder.tokenizer, prompts, 6)
    assert answers == [answer(model, encoder.tokenizer, [prompt], 6)[0] for prompt in prompts]


def test_inputs_for_each_token_are_padded_like_the_tokens() -> None:
    kinds = torch.tensor([[0, 1, 1, 0]])
    rows = [
        Encoded([5, 6, 7, 8, 9], image={"mm_token_type_ids": kinds, "pixel_values": torch.ones(4, 2)}),
        Encoded([5, 6]),
        Encoded([6, 7, 8, 9], image={"mm_token_type_ids": kinds, "pixel_values": torch.zeros(2, 2)}),
    ]
    right, left = collate(rows, left=False), collate(rows, left=True)
    assert right["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0], [0] * 5, [0, 1, 1, 0, 0]]
    assert left["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0], [0] * 5, [0, 0, 1, 1, 0]]
    assert right["pixel_values"].tolist() == [[1, 1]] * 4 + [[0, 0]] * 2
    assert collate(rows[1:2], left=False).keys() == {"input_ids", "attention_mask"}


def test_where_the_image_goes(llava: Path, data: Path, tmp_path: Path) -> None:
    image = data.parent / "images/0.png"
    (tmp_path / "parts.jinja").write_text(PARTS)
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}

    def text(template: str | None, *messages: dict[str, str], image: Path | None = image) -> str:
        encoder = encoder_of(llava, template)
        ids = encoder.question(Example(messages, "", image=image)).ids
        return str(encoder.tokenizer.decode(ids)).replace("<image>" * 4, "*")

    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert text(None, system, user) == f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n*\nQ{end}"
    assert text(None, {"role": "user", "content": "A <image> B"}) == f"<|im_start|>user\nA * B{end}"
    assert text("none", user) == "*\nQ"
    parts = str(tmp_path / "parts.jinja")
    assert text(parts, system, user) == f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n*Q{end}"
    assert text(parts, user, image=None) == f"<|im_start|>user\nQ{end}"


def test_errors(base: Path, llava: Path, delta: Path, data: Path, save: Save, tmp_path: Path) -> None:
    line = {"prompt": "Q", "completion": "A", "image": "x.png"}
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(line) + "\n")
    command = ("evaluate", base, "--finetuned", llava, "--delta", f"d={delta}", "--data", file)
    fail("x.jsonl, line 1: there is no image", *command, "-o", tmp_path / "out.json")
    (tmp_path / "x.png").write_text("no image")
    fail("x.png is no image that can be read: ", *command, "-o", tmp_path / "out.json")
    twice = Example(({"role": "user", "content": "<image><image>"},), "", image=data.parent / "images/0.png")
    with pytest.raises(DeltacomeError, match=r"the processor refuses .*0\.png with its prompt: "):
        encoder_of(llava).question(twice)
    with pytest.raises(DeltacomeError, match=r"an example has an image \(.*0\.png\), which nothing here can see"):
        compress(base, llava, tmp_path / "out", ratio=2, method="delta-come", calibration=data)
    other = tmp_path / "other"
    shutil.copytree(llava, other)
    (other / "processor_config.json").unlink()
    with pytest.raises(DeltacomeError, match=r"cannot load the processor of .*other: .*preprocessor_config\.json"):
        evaluate(base, other, {"d": delta}, data)
    plain = make_model(head_dim=20)
    fine_tune(plain)
    with pytest.raises(DeltacomeError, match="takes no images; leave them out of the data"):
        evaluate(base, save(plain), {}, data)
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out").exists()
