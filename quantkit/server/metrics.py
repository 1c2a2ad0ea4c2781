"""What Prometheus reads. Names are vLLM's with `quantkit:` before them, so that its dashboards need one replacement.

Counters of the engine are read from its state when they are asked for; times are taken where the server sees the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quantkit.runtime.engine_thread import EngineThread

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_GAUGES = {
    "num_requests_running": ("Sequences that hold blocks of the cache.", "num_running"),
    "num_requests_waiting": ("Sequences that wait for their turn.", "num_waiting"),
    "kv_cache_usage_perc": ("Share of the KV cache's blocks in use, 0 to 1.", "cache_usage"),
}
_COUNTERS = {
    "prompt_tokens": ("Tokens of prompts taken in.", "num_prompt_tokens"),
    "generation_tokens": ("Tokens generated.", "num_generated_tokens"),
    "prefix_cache_queries": ("Tokens of prompts that were looked for in the prefix cache.", "num_prompt_tokens"),
    "prefix_cache_hits": ("Tokens of prompts that were found in it.", "num_cached_tokens"),
    "num_preemptions": ("Sequences that lost their blocks and were computed again.", "num_preemptions"),
    "corrupted_requests": ("Continuations that failed by logits that were not finite.", "num_not_finite"),
    "spec_decode_num_draft_tokens": ("Tokens that were guessed ahead.", "num_drafted"),
    "spec_decode_num_accepted_tokens": ("Guessed tokens that held.", "num_accepted"),
}


class Metrics:
    """One registry for one engine.

    Attributes:
        finished: continuations by how they ended: stop, length, error, or abort for those that were given up.
    """

    def __init__(self, engine: EngineThread, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine, model_name))
        finished = Counter("quantkit:request_success", "Continuations that ended.", ["model_name", "finished_reason"], registry=self.registry)
        self.finished = {reason: finished.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}
        self._model_name = model_name
        self.first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token.", _FIRST_TOKEN)
        self.inter_token = self._histogram("inter_token_latency_seconds", "From token to token of a continuation.", _TOKEN)
        self.per_token = self._histogram("request_time_per_output_token_seconds", "Mean time of a continuation's tokens after the first.", _TOKEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "From the request to a continuation's end.", _WHOLE)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"quantkit:{name}", what, ["model_name"], buckets=buckets, registry=self.registry).labels(self._model_name)


class _OfEngine(Collector):
    """The engine's own numbers, after its last step."""

    def __init__(self, engine: EngineThread, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name

    def collect(self) -> Iterable[Metric]:
        state = self._engine.state
        for families, kind in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for name, (what, attribute) in families.items():
                family = kind(f"quantkit:{name}", what, labels=["model_name"])
                family.add_metric([self._model_name], getattr(state, attribute))
                yield family
