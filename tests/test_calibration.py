import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import Save, fine_tune, make_any, make_model, make_other, make_tokenizer
from deltacome import Artifact, DeltacomeError, compress, merge
from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.compression import calibration as module
from deltacome.compression.calibration import CalibrationStream, batch, random_tokens
from deltacome.compression.sensitivity import measure_sensitivities
from deltacome.data import Encoder, Example, read_examples


def plain_moments(folder: Path, rows: list[list[int]]) -> dict[str, Tensor]:
    """Second moments by hooks on the whole model, one unpadded example at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums: dict[str, Tensor] = {}
    count = sum(map(len, rows))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def add(_: nn.Module, arguments: tuple[Tensor], name: str = name) -> None:
                x = arguments[0][0].double()
                sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + x.T @ x / count

            layer.register_forward_pre_hook(add)
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    return sums


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [1, 100, 10**6])
def test_streamed_moments_are_those_of_the_whole_model(
    tied: bool, tokens: int, save: Save, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", tokens)
    checkpoint = Checkpoint(save(make_model(tie_word_embeddings=tied)))
    encoder = Encoder(make_tokenizer())
    data = read_examples(examples)
    found: dict[str, Tensor] = {}
    stream = CalibrationStream(checkpoint, *batch(data, encoder))
    stream.run(lambda _: True, checkpoint.read_float, checkpoint.read_float, found.update)
    expected = plain_moments(checkpoint.folder, [encoder.example(example).ids for example in data])
    if tied:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment.float(), rtol=1e-4, atol=1e-4 * float(moment.abs().max()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_streamed_inputs_are_those_of_the_whole_model(family: str, save: Save) -> None:
    """Of random tokens, biases left out, an untied head not measured."""
    checkpoint = Checkpoint(save(make_other(family)))
    ids, mask = random_tokens(checkpoint)
    total: list[float] = []
    found = CalibrationStream(checkpoint, ids, mask).inputs(lambda _: True, checkpoint.read_float, total.append)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    expected: dict[str, Tensor] = {}
    for name, layer in model.base_model.named_modules(prefix=model.base_model_prefix):
        if isinstance(layer, nn.Linear):

            def measure(layer: nn.Linear, arguments: tuple[Tensor], output: Tensor, name: str = name) -> None:
                x = arguments[0].double()
                expected[f"{name}.weight"] = torch.stack((x.square().mean((0, 1)), x.mean((0, 1)))).float()

            layer.register_forward_hook(measure)
    with torch.inference_mode():
        model(input_ids=ids)
    assert found.keys() == expected.keys()
    for name, inputs in expected.items():
        torch.testing.assert_close(found[name], inputs, rtol=1e-3, atol=1e-4 * float(inputs.max()))
    assert sum(total) == sum(checkpoint.tensors[name].elements for name in found)


def test_without_data_inputs_are_measured_and_with_data_too(
    base: Path, finetuned: Path, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    for name, options in {"free": {}, "plain": {"input_weight": 0.0}, "data": {"calibration": examples}}.items():
        compress(base, finetuned, tmp_path / name, ratio=8, warn=messages.append, **options)
    monkeypatch.setattr("deltacome.compression.measuring.random_tokens", lambda _: 1 / 0)
    compress(base, finetuned, tmp_path / "blind", ratio=8, warn=messages.append)
    assert len(messages) == 1 and "so linears count alike: division by zero" in messages[0]
    codes = {path.name: (path / "delta.safetensors").read_bytes() for path in tmp_path.iterdir()}
    assert len(set(codes.values())) == 3 and codes["plain"] == codes["blind"]
    with pytest.raises(DeltacomeError, match="low-rank makes no use of data"):
        compress(base, finetuned, tmp_path / "no", method="low-rank", calibration=examples)


def test_inputs_come_through_compressed_layers(save: Save, examples: Path) -> None:
    """With other weights behind `read_compressed`, the second layer's moments are those of a model mixed of both."""
    first, second = make_model(0), make_model(1)
    checkpoint, other = Checkpoint(save(first)), Checkpoint(save(second))
    second.model.layers[1] = first.model.layers[1]
    encoder, data = Encoder(make_tokenizer()), read_examples(examples)
    found: dict[str, Tensor] = {}
    CalibrationStream(checkpoint, *batch(data, encoder)).run(
        lambda _: True, checkpoint.read_float, other.read_float, found.update
    )
    expected = plain_moments(save(second), [encoder.example(example).ids for example in data])
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], expected[name].float(), rtol=1e-3, atol=1e-4 * float(expected[name].max()))


