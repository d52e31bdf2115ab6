"""Scalar quantizers for singular vectors, and rounding with error feedback (GPTQ).

Vectors are the rows of a matrix, each with a bit-width of its own: `bits` is an integer tensor (rows, 1). Two codes:

* one uniform mid-rise code a vector: level `code - (2**bits - 1) / 2` times one step;
* groups: scale and zero point from the minimum and maximum of each group of entries, as GPTQ's and the paper's
  reference code have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltacome.format.terms import groups_per_row

Scale = Literal["unbiased", "least-squares", "minmax"]

# Steps of the uniform mid-rise code with the least squared error for a standard normal variable, by bit-width
# (J. Max, "Quantizing for minimum distortion", 1960, table 2; 16 bit: a range of 6.2 standard deviations).
NORMAL_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308, 16: 0.00019}
STEPS_TRIED = 10
ROWS_AT_ONCE = 64  # bounds the memory of the search for steps
FEEDBACK_BLOCK = 128  # columns between two updates of the whole matrix, GPTQ's own value
DAMPING = 0.01  # share of the mean diagonal added to a second moment, GPTQ's own value
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


@dataclass
class Ranges:
    """Scale, float32 and representable in float16, and integer zero point of each group, (rows, groups)."""

    scale: Tensor
    zero: Tensor


@dataclass
class Quantized:
    """Rows as codes, int32 (rows, length), and as the values that the codes stand for, float32 (rows, length).

    step: float32 (rows,), what one level of the mid-rise code is worth; 1 for the group code, which has ranges instead.
    """

    codes: Tensor
    values: Tensor
    step: Tensor
    ranges: Ranges | None = None


def quantize_rows(x: Tensor, bits: Tensor, group_size: int = 0) -> Quantized:
    """Round every entry of x (rows, length) to its nearest code; one code a row, or one per `group_size` entries."""
    if not group_size:
        step = fit_steps(x, bits)
        codes = midrise(x, step, bits)
        return Quantized(codes, midrise_values(codes, step, bits), step[:, 0])
    rows, length = x.shape
    groups = groups_per_row(length, group_size)
    grouped = torch.nn.functional.pad(x, (0, groups * group_size - length)).reshape(rows, groups, group_size)
    ranges = minmax(grouped, bits)
    scale, zero = ranges.scale[..., None], ranges.zero[..., None]
    codes = affine(grouped, scale, zero, bits[..., None])
    values = (codes - zero) * scale
    codes, values = (y.reshape(rows, -1)[:, :length].contiguous() for y in (codes, values))
    return Quantized(codes, values, x.new_ones(rows), ranges)


def quantize_entries_with_feedback(x: Tensor, second_moment: Tensor, bits: Tensor, group_size: int = 0) -> Quantized:
    """GPTQ (Frantar et al., 2023): round each row of x (rows, length) entry by entry.

    The rows weigh inputs of the second moment (length, length); each entry's error is made good by the entries after
    it. A group's range is that of its entries as they stand when it is reached.
    """
    factor = inverse_factor(second_moment)
    if not group_size:
        return feed_back_entries(x, factor, bits)
    codes, values = x.new_zeros(x.T.shape, dtype=torch.int32), x.new_zeros(x.T.shape)
    groups = groups_per_row(x.shape[1], group_size)
    ranges = Ranges(x.new_zeros(x.shape[0], groups), x.new_zeros(x.shape[0], groups))

    def round_column(w: Tensor, j: int) -> Tensor:
        group = slice(j // group_size, j // group_size + 1)
        if j % group_size == 0:
            found = minmax(w[j : j + group_size].T[:, None], bits)
            ranges.scale[:, group], ranges.zero[:, group] = found.scale, found.zero
        scale, zero = ranges.scale[:, group], ranges.zero[:, group]
        codes[j] = affine(w[j, :, None], scale, zero, bits)[:, 0]
        values[j] = (codes[j] - zero[:, 0]) * scale[:, 0]
        return values[j]

    feed_back(x, factor, round_column, group_size)
    return Quantized(codes.T.contiguous(), values.T.contiguous(), x.new_ones(x.shape[0]), ranges)


def feed_back_entries(x: Tensor, factor: Tensor, bits: Tensor) -> Quantized:
    """GPTQ with the mid-rise code; `factor` (length, length) is the upper Cholesky factor of H's inverse."""
    step = fit_steps(x, bits)[:, 0]
    half = 2.0 ** (bits[:, 0] - 1)
    levels, low, high = torch.empty_like(x.T), -half, half - 1

    def round_column(w: Tensor, j: int) -> Tensor:
        levels[j] = (w[j] / step).floor_().clamp_(low, high)
        return (levels[j] + 0.5) * step

    feed_back(x, factor, round_column, FEEDBACK_BLOCK)
    levels = levels.T.contiguous()
    return Quantized((levels + half[:, None]).to(torch.int32), (levels + 0.5) * step[:, None], step)


