"""OpenTelemetry: a span a request, where an endpoint for them is set."""

import os
import time
from collections.abc import Mapping
from typing import Any

from deltacome.errors import DeltacomeError
from deltacome.version import __version__

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Traces:
    """Spans of requests, sent as OpenTelemetry's SDK is told by its variables; none without an endpoint.

    exporter: to send them by instead.

    Raises:
        DeltacomeError: if an endpoint is set, and OpenTelemetry is not installed.
    """

    def __init__(self, exporter: Any = None) -> None:
        self._provider: Any = None
        name = next((name for name in ENDPOINTS if os.environ.get(name)), None)
        if exporter is None and name is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise DeltacomeError(
                f"{name} is set, and spans need OpenTelemetry: pip install 'deltacome[otel]', or unset it"
            ) from error
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "deltacome")})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))

    def add(self, name: str, seconds: float, attributes: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """A span that ends now.

        Args:
            seconds: since it began.
            attributes: those that are None are left out.
            headers: of the request, where `traceparent` may name the span that this one belongs to.
        """
        if self._provider is None:
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.time_ns()
        span = self._provider.get_tracer("deltacome", __version__).start_span(
            name,
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            {key: value for key, value in attributes.items() if value is not None},
            start_time=end - round(1e9 * seconds),
        )
        span.end(end)

    def stop(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
