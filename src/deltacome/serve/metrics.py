"""Prometheus metrics of a server."""

from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STATUSES = ("ok", "rejected", "cancelled", "deadline", "failed", "too_complex")  # of requests that ended
UNLOADED = "(unloaded)"  # in the place of the name of a model that is not there any more


class Metrics:
    """`tenant` is the model that was asked for, the base's name included.

    Only models that are there have series of their own, so that there are no more of these than of models.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        tenant = ["tenant"]
        self.requests = Counter("deltacome_requests", "Requests that ended.", ["tenant", "status"], registry=own)
        self.prompt_tokens = Counter("deltacome_prompt_tokens", "Tokens of prompts.", tenant, registry=own)
        self.recalled_tokens = Counter(
            "deltacome_cached_prompt_tokens", "Tokens of prompts found in the prefix cache.", tenant, registry=own
        )
        self.tokens = Counter("deltacome_tokens", "Tokens generated.", tenant, registry=own)
        self.queue = Gauge("deltacome_queue_sequences", "Sequences that wait for a place in the batch.", registry=own)
        self.rows = Gauge("deltacome_batch_rows", "Sequences in the running batch.", registry=own)
        self.tenants = Gauge("deltacome_batch_tenants", "Different tenants in the running batch.", registry=own)
        self.cache = Gauge("deltacome_cache_tokens", "Positions of the batch's cache, padding counted.", registry=own)
        self.prefixes = Gauge("deltacome_prefix_cache_tokens", "Tokens kept for later prompts.", registry=own)
        self.steps = Histogram(
            "deltacome_step_rows", "Rows of each step.", buckets=[2**i for i in range(9)], registry=own
        )
        self.first_token_seconds = Histogram(
            "deltacome_time_to_first_token_seconds",
            "From request to first token.",
            tenant,
            buckets=SECONDS,
            registry=own,
        )
        self.seconds_per_token = Histogram(
            "deltacome_time_per_token_seconds",
            "Between tokens of an answer, mean.",
            tenant,
            buckets=SECONDS,
            registry=own,
        )
        self.delta_bytes = Gauge(
            "deltacome_delta_bytes", "Bytes of a delta in memory, 0 when it is not.", tenant, registry=own
        )
        self.memory = Gauge("deltacome_memory_bytes", "Bytes that deltas have in memory, all of them.", registry=own)
        self.memory_limit = Gauge(
            "deltacome_memory_limit_bytes", "Bytes that deltas may have there, 0 without a limit.", registry=own
        )
        self.loads = Counter("deltacome_delta_loads", "Deltas read from disk.", tenant, registry=own)
        self.evictions = Counter("deltacome_delta_evictions", "Deltas dropped for room.", tenant, registry=own)
        self._names: set[str] = set()

    def add(self, name: str) -> None:
        """A model is there."""
        self._names.add(name)

    def remove(self, name: str) -> None:
        """A model is not there any more, and so are its series."""
        self._names.discard(name)
        for status in STATUSES:
            with suppress(KeyError):  # nothing was counted
                self.requests.remove(name, status)
        counted = (self.prompt_tokens, self.recalled_tokens, self.tokens, self.delta_bytes, self.loads, self.evictions)
        for metric in (*counted, self.first_token_seconds, self.seconds_per_token):
            with suppress(KeyError):
                metric.remove(name)

    def label(self, name: str) -> str:
        """The label for what is counted of a model, which may have gone while it happened."""
        return name if name in self._names else UNLOADED

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