def test_layers_that_are_done_are_only_passed(save: Save, examples: Path) -> None:
    checkpoint = Checkpoint(save(make_model()))
    found: dict[str, Tensor] = {}
    stream = CalibrationStream(checkpoint, *batch(read_examples(examples), Encoder(make_tokenizer())))
    read: list[str] = []

    def reading(name: str) -> Tensor:
        read.append(name)
        return checkpoint.read_float(name)

    stream.run(lambda name: "layers.1" in name, reading, checkpoint.read_float, found.update)
    assert read and all("layers.1" in name for name in read)
    assert not any("layers.0" in name for name in found)


@pytest.mark.parametrize("scale", ["unbiased", "minmax"])
def test_calibration_lowers_the_output_error(scale: str, save: Save, tmp_path: Path) -> None:
    """On the outputs of the first layer's linears, over the calibration data's own kind of text."""
    model = make_model(intermediate_size=200, hidden_size=120)
    base = save(model)
    fine_tune(model)
    finetuned = save(model)
    data = tmp_path / "data.jsonl"
    texts = ["".join(chr(97 + (i * i + j * 7 + i * j) % 26) for j in range(90)) for i in range(60)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [make_tokenizer()(text).input_ids for text in texts]
    moments = plain_moments(finetuned, rows)
    errors = {}
    for name, options in {"nearest": {}, "gptq": {"calibration": data}}.items():
        compress(base, finetuned, tmp_path / name, precision="4:2,2:18", scale=scale, **options)
        merge(base, tmp_path / name, tmp_path / f"{name}-merged", torch.float32)
        ours, theirs = Checkpoint(tmp_path / f"{name}-merged"), Checkpoint(finetuned)
        errors[name] = [
            float(torch.trace(d @ moment.float() @ d.T))
            for weight, moment in moments.items()
            if "layers.0" in weight
            for d in [ours.read(weight) - theirs.read_float(weight)]
        ]
    better = sum(g < n for g, n in zip(errors["gptq"], errors["nearest"], strict=True))
    assert better >= 6 and sum(errors["gptq"]) < 0.8 * sum(errors["nearest"])
    assert Artifact(tmp_path / "gptq").method["calibration_examples"] == 60


def test_bitdelta_refit(base: Path, finetuned: Path, examples: Path, tmp_path: Path) -> None:
    scales = []
    for scale, calibration in (("mean", None), ("refit", examples)):
        compress(base, finetuned, tmp_path / scale, method="bitdelta", scale=scale, calibration=calibration)
        artifact = Artifact(tmp_path / scale)
        scales.append([float(artifact.terms(n)[0].scale) for n, e in artifact.entries.items() if e.sign])  # type: ignore
    assert len(scales[0]) == 15 and sum(a != b for a, b in zip(*scales, strict=True)) == 14  # all but the embedding


def test_weights_that_have_no_place_in_the_model_are_said(save: Save, examples: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(make_model())
    tensors = load_file(folder / "model.safetensors")
    save_file({f"odd.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    stream = CalibrationStream(Checkpoint(folder), *batch(read_examples(examples), Encoder(make_tokenizer())))
    assert stream.sources.names["model.layers.1.mlp.up_proj.weight"] == "odd.model.layers.1.mlp.up_proj.weight"
    tensors["model.layers.1.mlp.other.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DeltacomeError, match="compress it without --calibration"):
        CalibrationStream(Checkpoint(folder), *batch(read_examples(examples), Encoder(make_tokenizer())))


def test_an_unknown_architecture_is_said(save: Save, examples: Path) -> None:
    folder = save(make_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nothing-known"}))
    with pytest.raises(DeltacomeError, match="transformers cannot build"):
        CalibrationStream(Checkpoint(folder), *batch(read_examples(examples), Encoder(make_tokenizer())))


def test_reading_examples(examples: Path, tmp_path: Path) -> None:
    prompt, messages, text = read_examples(examples)[:3]
    assert prompt == Example(({"role": "user", "content": "What is 2 + 3?"},), "2 + 3 = 5\n#### 5", "5")
    assert messages.completion == "Hi there" and len(messages.messages) == 1
    assert text.messages == () and len(read_examples(examples, 2)) == 2


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x"}', "[]", "{", '{"text": ""}', '{"messages": []}', '{"prompt": 1, "completion": "x"}', "null",
     '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
     '{"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]}'],
)  # fmt: skip
def test_bad_lines_are_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DeltacomeError, match=r"data\.jsonl, line 3: "):
        read_examples(path)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with pytest.raises(DeltacomeError, match="there is no file"):
        read_examples(path)
    path.write_text("\n\n")
    with pytest.raises(DeltacomeError, match="holds no examples"):
        read_examples(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DeltacomeError, match="not UTF-8"):
        read_examples(path)


def test_templates(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    example = Example(({"role": "user", "content": "hi"},), "yo")

    def text(encoder: Encoder) -> tuple[str, str]:
        encoded = encoder.example(example)
        return tokenizer.decode(encoded.ids[: encoded.start]), tokenizer.decode(encoded.ids[encoded.start :])

    assert text(Encoder(tokenizer)) == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yo<|im_end|>")
    assert text(Encoder(tokenizer, "none")) == ("hi", "yo<|im_end|>")
    (tmp_path / "t.jinja").write_text("Q: {{ messages[0]['content'] }} A: ")
    assert text(Encoder(tokenizer, str(tmp_path / "t.jinja"))) == ("Q: hi A: ", "yo<|im_end|>")
    with pytest.raises(DeltacomeError, match="give a Jinja template"):
        Encoder(tokenizer, str(tmp_path / "missing.jinja"))
    assert Encoder(tokenizer).example(Example((), "some text")).start == 1


def expert_inputs(checkpoint: Checkpoint, ids: Tensor) -> dict[str, Tensor]:
    """All inputs (tokens, n) of each matrix of each expert, in float64, by the checkpoint's names."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64, experts_implementation="eager")
    calls: list[tuple[str, Any, Tensor, Tensor]] = []
    for name, layer in model.named_modules():
        if hasattr(layer, "gate_up_proj"):

            def note(layer: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                calls.append((name, layer, arguments[0], arguments[1]))

            layer.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(input_ids=ids)
    found: dict[str, Tensor] = {}
    for name, layer, hidden, chosen in calls:
        weights = layer.gate_up_proj.detach()
        for expert in range(len(layer.down_proj)):
            x = hidden[(chosen == expert).any(1)]
            gate, up = (x @ weights[expert].T).chunk(2, -1)
            inputs = {"gate_proj": x, "w1": x, "up_proj": x, "w3": x}
            inner = nn.functional.silu(gate) * up
            inputs |= {"down_proj": inner, "w2": inner}
            # transformers saves Mixtral's under the names that they were published with
            block = name.replace(".mlp.", ".block_sparse_moe.")
            for kind, value in inputs.items():
                for prefix in (name, block):
                    if f"{prefix}.{expert}.{kind}.weight" in checkpoint.tensors:
                        found[f"{prefix}.{expert}.{kind}.weight"] = value
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_measured_each_on_its_own_tokens(family: str, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(save(make_any(family)))
    ids, mask = random_tokens(checkpoint)
    expected = expert_inputs(checkpoint, ids)
    assert len(expected) == 2 * 3 * (3 if family == "mixtral" else 17)
    linears = {name for name, info in checkpoint.tensors.items() if "layers" in name and len(info.shape) == 2}
    monkeypatch.setattr(module, "FEWEST_TOKENS", 200)
    inputs = CalibrationStream(checkpoint, ids, mask).inputs(lambda _: True, checkpoint.read_float, lambda _: None)
    moments: dict[str, Tensor] = {}
    stream = CalibrationStream(checkpoint, ids, mask)
    stream.run(lambda _: True, checkpoint.read_float, checkpoint.read_float, moments.update)
    few = {name for name, x in expected.items() if len(x) < 200}
    assert not few if family == "mixtral" else 0 < len(few) < len(expected)
    for name, x in expected.items():
        assert (name in inputs) == (name in moments) == (name not in few)
        if name not in few:
            moment = (x.T @ x / len(x)).float()
            both = torch.stack((moment.diag(), x.mean(0).float()))
            torch.testing.assert_close(inputs[name], both, rtol=1e-3, atol=1e-4 * float(moment.max()))
            torch.testing.assert_close(moments[name], moment, rtol=1e-3, atol=1e-4 * float(moment.max()))
    assert inputs.keys() <= linears  # routers are no linears of torch's
    assert {name.split(".")[-2] for name in inputs} >= {"q_proj", "o_proj"}


def test_padding_is_no_input_of_experts(save: Save) -> None:
    checkpoint = Checkpoint(save(make_any("mixtral")))
    ids, mask = random_tokens(checkpoint)
    padded = torch.cat((ids, torch.zeros_like(ids)), 1)
    of = [(ids, mask), (padded, torch.cat((mask, torch.zeros_like(mask)), 1))]
    plain, other = (
        CalibrationStream(checkpoint, *tokens).inputs(lambda _: True, checkpoint.read_float, lambda _: None)
        for tokens in of
    )
    assert plain.keys() == other.keys()
    for name, inputs in plain.items():
        torch.testing.assert_close(other[name], inputs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_sensitivities_of_experts(family: str, save: Save) -> None:
    """As those of linears, as a mean over a layer's experts: an error in all of them at once, too small to have a token
    go to another expert."""
    checkpoint = Checkpoint(save(make_any(family)))
    ids, mask = random_tokens(checkpoint)
    ids, mask = ids[:8, :64], mask[:8, :64]
    found = measure_sensitivities(CalibrationStream(checkpoint, ids, mask), checkpoint.read_float, lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64, experts_implementation="eager")
    stacks = {name: weight for name, weight in model.named_parameters() if weight.ndim == 3}
    assert len(stacks) == 4
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        p = model(input_ids=ids).logits.log_softmax(-1)
        for name, weight in stacks.items():
            layer = name.split(".")[2]
            kinds = ("down_proj", "w2") if "down" in name else ("gate_up_proj", "w1", "w3")
            known = [
                value
                for own, value in found.items()
                if f"layers.{layer}." in own and any(f".{kind}." in f"{own.replace('[', '.')}." for kind in kinds)
            ]
            assert len(known) == (6 if family == "mixtral" and "down" not in name else 3)
            kl = square = 0.0
            for _ in range(4):
                error = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                error *= 1e-6 * weight.norm() / error.norm()
                weight += error
                q = model(input_ids=ids).logits.log_softmax(-1)
                weight -= error
                kl += float((p.exp() * (p - q)).sum(-1).mean())
                square += float(error.square().sum())
            assert 0.5 < kl / (sum(known) / len(known) / 2 * square) < 2, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "tied"])
def test_sensitivities_are_the_kl_of_small_errors(family: str, save: Save) -> None:
    """KL(p || p') of random errors in one weight at a time, in float64, is half the sensitivity times their square."""
    checkpoint = Checkpoint(save(make_model(tie_word_embeddings=True) if family == "tied" else make_other(family)))
    ids, mask = random_tokens(checkpoint)
    ids, mask = ids[:8, :64], mask[:8, :64]
    done: list[float] = []
    stream = CalibrationStream(checkpoint, ids, mask)
    found = measure_sensitivities(stream, checkpoint.read_float, done.append)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64, experts_implementation="eager")
    matrices = {name: weight for name, weight in model.named_parameters() if weight.ndim == 2}
    assert len(found) == len(matrices)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        p = model(input_ids=ids).logits.log_softmax(-1)
        for name, weight in matrices.items():
            kl = square = 0.0
            for _ in range(4):
                error = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                error *= 1e-3 * weight.norm() / error.norm()
                weight += error
                q = model(input_ids=ids).logits.log_softmax(-1)
                weight -= error
                kl += float((p.exp() * (p - q)).sum(-1).mean())
                square += float(error.square().sum())
            known = found[name if name in found else "embed_out.weight"]  # which transformers renames
            assert 0.5 < kl / (known / 2 * square) < 2, name
    assert sum(done) == 2 * sum(parameter.numel() for layer in stream.layers for parameter in layer.parameters())


def test_inputs_come_with_sensitivities(save: Save) -> None:
    """As they are measured by themselves, though only some sequences are gone back through."""
    checkpoint = Checkpoint(save(make_model()))
    stream = CalibrationStream(checkpoint, *random_tokens(checkpoint))
    expected = stream.inputs(lambda _: True, checkpoint.read_float, lambda _: None)
    alone = CalibrationStream(checkpoint, stream.ids[:3], stream.mask[:3])
    sensitivities = measure_sensitivities(alone, checkpoint.read_float, lambda _: None)
    inputs: dict[str, Tensor] = {}
    stream = CalibrationStream(checkpoint, *random_tokens(checkpoint))
    found = measure_sensitivities(stream, checkpoint.read_float, lambda _: None, 3, inputs)
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(inputs[name], value)
    assert found == pytest.approx(sensitivities, rel=1e-3)
