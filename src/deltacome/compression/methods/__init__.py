"""Compression methods by name. A method turns one matrix into terms; to add one, write a file and list it here."""

from dataclasses import asdict, fields
from typing import Any

from deltacome.compression.methods.bitdelta import BitDelta
from deltacome.compression.methods.delta_come import DeltaCome
from deltacome.compression.methods.lossless import Lossless
from deltacome.compression.methods.low_rank import LowRank
from deltacome.compression.methods.method import CodesBits as CodesBits
from deltacome.compression.methods.method import MatrixDelta as MatrixDelta
from deltacome.compression.methods.method import Method as Method
from deltacome.compression.methods.method import SharesByError as SharesByError
from deltacome.compression.methods.rate_distortion import RateDistortion
from deltacome.errors import DeltacomeError

DEFAULT_METHOD = "rate-distortion"
METHODS: dict[str, type] = {
    "rate-distortion": RateDistortion,
    "delta-come": DeltaCome,
    "low-rank": LowRank,
    "bitdelta": BitDelta,
    "lossless": Lossless,
}


def make_method(name: str, **settings: Any) -> Method:
    """The method `name`; settings that are None keep the method's default.

    Raises:
        DeltacomeError: if there is no such method, or a setting is not one of its own.
    """
    if name not in METHODS:
        raise DeltacomeError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")
    given = {key: value for key, value in settings.items() if value is not None}
    known = {field.name for field in fields(METHODS[name])}
    for key in given.keys() - known:
        raise DeltacomeError(f"method {name} has no setting {key.replace('_', '-')}; leave it out")
    return METHODS[name](**given)


def describe(name: str, method: Method) -> dict[str, Any]:
    """Name and settings of a method, as the artifact records them."""
    settings = asdict(method)  # type: ignore[call-overload]
    if isinstance(method, DeltaCome):
        settings["group_size"] = method.groups  # the default is written down as what it comes to
    return {"name": name, **settings}
