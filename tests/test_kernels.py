"""Every kernel against the terms themselves in float64."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from deltacome.benchmark.random_model import PLAN
from deltacome.format.terms import Factored, Groups, Sign, Term, add_terms
from deltacome.runtime.kernels.layout import GPU_WIDTHS, WIDTHS, plan_groups
from deltacome.runtime.kernels.packed import UNIT, for_gpu, pack_terms, transposed
from graphs import Captured

CPU = torch.device("cpu")


@pytest.fixture(params=["reference", "cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        from deltacome.runtime.kernels import reference

        return reference
    if request.param == "cpu":
        from deltacome.runtime.kernels import cpu

        return cpu
    pytest.importorskip("triton", reason="Triton is not there")
    from deltacome.runtime.kernels import triton

    return triton


def device_of(kernels: Any) -> torch.device:
    return torch.device("cuda" if kernels.__name__.endswith("triton") and torch.cuda.is_available() else "cpu")


def factored(
    m: int, n: int, parts: list[tuple[int, int]], rotated: str = "", rows: torch.Tensor | None = None, seed: int = 0
) -> list[Term]:
    """Random terms of (bits, rank), all of about the same size."""
    generator = torch.Generator().manual_seed(seed)
    height = m if rows is None else len(rows)

    def codes(bits: int, rank: int, length: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, (rank, length), generator=generator)

    return [
        Factored.from_codes(
            bits,
            codes(bits, rank, height),
            codes(bits, rank, n),
            torch.rand(rank, generator=generator) / 4**bits,
            None,
            rotated,
            rows,
        )
        for bits, rank in parts
    ]


def magnitudes(terms: list[Term], m: int, n: int) -> torch.Tensor:
    """A delta (m, n) as it would be if nothing of it canceled out, in float64."""
    total = torch.zeros(m, n, dtype=torch.float64)
    for term in terms:
        if isinstance(term, Factored):
            u, v = (side.abs() for side in term.vectors(torch.float64))
            rows = slice(None) if term.rows is None else term.rows
            total[rows] += (u * term.scale.double()[:, None]).T @ v
        else:
            total += add_terms(torch.zeros(m, n, dtype=torch.float64), [term]).abs()
    return total


def check(kernels: Any, terms: list[list[Term]], rows: list[list[int]], m: int, n: int, count: int) -> None:
    """The deltas `terms`, each for its rows of `count`, against products in float64; other rows stay untouched."""
    device = device_of(kernels)
    x, y = torch.randn(count, n), torch.randn(count, m)
    expected = y.double()
    for delta, own in zip(terms, rows, strict=True):
        expected[own] += x.double()[own] @ add_terms(torch.zeros(m, n, dtype=torch.float64), delta).T
    work = kernels.Work(
        [(pack_terms(t, (m, n), device), torch.tensor(r, device=device)) for t, r in zip(terms, rows, strict=True)]
    )
    result = y.to(device, copy=True)
    work.add(result, x.to(device))
    size = max(
        (x.double()[own].abs() @ magnitudes(delta, m, n).T).max() for delta, own in zip(terms, rows, strict=True)
    )
    # Inputs are rounded to 15 bits on a GPU and to 16 on a CPU; a wrong code would err by far more.
    limit = {"cpu": 2e-5, "triton": 8e-5}.get(kernels.__name__.rpartition(".")[2], 4e-6)
    assert (result.cpu().double() - expected).abs().max() <= limit * size
    untouched = sorted(set(range(count)) - {row for own in rows for row in own})
    assert torch.equal(result.cpu()[untouched], y[untouched])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_every_bit_width(kernels: Any, bits: int) -> None:
    check(kernels, [factored(70, 45, [(bits, 11)])], [[1]], 70, 45, 2)


@pytest.mark.parametrize(("m", "n"), [(1, 3), (33, 17), (64, 128), (100, 577), (611, 31), (2100, 4500)])
@pytest.mark.parametrize("rotated", ["", "u", "v", "uv"])
def test_shapes_and_rotations(kernels: Any, m: int, n: int, rotated: str) -> None:
    check(kernels, [factored(m, n, [(8, 1), (3, 2), (2, 9), (1, 17)], rotated)], [[0, 2]], m, n, 3)


def test_tenants_with_other_plans_in_one_batch(kernels: Any) -> None:
    plans = [[(6, 2), (2, 9)], [(1, 40)], [(4, 3), (3, 3), (2, 1)]]
    terms = [
        factored(90, 75, plan, rotated, seed=i)
        for i, (plan, rotated) in enumerate(zip(plans, ("uv", "", "v"), strict=True))
    ]
    check(kernels, terms, [[4], [0, 1, 5], [3]], 90, 75, 6)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 16, 17, 40, 140])
def test_one_row_to_a_prefill(kernels: Any, count: int) -> None:
    check(kernels, [factored(66, 130, [(5, 2), (2, 20), (1, 9)], "uv")], [list(range(count))], 66, 130, count + 1)


def test_terms_of_some_rows(kernels: Any) -> None:
    rows = torch.arange(3, 500, 7)
    terms = [factored(500, 48, [(8, 1), (3, 5)], "v", rows), factored(500, 48, [(2, 4)], "v", rows + 1, seed=1)]
    check(kernels, terms, [[1], [0]], 500, 48, 2)
    check(kernels, terms[:1], [list(range(140))], 500, 48, 140)


@pytest.mark.parametrize("count", [1, 30])
def test_signs(kernels: Any, count: int) -> None:
    words = torch.randint(-(2**31), 2**31, (37, 3), dtype=torch.int64).to(torch.int32)
    words[:, 2] &= 1  # 65 columns
    check(kernels, [[Sign((37, 65), words, torch.tensor([0.03]))]], [list(range(count))], 37, 65, count)


def test_groups(kernels: Any) -> None:
    term = factored(40, 50, [(3, 6)])[0]
    assert isinstance(term, Factored)
    scales = [torch.rand(6, 3).half(), torch.rand(6, 4).half()]
    zeros = [torch.randint(0, 8, scale.shape, dtype=torch.uint8) for scale in scales]
    groups = Groups(16, scales[0], zeros[0], scales[1], zeros[1])
    grouped = Factored(3, (40, 50), term.u, term.v, term.scale, groups)
    check(kernels, [[grouped]], [[1, 2]], 40, 50, 4)


def test_same_input_again(kernels: Any) -> None:
    """The CPU kernel keeps rotated inputs; other inputs and other rotations at the same place must not meet them."""
    m, n = 40, 72
    x = torch.randn(2, n)
    for rotated in ("v", "v", "", "uv", ""):
        for factor in (1.0, 1.0, -2.0):
            packed = pack_terms(factored(m, n, [(2, 5)], rotated), (m, n), device_of(kernels))
            delta = add_terms(torch.zeros(m, n, dtype=torch.float64), factored(m, n, [(2, 5)], rotated))
            y = torch.zeros(2, m, device=device_of(kernels))
            kernels.Work([(packed, torch.tensor([0, 1], device=y.device))]).add(y, (factor * x).to(y.device))
            expected = factor * x.double() @ delta.T
            assert (y.cpu().double() - expected).abs().max() < 2e-4 * expected.abs().max()


def test_half_precision_outputs(kernels: Any) -> None:
    terms = factored(50, 60, [(2, 9)], "uv")
    x, y = torch.randn(3, 60).bfloat16(), torch.randn(3, 50).bfloat16()
    expected = y.double() + x.double() @ add_terms(torch.zeros(50, 60, dtype=torch.float64), terms).T
    device = device_of(kernels)
    result = y.to(device, copy=True)
    kernels.Work([(pack_terms(terms, (50, 60), device), torch.arange(3, device=device))]).add(result, x.to(device))
    assert torch.allclose(result.cpu().double(), expected, rtol=0.02, atol=0.02)


def test_columns(kernels: Any) -> None:
    terms = factored(77, 20, [(5, 3), (1, 9)])
    device = device_of(kernels)
    packed = pack_terms(terms, (77, 20), device)
    places = torch.tensor([0, 76, 31, 32, 33, 64])
    expected = torch.cat([term.vectors()[0] for term in terms if isinstance(term, Factored)])[:, places]
    assert torch.equal(kernels.columns(packed, places.to(device)).cpu(), expected)


@pytest.mark.parametrize("bits", [1, 3, 7, 16])
@pytest.mark.parametrize(("m", "n"), [(35, 41), (1, 1), (16, 33), (48, 7)])
def test_codes_are_the_terms(bits: int, m: int, n: int) -> None:
    """In both layouts; a GPU's is made of the CPU's, and stays as it is."""
    terms = [term for term in factored(m, n, [(bits, 13), (5, 2)]) if isinstance(term, Factored)]
    packed = pack_terms(terms, (m, n), CPU)
    for same in (packed, for_gpu(packed), for_gpu(for_gpu(packed))):
        for term, (u, v) in zip(terms, same.entries(), strict=True):
            assert torch.equal(u, term.vectors()[0])
            assert torch.equal(v, term.vectors()[1])


@pytest.mark.parametrize(("widths", "unit"), [(WIDTHS, 32), (GPU_WIDTHS, 128)])
def test_planes_fill_whole_units(widths: tuple[int, ...], unit: int) -> None:
    """All but those of one bit, and every bit of every component is in one plane."""
    terms = [(16, 3), (8, 5), (7, 9), (5, 1), (3, 40), (2, 7), (1, 3)]
    bits = Counter[tuple[int, int]]()
    for width, runs in plan_groups(terms, widths, unit).items():
        assert width in widths
        assert width == 1 or sum(count for _, count, _ in runs) * width % unit == 0
        bits.update(
            (component + k, first + i) for component, count, first in runs for k in range(count) for i in range(width)
        )
    components = chain.from_iterable([own] * rank for own, rank in terms)
    assert bits == Counter((k, bit) for k, own in enumerate(components) for bit in range(own))


@pytest.mark.parametrize(("ratio", "most"), [(16, 1.023), (32, 1.033)])
def test_the_matrices_of_7b_take_hardly_more_on_a_gpu(ratio: int, most: float) -> None:
    """Than the share that the ratio gives them; docs/gpu-kernel.md says how much."""
    found = share = 0.0
    for m, n, count in ((4096, 4096, 4), (11008, 4096, 2), (4096, 11008, 1)):
        components = 16 * m * n / ratio / sum(bits * part for bits, part in PLAN.items()) / (m + n)
        plan = plan_groups([(bits, round(components * part)) for bits, part in PLAN.items()], GPU_WIDTHS, UNIT)
        for width, runs in plan.items():
            planes = sum(length for _, length, _ in runs)
            found += count * sum(
                -(-codes * width // UNIT) * UNIT // 8 * columns for codes, columns in ((planes, m), (n, planes))
            )
        share += count * 2 * m * n / ratio
    assert most - 0.01 < found / share <= most


def test_transposed() -> None:
    words = torch.randint(-(2**31), 2**31, (30, 1), dtype=torch.int64).to(torch.int32) & 0xFFFFF
    for terms in (factored(30, 20, [(3, 4)], "u"), [Sign((30, 20), words, torch.tensor([0.5]))]):
        plain = add_terms(torch.zeros(30, 20, dtype=torch.float64), terms)
        turned = add_terms(torch.zeros(20, 30, dtype=torch.float64), transposed(terms))
        torch.testing.assert_close(turned.T, plain)


def test_delta_without_terms(kernels: Any) -> None:
    check(kernels, [[], factored(40, 30, [(2, 5)])], [[0], [2]], 40, 30, 3)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [2, 30, 140])
def test_any_number_of_threads(threads: int, count: int) -> None:
    from deltacome.runtime.kernels import cpu

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        terms = [factored(5000, 90, [(3, 2), (2, 20), (1, 9)], "v"), factored(5000, 90, [(4, 9)], "uv", seed=1)]
        for _ in range(20):
            check(cpu, terms, [list(range(count)), [count]], 5000, 90, count + 2)
    finally:
        torch.set_num_threads(before)


def gpu_kernels() -> Any:
    pytest.importorskip("triton", reason="Triton is not there")
    from deltacome.runtime.kernels import triton

    return triton


def delta_of(terms: list[Term], m: int, n: int) -> torch.Tensor:
    return add_terms(torch.zeros(m, n, dtype=torch.float64), terms)


def test_layers_that_share_an_input() -> None:
    """Tenants whose deltas are rotated in some of the layers, and one that has none in one of them."""
    kernels, n, sizes = gpu_kernels(), 70, (40, 150, 9)
    device = device_of(kernels)
    rows = [torch.tensor(own, device=device) for own in ([2, 0], [3])]
    terms = [
        [factored(m, n, [(3, 4), (1, 20)], rotated, seed=i) for i, rotated in enumerate(("uv", "v"))] for m in sizes
    ]
    terms[1][1] = factored(150, n, [(2, 9)])
    layers = [
        [(pack_terms(own, (m, n), device), r) for own, r in zip(both, rows, strict=True)]
        for both, m in zip(terms, sizes, strict=True)
    ]
    layers[2].pop(0)
    layers[2].append(
        (pack_terms([Sign((9, n), torch.arange(27).view(9, 3).int(), torch.tensor([0.5]))], (9, n), device), rows[0])
    )
    work, x = kernels.SharedWork(layers), torch.randn(4, n)
    computed = work.compute(x.to(device))
    for number, (both, m) in enumerate(zip(terms, sizes, strict=True)):
        y = torch.randn(4, m)
        result = y.to(device, copy=True)
        work.finish(number, result, x.to(device), computed)
        expected = y.double()
        first = [Sign((9, n), torch.arange(27).view(9, 3).int(), torch.tensor([0.5]))] if number == 2 else both[0]
        expected[[2, 0]] += x.double()[[2, 0]] @ delta_of(first, m, n).T
        expected[3] += x.double()[3] @ delta_of(both[1], m, n).T
        assert (result.cpu().double() - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_parts_of_one_output(kernels: Any) -> None:
    """As q, k and v are in a merged layer."""
    n, sizes = 50, (24, 8, 40)
    device = device_of(kernels)
    terms = [factored(m, n, [(2, 7), (1, 5)], "uv", seed=m) for m in sizes]
    rows = torch.tensor([1, 2], device=device)
    firsts = [0, 24, 32]
    work = kernels.Work([(pack_terms(own, (m, n), device), rows) for own, m in zip(terms, sizes, strict=True)], firsts)
    x, y = torch.randn(3, n), torch.randn(3, sum(sizes))
    result = y.to(device, copy=True)
    work.add(result, x.to(device))
    whole = torch.cat([delta_of(own, m, n) for own, m in zip(terms, sizes, strict=True)])
    expected = y.double()
    expected[1:] += x.double()[1:] @ whole.T
    assert (result.cpu().double() - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert torch.equal(result[0].cpu(), y[0])


class Layer:
    """Some matrices that share an input, in slots, and what they are to give in float64."""

    def __init__(self, kernels: Any, slots: Any, widths: list[int], n: int, seed: int) -> None:
        self.widths, self.n, self.seed, self.device = widths, n, seed, device_of(kernels)
        self.columns = [sum(widths[:i]) for i in range(len(widths))]
        self.work = kernels.SlotWork(slots, self.columns, widths, n)
        self.whole: dict[tuple[int, int], torch.Tensor] = {}

    def fill(self, index: int, slot: int, plan: list[tuple[int, int]] | None, rotated: str = "uv") -> None:
        blocks, m = [], self.widths[index]
        self.whole.pop((index, slot), None)
        if plan is not None:
            terms = factored(m, self.n, plan, rotated, seed=self.seed + 10 * index + slot)
            blocks = [pack_terms(terms, (m, self.n), self.device)]
            self.whole[index, slot] = delta_of(terms, m, self.n)
        assert self.work.refusal(index, blocks) is None
        self.work.fill(index, slot, blocks)

    def expected(self, x: torch.Tensor, y: torch.Tensor, of_rows: list[int]) -> torch.Tensor:
        result = y.double()
        for (index, slot), delta in self.whole.items():
            for row in (i for i, own in enumerate(of_rows) if own == slot):
                first = self.columns[index]
                result[row, first : first + len(delta)] += delta @ x[row].double()
        return result


@pytest.fixture
def two_layers(kernels: Any) -> tuple[Any, list[Layer]]:
    if not hasattr(kernels, "SlotWork"):
        pytest.skip("there are no graphs on a CPU")
    slots = kernels.Slots(3, 70, device_of(kernels))
    layers = [Layer(kernels, slots, [60, 20], 140, 0)]
    layers[0].fill(0, 0, [(3, 5), (1, 30)])
    layers.append(Layer(kernels, slots, [130], 50, 100))  # which takes nothing from the first
    layers[0].fill(1, 0, [(8, 2)], "")  # its inputs are not rotated, those of the other are
    layers[0].fill(0, 1, [(2, 50)], "v")
    layers[0].fill(1, 2, [(4, 1)])
    layers[1].fill(0, 0, [(2, 7)])
    return slots, layers


def test_slots(two_layers: tuple[Any, list[Layer]]) -> None:
    """Any rows of any tenants, and tenants that come and go; sizes in between are those of a graph."""
    slots, layers = two_layers
    generator = torch.Generator().manual_seed(0)
    few, many = [0, 3, 1, 0, 0, 0, 0, 2], torch.randint(0, 4, (70,), generator=generator).tolist()
    for of_rows in [few, [1], [3, 3, 3], many, "other", few]:
        if of_rows == "other":
            layers[0].fill(0, 0, None)
            layers[1].fill(0, 2, [(1, 5), (6, 1)])
            continue
        slots.set(np.array(of_rows))
        for layer in layers:
            count = min(-(-len(of_rows) // 8) * 8, 70)  # what a graph of a larger batch has behind
            x, y = torch.randn(count, layer.n), torch.randn(count, sum(layer.widths))
            result = y.to(layer.device, copy=True)
            layer.work.add(result, x.to(layer.device))
            expected = layer.expected(x, y, of_rows)
            assert (result.cpu().double() - expected).abs().max() <= 2e-4 * expected.abs().max()
            assert torch.equal(result[len(of_rows) :].cpu(), y[len(of_rows) :])


def test_what_has_no_place_in_a_slot(kernels: Any, two_layers: tuple[Any, list[Layer]]) -> None:
    work, device = two_layers[1][0].work, device_of(kernels)
    own = pack_terms(factored(60, 140, [(2, 5)]), (60, 140), device)
    assert work.refusal(0, [own]) is None
    assert "flatten it" in work.refusal(0, [own, own])
    assert "not 20 x 140" in work.refusal(1, [own])
    if kernels.__name__.endswith("triton"):
        with pytest.raises(ValueError, match="joins after the first step"):
            two_layers[0].set(np.array([0]))
            kernels.SlotWork(two_layers[0], [0], [10], 10)


def places_of(slots: Any) -> list[int]:
    tensors = chain(*(vars(layout).values() for layout in slots.layouts), [slots.of_rows])
    return [tensor.data_ptr() for tensor in tensors if torch.is_tensor(tensor)]


def test_a_captured_step_serves_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph does, without one: the same launches on the same memory, whatever the tables say by then."""
    kernels = gpu_kernels()
    slots = kernels.Slots(3, 40, torch.device("cpu"))
    layer = Layer(kernels, slots, [60, 20], 140, 0)
    slots.set(np.array([0, 1, 2] * 3))
    x, y = torch.zeros(12, 140), torch.zeros(12, 80)
    with Captured(monkeypatch) as captured:
        layer.work.add(y, x)
    assert captured.launches and not captured.forbidden
    places = places_of(slots)
    layer.fill(0, 0, [(3, 5), (1, 30)])
    layer.fill(1, 2, [(2, 9)])
    for of_rows in ([0, 2, 0, 3, 2], [2], [3], [0] * 11):
        slots.set(np.array(of_rows))
        x.copy_(torch.randn(12, 140)), y.copy_(torch.randn(12, 80))
        expected = layer.expected(x, y, of_rows)
        captured.replay()
        assert (y.double() - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert places == places_of(slots)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_no_number(kernels: Any, bad: float) -> None:
    """It spoils its own outputs and no others."""
    m, n = 40, 50
    device = device_of(kernels)
    packed = pack_terms(factored(m, n, [(3, 6)], "uv"), (m, n), device)
    x, y = torch.randn(3, n, device=device), torch.zeros(3, m, device=device)
    x[1, 7] = bad
    kernels.Work([(packed, torch.arange(3, device=device))]).add(y, x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_rows_of_very_different_sizes(kernels: Any) -> None:
    """One row's outliers are not another's error: each has a scale of its own."""
    m, n = 130, 300
    terms = factored(m, n, [(4, 3), (2, 20)], "uv")
    device = device_of(kernels)
    x = torch.randn(3, n) * torch.tensor([1e-6, 1.0, 1e5])[:, None]
    y = torch.zeros(3, m, device=device)
    kernels.Work([(pack_terms(terms, (m, n), device), torch.arange(3, device=device))]).add(y, x.to(device))
    expected = x.double() @ delta_of(terms, m, n).T
    error = (y.cpu().double() - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() <= 3e-4