def feed_back_in_blocks(x: Tensor, factors: Tensor, bits: Tensor) -> Quantized:
    """As `feed_back_entries` where H has blocks on its diagonal and nothing else: all blocks at once.

    factors: (blocks, size, size), of which the last ones may be larger than what is left of x.
    """
    step = fit_steps(x, bits)[:, 0]
    half = 2.0 ** (bits[:, 0] - 1)
    rows, length = x.shape
    blocks, size, _ = factors.shape
    # In steps, and half a step lower, so that levels are whole numbers; each row of a factor by its diagonal entry.
    w = torch.nn.functional.pad(x / step[:, None] - 0.5, (0, blocks * size - length))
    w = w.view(rows, blocks, size).permute(2, 1, 0).contiguous()
    factors = factors / factors.diagonal(dim1=1, dim2=2)[..., None]
    factors = factors.permute(1, 2, 0).unsqueeze(-1)  # (size, size, blocks, 1)
    levels, low, high = torch.empty_like(w), -half, half - 1
    for j in range(size):
        torch.round(w[j], out=levels[j]).clamp_(low, high)
        w[j + 1 :].addcmul_(factors[j, j + 1 :], levels[j] - w[j])
    levels = levels.permute(2, 1, 0).reshape(rows, -1)[:, :length].contiguous()
    return Quantized((levels + half[:, None]).to(torch.int32), (levels + 0.5) * step[:, None], step)


def quantize_vectors_with_feedback(x: Tensor, second_moment: Tensor, bits: Tensor, group_size: int = 0) -> Quantized:
    """GPTQ over whole vectors: round the rows of x (rank, length) one after the other.

    The rows are what the inner products of second moment (rank, rank) are multiplied with; each row's error is made
    good by the rows after it. Steps and ranges are fitted to a row as it stands when it is reached.
    """
    rows: list[Quantized] = []

    def round_column(w: Tensor, k: int) -> Tensor:
        rows.append(quantize_rows(w[k : k + 1], bits[k : k + 1], group_size))
        return rows[-1].values[0]

    feed_back(x.T, inverse_factor(second_moment), round_column, FEEDBACK_BLOCK)
    codes, values, step = (torch.cat(parts) for parts in zip(*((r.codes, r.values, r.step) for r in rows), strict=True))
    result = Quantized(codes, values, step)
    if group_size:
        ranges = [row.ranges for row in rows if row.ranges is not None]
        result.ranges = Ranges(torch.cat([r.scale for r in ranges]), torch.cat([r.zero for r in ranges]))
    return result


def fit_scale(values: Tensor, target: Tensor, scale: Scale) -> Tensor:
    """One factor a row, (rows,), that turns values (rows, length) into the estimate of target (rows, length).

    `least-squares` minimizes the squared error, which shrinks the estimate. `unbiased` makes the estimate's inner
    product with the target that of the target with itself, so that the error is noise orthogonal to the target
    (measured in docs/experiments.md). `minmax` leaves the values as they are.
    """
    if scale == "minmax":
        return torch.ones_like(target[:, 0])
    product = (values * target).sum(1)
    if scale == "unbiased":
        return torch.where(product > 0, target.square().sum(1) / product, 0.0)
    return product / values.square().sum(1).clamp_min_(1e-30)


