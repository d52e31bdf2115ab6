"""Everything but the answers: the page, health, metrics, the models, and deltas that come and go."""

import asyncio
import logging
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from deltacome.errors import DeltacomeError
from deltacome.serve.folder import resolve
from deltacome.serve.http.errors import ApiError, shutting_down, unknown_model
from deltacome.serve.http.protocol import Health, LoadRequest, Model, Models, UnloadRequest
from deltacome.serve.http.service import MASTER, FromService, Key, Service
from deltacome.serve.registry import BusyNameError, NoRoomError, UnknownModelError

log = logging.getLogger("deltacome.serve")
router = APIRouter()


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> str:
    return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


@router.get("/health")
async def health(service: FromService) -> Health:
    if not service.engine.is_alive:
        raise ApiError(503, "the engine is not running")
    return Health()


@router.get("/ready")
async def ready(service: FromService) -> Health:
    if service.is_draining:
        raise shutting_down()
    return await health(service)


@router.get("/metrics", response_class=PlainTextResponse, dependencies=[MASTER])
async def read_metrics(service: FromService) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def models(service: FromService, key: Key) -> Models:
    return Models(data=[_model(service, name) for name in _names(service) if name in key])


@router.get("/v1/models/{model:path}")
async def model(model: str, service: FromService, key: Key) -> Model:
    if model not in _names(service) or model not in key:
        raise unknown_model(model)
    return _model(service, model)


@router.post("/v1/load_lora_adapter", dependencies=[MASTER], response_class=PlainTextResponse)
async def load_delta(body: LoadRequest, service: FromService) -> str:
    registry = service.registry
    try:
        folder = await asyncio.to_thread(resolve, registry.folder, body.lora_path)
        await registry.load(body.lora_name, folder, replace=bool(body.load_inplace))
    except BusyNameError as error:
        raise ApiError(409, str(error), code="model_is_loading", param="lora_name") from error
    except NoRoomError as error:
        raise ApiError(503, str(error), code="no_room") from error
    except DeltacomeError as error:
        raise ApiError(400, str(error), param="lora_path") from error
    log.info("delta added", extra={"fields": {"tenant": body.lora_name}})
    return f"Success: {body.lora_name} is loaded."


@router.post("/v1/unload_lora_adapter", dependencies=[MASTER], response_class=PlainTextResponse)
async def unload_delta(body: UnloadRequest, service: FromService) -> str:
    try:
        service.registry.remove(body.lora_name)
    except UnknownModelError as error:
        raise ApiError(404, str(error), code="model_not_found", param="lora_name") from error
    except BusyNameError as error:
        raise ApiError(409, str(error), code="model_is_loading", param="lora_name") from error
    log.info("delta removed", extra={"fields": {"tenant": body.lora_name}})
    return f"Success: {body.lora_name} is unloaded."


def _names(service: Service) -> list[str]:
    return [service.registry.name, *sorted(service.registry.deltas)]


def _model(service: Service, name: str) -> Model:
    registry, max_length = service.registry, service.max_length
    full = registry.base_checkpoint.elements * 2
    if name == registry.name:
        return Model(
            id=name, created=registry.created, parent=None, max_model_len=max_length, bytes=full, full_bytes=full,
            loaded=True,
        )  # fmt: skip
    delta = registry.deltas[name]
    return Model(
        id=name, created=delta.created, parent=registry.name, max_model_len=max_length, bytes=delta.size,
        full_bytes=delta.full_bytes, loaded=delta.loaded is not None,
    )  # fmt: skip
