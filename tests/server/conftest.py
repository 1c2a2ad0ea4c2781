"""A real server on the reference model, on a free port, in a thread beside the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from quantkit.runtime.engine import Engine
from quantkit.runtime.engine_thread import EngineThread
from quantkit.runtime.options import EngineOptions
from quantkit.server.app import create_app
from quantkit.server.listen import Server, open_socket, url_of

SMALL = {"mode": "exact", "kv_cache_memory": 8 << 20}
SECONDS = 20


@dataclass(slots=True)
class Running:
    url: str
    thread: EngineThread
    server: Server
    openai: openai.OpenAI
    http: httpx.Client

    @property
    def engine(self) -> Engine:
        return self.thread.engine

    def metrics(self) -> dict[tuple[str, str], float]:
        """Samples by name and finished_reason, where they have one."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {(s.name.removeprefix("quantkit:"), s.labels.get("finished_reason", "")): s.value for f in families for s in f.samples}


@contextmanager
def running(**options: Any) -> Iterator[Running]:
    thread = EngineThread(Engine("reference", EngineOptions(**SMALL | options)))
    is_ready = threading.Event()
    with open_socket("127.0.0.1", 0) as listener:
        server = Server(create_app(thread, ["reference", "other/name"]), thread, shutdown_timeout=5, ready=is_ready.set)
        serving = threading.Thread(target=server.run, args=([listener],))
        serving.start()
        try:
            assert is_ready.wait(SECONDS)
            url = url_of(listener)
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client, httpx.Client(base_url=url, timeout=SECONDS) as http:
                yield Running(url, thread, server, client, http)
        finally:
            server.end()
            serving.join()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    with running() as it:
        yield it


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)
