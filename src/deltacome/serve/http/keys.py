"""Who may ask which tenant: keys from the command line and from a file."""

import hmac
import json
from pathlib import Path
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.serve.http.errors import ApiError


class Keys:
    """The API keys of a server: a master key for everything, and keys that each open some models.

    The file is a JSON object of `{"KEY": ["MODEL", ...]}`. Without any key everything is open to everybody.

    Raises:
        DeltacomeError: if the file is missing or not like that.
    """

    def __init__(self, master: str | None, file: Path | None) -> None:
        self.master = master
        self.models: dict[str, frozenset[str]] = {}
        if master is not None and not _is_key(master):
            raise DeltacomeError("the API key is empty or has other than printable ASCII characters; take another")
        if file is None:
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DeltacomeError(f"cannot read the keys in {file}: {error}") from error
        pairs: Any = content.items() if isinstance(content, dict) else [(None, None)]
        for key, models in pairs:
            if not _is_key(key) or not isinstance(models, list) or not all(isinstance(name, str) for name in models):
                raise DeltacomeError(f'{file} must be a JSON object of {{"KEY": ["MODEL", ...]}}, keys in ASCII')
            self.models[key] = frozenset(models)
        if not self.models:
            raise DeltacomeError(f"{file} holds no key; leave the option out to open the server to everybody")

    @property
    def is_open(self) -> bool:
        return self.master is None and not self.models

    def allowed(self, key: str | None) -> "Allowed | None":
        """What a key opens, None if it is nobody's. Takes the same time whatever the key is."""
        if self.is_open:
            return Allowed(None)
        given, found = (key or "").encode(), None
        for known, models in self.models.items():
            if hmac.compare_digest(given, known.encode()):
                found = Allowed(models)
        if self.master is not None and hmac.compare_digest(given, self.master.encode()):
            found = Allowed(None)
        return found


def no_valid_key() -> ApiError:
    """The same for a key that is wrong and for one that is not there."""
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, "no valid API key was given", code="invalid_api_key", headers=headers)


def _is_key(key: Any) -> bool:
    """Whether it can be sent in a header."""
    return isinstance(key, str) and key != "" and key.isascii() and key.isprintable()


class Allowed:
    """What a key opens: some models by name, or for None everything."""

    def __init__(self, models: frozenset[str] | None) -> None:
        self._models = models

    @property
    def is_everything(self) -> bool:
        return self._models is None

    def __contains__(self, model: str) -> bool:
        return self._models is None or model in self._models