def midrise(x: Tensor, step: Tensor, bits: Tensor) -> Tensor:
    """Nearest codes (int32) of x; step and bits broadcast."""
    half = (2 ** (bits - 1)).to(x.dtype)
    codes = (x / step).floor_().add_(half)
    return torch.clamp_(codes, min=torch.zeros_like(half), max=2 * half - 1).to(torch.int32)


def midrise_values(codes: Tensor, step: Tensor, bits: Tensor) -> Tensor:
    """The values of mid-rise codes."""
    return (codes - (2**bits - 1) / 2) * step


def affine(x: Tensor, scale: Tensor, zero: Tensor, bits: Tensor) -> Tensor:
    """Nearest codes (int32) of x under scales and zero points that broadcast."""
    codes = (x / scale).round_().add_(zero)
    return torch.clamp_(codes, min=torch.zeros_like(zero), max=(2**bits - 1).to(x.dtype)).to(torch.int32)


def minmax(x: Tensor, bits: Tensor) -> Ranges:
    """The ranges of x (rows, groups, entries) by group, zero always being in range."""
    low, high = x.amin(-1).clamp_max_(0), x.amax(-1).clamp_min_(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min_(SMALLEST_SCALE).to(torch.float16).to(x.dtype)
    zero = torch.clamp((-low / scale).round_(), max=(2**bits - 1).to(x.dtype))
    return Ranges(scale, zero)


def fit_steps(x: Tensor, bits: Tensor) -> Tensor:
    """The step of each row of x (rows, length) whose code points most nearly in the row's direction; (rows, 1).

    The direction is all that counts, since a scale is fitted afterwards. The search goes from below the normal
    distribution's optimum to the step that clips nothing, so that heavy-tailed rows find theirs too.
    """
    return torch.cat(
        [_fit_steps(rows, widths) for rows, widths in zip(x.split(ROWS_AT_ONCE), bits.split(ROWS_AT_ONCE), strict=True)]
    )


def _fit_steps(x: Tensor, bits: Tensor) -> Tensor:
    normal = torch.tensor([NORMAL_STEP[b] for b in bits[:, 0].tolist()], device=x.device)[:, None]
    usual = normal * x.square().mean(1, keepdim=True).sqrt_().clamp_min_(1e-30)
    widest = x.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
    low, high = torch.minimum(0.7 * usual, widest), torch.maximum(1.3 * usual, widest)
    best, best_cosine = usual, torch.full_like(usual, -1.0)
    half = 2.0 ** (bits - 1)
    for i in range(STEPS_TRIED):
        step = low * (high / low) ** (i / (STEPS_TRIED - 1))
        levels = (x / step).floor_().clamp_(-half, half - 1).add_(0.5)
        cosine = (levels * x).sum(1, keepdim=True) / levels.square_().sum(1, keepdim=True).sqrt_()
        better = cosine > best_cosine
        best, best_cosine = torch.where(better, step, best), torch.where(better, cosine, best_cosine)
    return best


def feed_back(x: Tensor, factor: Tensor, round_column: Callable[[Tensor, int], Tensor], block: int) -> None:
    """GPTQ's loop: round the columns of x (rows, columns) in order, spreading each one's error over those after it.

    factor: (columns, columns), the upper Cholesky factor of the second moment's inverse.
    round_column: gets the transposed matrix (columns, rows) with earlier errors fed back, up to the end of the block
        of columns that j is in, and j; returns the rounded column j, (rows,).
    """
    factor = factor.to(x.dtype)
    inverses = factor.diagonal().reciprocal().tolist()
    w = x.T.clone(memory_format=torch.contiguous_format)
    columns = len(w)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = w.new_empty(end - start, w.shape[1])
        for j in range(start, end):
            error = errors[j - start]
            torch.sub(w[j], round_column(w, j), out=error).mul_(inverses[j])
            w[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)


def inverse_factor(second_moment: Tensor) -> Tensor:
    """Upper Cholesky factor, float64, of the inverse of a second moment (n, n), damped until it is positive."""
    moment = second_moment.double()
    moment = moment / moment.diagonal().mean().clamp_min(1e-300)
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    damping = DAMPING
    while True:
        lower, failed = torch.linalg.cholesky_ex(moment + damping * identity)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        damping *= 10
