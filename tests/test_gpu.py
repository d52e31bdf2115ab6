"""What only a GPU can show; elsewhere Triton's interpreter stands in (tests/test_kernels.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import deltacome
from conftest import check_alike
from deltacome.benchmark.random_model import random_delta
from deltacome.benchmark.timing import captured
from deltacome.runtime.kernels import kernels_for, reference

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
        for length in (1, 30):
            ids = torch.randint(0, 50, (3, length))
            expected = torch.cat((merged(ids[:1]).logits, plain(ids[1:2]).logits, merged(ids[2:]).logits))
            logits = shared(ids.to(PLACE), tenants=["a", None, "a"]).logits.cpu().double()
            assert (logits - expected).abs().max() <= 2e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("method", ["rate-distortion", "delta-come"])
def test_compression_is_the_cpus(method: str, base: Path, finetuned: Path, examples: Path, tmp_path: Path) -> None:
    for place in ("cpu", "cuda"):
        options = {"method": method, "calibration": examples, "device": place}
        deltacome.compress(base, finetuned, tmp_path / place, ratio=4, **options)
    check_alike(deltacome.Artifact(tmp_path / "cuda"), deltacome.Artifact(tmp_path / "cpu"))


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


def test_a_graph_goes_on_with_other_tenants() -> None:
    """As the layers of the plugin for vLLM do it: graphs of two sizes, and tenants that come when both are there."""
    kernels, widths, n = kernels_for("cuda"), (300, 100), 700
    generator = torch.Generator(PLACE).manual_seed(0)
    slots = kernels.Slots(3, 64, torch.device(PLACE))
    work = kernels.SlotWork(slots, (0, 300), widths, n)
    plain = reference.SlotWork(reference.Slots(3, 64, torch.device(PLACE)), (0, 300), widths, n)
    x, y = torch.randn(64, n, device=PLACE), torch.zeros(64, sum(widths), device=PLACE)
    slots.set(np.arange(3))
    replays = {rows: captured(lambda rows=rows: work.add(y[:rows].zero_(), x[:rows]), PLACE) for rows in (8, 64)}
    for slot, ratio in ((0, 4), (1, 8), (2, 16)):
        for index, m in enumerate(widths):
            blocks = [random_delta(m, n, ratio, "uv", generator)]
            work.fill(index, slot, blocks)
            plain.fill(index, slot, blocks)
    for of_rows in ([0, 0, 3, 1, 1], [2, 3], [1, 0, 0, 0, 0, 0, 0, 2], [3], [0, 1, 2, 3] * 16):
        for tables in (slots, plain.slots):
            tables.set(np.array(of_rows))
        for rows, replay in replays.items():
            if len(of_rows) <= rows:
                replay()
                expected = torch.zeros(rows, sum(widths), device=PLACE)
                plain.add(expected, x[:rows])
                assert (y[:rows] - expected).abs().max() <= 3e-4 * expected.abs().max()


def test_results_do_not_depend_on_the_batch() -> None:
    """A tenant's row alone, and among many: but for how the compiler puts a product and a sum together."""
    kernels, m, n = kernels_for("cuda"), 1000, 2000
    generator = torch.Generator(PLACE).manual_seed(0)
    deltas = [random_delta(m, n, 8, "uv", generator) for _ in range(9)]
    x = torch.randn(40, n, device=PLACE)
    rows = [torch.arange(i, 40, 9, device=PLACE) for i in range(9)]
    whole = torch.zeros(40, m, device=PLACE)
    kernels.Work(list(zip(deltas, rows, strict=True))).add(whole, x)
    for delta, own in zip(deltas, rows, strict=True):
        alone = torch.zeros(40, m, device=PLACE)
        kernels.Work([(delta, own[:1])]).add(alone, x)
        torch.testing.assert_close(alone[own[0]], whole[own[0]], rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
