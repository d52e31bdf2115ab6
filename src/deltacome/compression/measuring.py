"""What is measured before the bytes are shared out: the layers' inputs, and the matrices' singular values."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deltacome.checkpoints.checkpoint import Checkpoint
from deltacome.checkpoints.pairing import Pair
from deltacome.compression.allocation import Spectrum, spectra_of_tensors
from deltacome.compression.calibration import CalibrationStream, random_tokens
from deltacome.compression.executors import Executor
from deltacome.compression.journal import Store
from deltacome.compression.matrices import Matrices
from deltacome.compression.sensitivity import measure_sensitivities
from deltacome.device import CPU
from deltacome.errors import DeltacomeError
from deltacome.memory import is_out_of_memory
from deltacome.progress import bar
from deltacome.weights import is_embedding

# What transformers and torch raise where they cannot build a model or run it as it lies: methods can do without. A full
# memory or a disk that fails is no reason to go on in another way, for the same command may not meet it again.
UNFIT = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
# Of the random tokens' sequences those that gradients are measured with, sensitivities being one number a matrix; and
# all that is measured of a model without experts, each of which gets some of the tokens only.
SEQUENCES = 8


def measure_inputs(
    finetuned: Checkpoint,
    matrices: Sequence[Pair],
    calibration: CalibrationStream | None,
    store: Store,
    warn: Callable[[str], None],
    device: torch.device = CPU,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of matrices by name energies and means together, (2, n), and sensitivities, as `MatrixDelta` has them.

    Measured by random tokens, the former in equal parts by the calibration data, if there are any; only once a run,
    however often that is killed, and for however many ratios.
    """
    stored = store.load_intermediate("inputs")
    if stored is None:
        inputs, sensitivities = measure(finetuned, matrices, calibration, warn, device)
        kept = {f"inputs {name}": found for name, found in inputs.items()}
        for name, value in sensitivities.items():
            kept[f"sensitivity {name}"] = torch.tensor(value, dtype=torch.float64)  # to the last bit
        store.save_intermediate("inputs", kept)
        return inputs, sensitivities
    if matrices and not any(name.startswith("inputs ") for name in stored):
        warn("the inputs of the layers could not be measured at the first go, so linears count alike")
    return (
        {name.removeprefix("inputs "): found for name, found in stored.items() if name.startswith("inputs ")},
        {
            name.removeprefix("sensitivity "): float(found)
            for name, found in stored.items()
            if name.startswith("sensitivity ")
        },
    )


def measure(
    finetuned: Checkpoint,
    matrices: Sequence[Pair],
    calibration: CalibrationStream | None,
    warn: Callable[[str], None],
    device: torch.device = CPU,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What `measure_inputs` gives, with nothing stored; nothing of what cannot be measured."""
    sizes = {p.name: torch.Size(p.shape).numel() for p in matrices if not is_embedding(p.name)}
    inputs: list[dict[str, Tensor]] = []
    sensitivities: dict[str, float] = {}
    with bar("measuring inputs", (3 if calibration else 2) * sum(sizes.values())) as advance:
        try:
            stream = _random_stream(finetuned, device)
            inputs.append({})
            found = measure_sensitivities(stream, finetuned.read_float, advance, SEQUENCES, inputs[0])
            sensitivities = _relative(found, sizes)
        except UNFIT as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0].split(";")[0] if str(error) else type(error).__name__
            warn(
                f"what errors of the weights cost could not be measured, so linears count alike: {reason}"
                if any(inputs)
                else f"the inputs of the layers could not be measured, so linears count alike: {reason}"
            )
        if calibration is not None:
            inputs.append(calibration.inputs(sizes.__contains__, finetuned.read_float, advance))
    merged: dict[str, Tensor] = {}
    for name in sorted(sizes.keys() & set().union(*inputs)):
        each = [own[name] for own in inputs if name in own]
        size = torch.tensor([1.0, 0.5])  # powers of the energy's unit
        mean = torch.stack([x / x[0].mean().clamp_min(1e-30).cpu().pow(size)[:, None].to(x) for x in each]).mean(0)
        if torch.isfinite(mean).all():  # not so if the model overflows; then this layer's inputs count alike
            merged[name] = mean.cpu()
    return merged, sensitivities


def _relative(sensitivities: dict[str, float], sizes: dict[str, int]) -> dict[str, float]:
    """Sensitivities with a geometric mean of 1 over the linears' entries; those that are not positive are left out."""
    known = {name: value for name, value in sensitivities.items() if 0 < value < math.inf}
    logs = [(size, math.log(known[name])) for name, size in sizes.items() if name in known]
    if not logs:
        return {}
    mean = math.exp(sum(size * log for size, log in logs) / sum(size for size, _ in logs))
    return {name: value / mean for name, value in known.items()}


def _random_stream(finetuned: Checkpoint, device: torch.device) -> CalibrationStream:
    try:
        stream = CalibrationStream(finetuned, *random_tokens(finetuned), device)
        if not stream.sources.experts:
            stream.ids, stream.mask = stream.ids[:SEQUENCES], stream.mask[:SEQUENCES]
        return stream
    except DeltacomeError as error:  # those of the run that follows are about files that cannot be read
        raise ValueError(str(error)) from error


def measure_spectra(work: Matrices, matrices: Sequence[Pair], executor: Executor) -> Mapping[str, list[Spectrum]]:
    """What sharing out the bits by errors needs to know of each matrix, those without a delta left out."""
    tensors = {p.name: work.store.load_intermediate(f"spectra of {p.name}") for p in matrices}
    left = [name for name, found in tensors.items() if found is None]
    sizes = {p.name: torch.Size(p.shape).numel() for p in matrices}
    with bar("singular values", sum(sizes[name] for name in left)) as advance:
        for name in executor.each(Matrices.measure, work, left):
            tensors[name] = work.store.load_intermediate(f"spectra of {name}")
            advance(sizes[name])
    return {name: spectra_of_tensors(found) for name, found in tensors.items() if found}
