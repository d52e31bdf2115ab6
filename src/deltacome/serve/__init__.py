"""The embedded server: OpenAI's API over many tenants in one running batch."""

from importlib.util import find_spec

from deltacome.errors import DeltacomeError


def check_installed() -> None:
    """See that the packages are there that only the server needs.

    Raises:
        DeltacomeError: if one is missing.
    """
    if any(find_spec(name) is None for name in ("fastapi", "llguidance", "prometheus_client", "pydantic", "uvicorn")):
        raise DeltacomeError("deltacome serve needs FastAPI, uvicorn and llguidance; pip install 'deltacome[serve]'")
