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
from deltacome.errors import DeltacomeError
from deltacome.memory import is_out_of_memory
from deltacome.progress import bar
from deltacome.weights import is_embedding

# What transformers and torch raise where they cannot build a model or run it as it lies: methods can do without. A full
# memory or a disk that fails is no reason to go on in another way, for the same command may not meet it again.
UNFIT = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
SMALLEST_OUTPUT = 1e-3  # energy, for inputs of energy 1; layers that are all zero have none


def measure_energies(
    finetuned: Checkpoint,
    matrices: Sequence[Pair],
    calibration: CalibrationStream | None,
    store: Store,
    warn: Callable[[str], None],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Energies and sensitivities of matrices by name, as `MatrixDelta` has them.

    Measured by random tokens, and in equal parts by the calibration data, if there are any; only once a run, however
    often that is killed.
    """
    measured = store.load_intermediate("energies")
    if measured is None:
        measured = _measured_energies(finetuned, matrices, calibration, warn)
        store.save_intermediate("energies", measured)
    elif not measured and matrices:
        warn("the inputs of the layers could not be measured when the interrupted run began, so all count alike")
    energies, sensitivities = {}, {}
    sizes = {p.name: torch.Size(p.shape).numel() for p in matrices}
    weighted = total = 0.0
    for name, found in sorted(measured.items()):  # in one order, or the sums differ in the last bit
        energies[name] = found[:-1]
        sensitivities[name] = 1 / max(float(found[-1]), SMALLEST_OUTPUT)
        weighted, total = weighted + sizes[name] * math.log(sensitivities[name]), total + sizes[name]
    for name in measured:
        sensitivities[name] /= math.exp(weighted / total)
    return energies, sensitivities


def _measured_energies(
    finetuned: Checkpoint,
    matrices: Sequence[Pair],
    calibration: CalibrationStream | None,
    warn: Callable[[str], None],
) -> dict[str, Tensor]:
    """Energies by matrix as `CalibrationStream.energies` has them, scaled to a mean of 1 over the inputs."""
    sizes = {p.name: torch.Size(p.shape).numel() for p in matrices if not is_embedding(p.name)}
    measured = []
    with bar("measuring inputs", (2 if calibration else 1) * sum(sizes.values())) as advance:
        try:
            stream = _random_stream(finetuned)
            measured.append(stream.energies(sizes.__contains__, finetuned.read_float, advance))
        except UNFIT as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0].split(";")[0] if str(error) else type(error).__name__
            warn(f"the inputs of the layers could not be measured, so all count alike: {reason}")
        if calibration is not None:
            measured.append(calibration.energies(sizes.__contains__, finetuned.read_float, advance))
    merged: dict[str, Tensor] = {}
    for name in sizes.keys() & set().union(*measured):
        found = [energies[name] for energies in measured if name in energies]
        mean = torch.stack([x / x[:-1].mean().clamp_min(1e-30) for x in found]).mean(0)
        if torch.isfinite(mean).all():  # not so if the model overflows; then this layer's inputs count alike
            merged[name] = mean
    return merged


def _random_stream(finetuned: Checkpoint) -> CalibrationStream:
    try:
        return CalibrationStream(finetuned, *random_tokens(finetuned))
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
