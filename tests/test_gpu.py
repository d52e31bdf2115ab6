"""What only a GPU can show; elsewhere Triton's interpreter stands in (tests/test_kernels.py)."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltacome
from deltacome.benchmark.timing import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLACE = torch.device("cuda")


@pytest.mark.parametrize("method", ["rate-distortion", "delta-come", "bitdelta"])
def test_rows_are_those_of_merged_models(method: str, base: Path, finetuned: Path, tmp_path: Path) -> None:
    ratio = None if method == "bitdelta" else 6
    deltacome.compress(base, finetuned, tmp_path / "delta", ratio=ratio, method=method)
    deltacome.merge(base, tmp_path / "delta", tmp_path / "merged", dtype=torch.float32)
    plain, merged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for folder in (base, tmp_path / "merged")
    )
    shared = deltacome.load(base, {"a": tmp_path / "delta"}, device=PLACE, dtype=torch.float32)
    with torch.inference_mode():
        for length in (1, 30):  # the kernel, and what takes codes apart for longer inputs
            ids = torch.randint(0, 50, (3, length))
            expected = torch.cat((merged(ids[:1]).logits, plain(ids[1:2]).logits, merged(ids[2:]).logits))
            logits = shared(ids.to(PLACE), tenants=["a", None, "a"]).logits.cpu().double()
            assert (logits - expected).abs().max() <= 2e-4 * (expected.max() - expected.min())


def test_a_step_is_a_cuda_graph(base: Path, finetuned: Path, tmp_path: Path) -> None:
    deltacome.compress(base, finetuned, tmp_path / "delta", ratio=6)
    model = deltacome.load(base, {"a": tmp_path / "delta"}, device=PLACE, dtype=torch.float32)
    ids = torch.tensor([[3], [5]], device=PLACE)
    result = torch.empty(2, 1, model.config.vocab_size, device=PLACE)

    def step() -> None:
        result.copy_(model(ids, tenants=["a", None]).logits[..., : result.shape[-1]])

    with torch.inference_mode():
        replay = captured(step, PLACE)
        first = result.clone()
        ids.copy_(torch.tensor([[7], [9]]))
        replay()
        got = result.clone()
        step()
    assert torch.allclose(got, result, atol=1e-5) and not torch.allclose(got, first, atol=1e-2)
