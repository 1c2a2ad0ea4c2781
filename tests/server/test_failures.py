"""Clients that go, queues that fill, engines that die, servers that end: nobody waits in vain and nothing is held."""

from __future__ import annotations

import ctypes
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.server.conftest import SECONDS, Running, running, until

LONG = {"model": "reference", "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


def idle(server: Running) -> bool:
    return server.thread.state.num_running == server.thread.state.num_waiting == 0 and server.engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream_frees_its_blocks(n: int, server: Running) -> None:
    before = server.metrics()[("request_success_total", "abort")]
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": n}) as response:
        lines = response.iter_lines()  # httpx closes the connection when nobody holds them
        next(lines)
        assert server.thread.state.num_running > 0

    until(lambda: idle(server))
    until(lambda: server.metrics()[("request_success_total", "abort")] == before + n)
    assert not server.engine._requests and not server.thread._open and not server.thread._stream_of


def test_a_client_that_gives_up_waiting_frees_its_blocks(server: Running) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=LONG, timeout=0.5)

    until(lambda: idle(server))
    assert not server.engine._requests


def test_clients_that_leave_the_queue_leave_nothing_behind() -> None:
    with running(max_sequences=4) as server:
        with ThreadPoolExecutor(6) as pool:
            def leave(_: int) -> None:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{server.url}/v1/completions", json=LONG | {"n": 3}, timeout=0.8)

            list(pool.map(leave, range(6)))

        until(lambda: idle(server))
        assert not server.engine._requests and not server.engine._request_of
        assert server.openai.completions.create(model="reference", prompt="a", max_tokens=2).usage.completion_tokens <= 2


def test_a_full_queue_is_said_at_once() -> None:
    with running(max_sequences=1, max_waiting=1) as server, ThreadPoolExecutor(1) as pool:
        with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()  # httpx closes the connection when nobody holds them
            next(lines)
            waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG | {"max_tokens": 2}, timeout=SECONDS)
            until(lambda: server.thread.state.num_waiting == 1)

            refused = server.http.post("/v1/completions", json=LONG)

            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert "requests are waiting already" in refused.json()["error"]["message"]
        assert waiting.result().status_code == 200


def test_one_prompt_refused_is_all_refused(server: Running) -> None:
    response = server.http.post("/v1/completions", json=LONG | {"prompt": [[5], [6], [4096]]})

    assert response.status_code == 400
    until(lambda: idle(server))
    assert not server.engine._requests


def test_logits_that_are_not_finite_fail_that_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = server.engine.runner.forward

    def poisoned(batch: Any) -> Any:
        logits, wanted = forward(batch)
        for each in wanted:
            if each.piece.sequence.tokens[0] == 77:
                logits = logits.clone()
                logits[each.rows] = torch.nan
        return logits, wanted

    monkeypatch.setattr(server.engine.runner, "forward", poisoned)
    with pytest.raises(openai.InternalServerError, match="not finite"):
        server.openai.completions.create(model="reference", prompt=[77, 5], n=2)
    with pytest.raises(openai.APIError, match="not finite"):
        list(server.openai.completions.create(model="reference", prompt=[77, 5], stream=True))
    assert server.openai.completions.create(model="reference", prompt=[78], max_tokens=2).choices
    assert server.metrics()[("corrupted_requests_total", "")] >= 3


def broken_step(server: Running) -> str:
    def fail(batch: Any) -> Any:
        raise RuntimeError("out of luck")

    server.engine.runner.forward = fail
    return "out of luck"


def killed_thread(server: Running) -> str:
    ident = ctypes.c_ulong(server.thread._thread.ident or 0)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit)) == 1
    return "SystemExit"


@pytest.mark.parametrize("kill", [broken_step, killed_thread])
def test_an_engine_that_dies_fails_every_caller_and_says_so(kill: Any) -> None:
    with running(max_sequences=3) as server, ThreadPoolExecutor(8) as pool:
        def stream() -> str:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}, timeout=SECONDS) as response:
                return [line for line in response.iter_lines() if line][-2]

        streams = [pool.submit(stream) for _ in range(2)]
        posts = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=SECONDS) for _ in range(4)]
        until(lambda: server.thread.state.num_running == 3 and server.thread.state.num_waiting == 3)

        why = kill(server)

        bodies = [json.loads(s.result().removeprefix("data: ")) for s in streams] + [p.result().json() for p in posts]
        assert all(why in body["error"]["message"] and body["error"]["code"] == "engine_dead" for body in bodies)
        assert all(p.result().status_code == 503 for p in posts)
        for response in (server.http.get("/health"), server.http.post("/v1/completions", json=LONG)):
            assert response.status_code == 503 and why in response.json()["error"]["message"]
        assert server.http.get("/metrics").status_code == 200


def test_a_server_that_ends_finishes_what_runs_and_refuses_what_comes() -> None:
    with running() as server, ThreadPoolExecutor(1) as pool:
        going = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG | {"max_tokens": 60}, timeout=SECONDS)
        until(lambda: server.thread.state.num_running == 1)

        server.server.end()
        until(lambda: server.thread.is_draining)

        health, refused = server.http.get("/health"), server.http.post("/v1/completions", json=LONG)
        assert health.status_code == refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
        assert going.result().json()["usage"]["completion_tokens"] == 60


def test_what_does_not_end_in_time_gets_an_error() -> None:
    with running() as server, ThreadPoolExecutor(1) as pool:
        server.server._shutdown_timeout = 0.2
        going = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=SECONDS)
        until(lambda: server.thread.state.num_running == 1)
        started = time.monotonic()

        server.server.end()

        assert "shut down before" in going.result().json()["error"]["message"] and time.monotonic() - started < 5


def test_metrics_move_with_the_work(server: Running) -> None:
    before = server.metrics()

    server.openai.completions.create(model="reference", prompt=[41] * 40, max_tokens=5, extra_body={"ignore_eos": True})
    server.openai.completions.create(model="reference", prompt=[41] * 40, max_tokens=5, extra_body={"ignore_eos": True})

    after = server.metrics()
    moved = {key[0]: after[key] - before[key] for key in after if key[1] in ("", "length") and not key[0].endswith("_bucket")}
    assert (moved["prompt_tokens_total"], moved["generation_tokens_total"]) == (80, 10)
    assert (moved["prefix_cache_queries_total"], moved["prefix_cache_hits_total"]) == (80, 32)
    assert moved["request_success_total"] == moved["time_to_first_token_seconds_count"] == moved["e2e_request_latency_seconds_count"] == 2
    assert moved["inter_token_latency_seconds_count"] == 8 and moved["request_time_per_output_token_seconds_count"] == 2
    assert after[("num_requests_running", "")] == after[("kv_cache_usage_perc", "")] == 0
