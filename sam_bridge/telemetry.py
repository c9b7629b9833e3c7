"""What a side-car tells about itself: Prometheus metrics over HTTP, and logs as lines of text or JSON."""

import hmac
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sam_bridge.security import check_address, is_loopback

LOG_FORMATS = ("text", "json")
GAUGES = ("image_bytes", "logits_bytes", "waiting")  # the other counts of a side-car only grow
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class BridgeMetrics:
    """`registry` has `sam_bridge_calls_total{rpc,status}`, `sam_bridge_seconds{rpc,stage}`, and a `sam_bridge_<name>`
    for each of `counts()`."""

    def __init__(self, counts: Callable[[], dict[str, float]] = dict):
        self.registry = prometheus_client.CollectorRegistry()
        self._counts = counts
        self._calls = prometheus_client.Counter(
            "sam_bridge_calls", "Calls by outcome", ["rpc", "status"], registry=self.registry
        )
        self._seconds = prometheus_client.Histogram(
            "sam_bridge_seconds", "Seconds by stage", ["rpc", "stage"], registry=self.registry, buckets=BUCKETS_S
        )
        self.registry.register(self)

    def called(self, rpc: str, status: str, timings_s: dict[str, float]) -> None:
        """One call ended: `status` is "ok" or the reason of its failure."""
        self._calls.labels(rpc, status).inc()
        for stage, seconds in timings_s.items():
            self._seconds.labels(rpc, stage).observe(seconds)

    def collect(self) -> Iterable:
        """Asked by the registry at every scrape."""
        for name, value in self._counts().items():
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            yield family(f"sam_bridge_{name}", name.replace("_", " "), value=value)


def serve_metrics(address: str, registry: Any, *, token: str, tls_cert: str, tls_key: str, insecure: bool) -> None:
    """Answers Prometheus at host:port, on a daemon thread: plainly on loopback, elsewhere over TLS and to who shows the
    token, as the calls are (sam_bridge/security.py). SetupError for an address that cannot be listened on, or is open
    to other machines without both, unless `insecure`."""
    check_address(address, token=token, tls=bool(tls_cert), insecure=insecure)
    exposed, (host, _, port) = not is_loopback(address), address.rpartition(":")
    tls = dict(certfile=tls_cert, keyfile=tls_key) if exposed else {}
    server, _ = prometheus_client.start_http_server(int(port), host.strip("[]"), registry, **tls)
    page, expected = server.get_app(), f"Bearer {token}".encode()

    def guarded(environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        if hmac.compare_digest(environ.get("HTTP_AUTHORIZATION", "").encode(), expected):
            return page(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
        return [b"the token is missing or wrong\n"]

    if exposed and token:
        server.set_app(guarded)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message; and what `extra={"fields": {…}}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logs(form: str) -> None:
    """Everything from INFO on to stderr, as `form` (one of LOG_FORMATS) says."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s sam_bridge %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
