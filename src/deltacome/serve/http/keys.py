"""Who may ask which tenant: keys from the command line and from a file."""

import hmac
import json
from pathlib import Path
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.serve.http.errors import ApiError


class Keys:
    """The API keys of a server: a master key for everything, and keys that each open some models.

    The file is a JSON object of `{"KEY": ["MODEL", ...]}`, or, for a key that may have so many requests at once,
    `{"KEY": {"models": ["MODEL", ...], "max_parallel_requests": N}}`. Without any key everything is open to everybody.

    Raises:
        DeltacomeError: if the file is missing or not like that.
    """

    def __init__(self, master: str | None, file: Path | None) -> None:
        self.master, self._everything = master, Allowed(None)
        self._known: dict[str, Allowed] = {}
        if master is not None and not _is_key(master):
            raise DeltacomeError("the API key is empty or has other than printable ASCII characters; take another")
        if file is None:
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DeltacomeError(f"cannot read the keys in {file}: {error}") from error
        pairs: Any = content.items() if isinstance(content, dict) else [(None, None)]
        for key, value in pairs:
            allowed = _parse(value)
            if not _is_key(key) or allowed is None:
                raise DeltacomeError(
                    f'{file} must be a JSON object of {{"KEY": ["MODEL", ...]}} or '
                    '{"KEY": {"models": ["MODEL", ...], "max_parallel_requests": N}}, keys in ASCII'
                )
            self._known[key] = allowed
        if not self._known:
            raise DeltacomeError(f"{file} holds no key; leave the option out to open the server to everybody")

    @property
    def is_open(self) -> bool:
        return self.master is None and not self._known

    def allowed(self, key: str | None) -> "Allowed | None":
        """What a key opens, None if it is nobody's. Takes the same time whatever the key is."""
        if self.is_open:
            return self._everything
        given, found = (key or "").encode(), None
        for known, allowed in self._known.items():
            if hmac.compare_digest(given, known.encode()):
                found = allowed
        if self.master is not None and hmac.compare_digest(given, self.master.encode()):
            found = self._everything
        return found


def no_valid_key() -> ApiError:
    """The same for a key that is wrong and for one that is not there."""
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, "no valid API key was given", code="invalid_api_key", headers=headers)


def _is_key(key: Any) -> bool:
    """Whether it can be sent in a header."""
    return isinstance(key, str) and key != "" and key.isascii() and key.isprintable()


def _parse(value: Any) -> "Allowed | None":
    """What the file says of a key, None if that makes no sense."""
    fields: dict[str, Any] = {"models": value} if isinstance(value, list) else value
    if not isinstance(fields, dict) or fields.keys() - {"models", "max_parallel_requests"}:
        return None
    models, most = fields.get("models"), fields.get("max_parallel_requests")
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        return None
    if most is not None and (type(most) is not int or most < 1):
        return None
    return Allowed(frozenset(models), most)


class Allowed:
    """What a key opens: some models by name, or for None everything, and requests that it may have at once."""

    def __init__(self, models: frozenset[str] | None, most: int | None = None) -> None:
        self._models, self.most, self.running = models, most, 0

    def begin(self) -> bool:
        """Count a request; False if there are as many as there may be."""
        if self.most is not None and self.running >= self.most:
            return False
        self.running += 1
        return True

    def end(self) -> None:
        """Of a request that was counted."""
        self.running -= 1

    @property
    def is_everything(self) -> bool:
        return self._models is None

    def __contains__(self, model: str) -> bool:
        return self._models is None or model in self._models
