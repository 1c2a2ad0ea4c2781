"""`quantkit serve` as a process: it says where it is, ends in order, and refuses what cannot be in one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx
import pytest

from quantkit.cli.main import main
from quantkit.server.listen import open_socket

COMMAND = [sys.executable, "-c", "from quantkit.cli import main; main()", "serve", "reference", "--mode", "exact", "--served-model-name", "small"]


def test_a_served_model_is_found_used_and_ended_in_order() -> None:
    with subprocess.Popen([*COMMAND, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said: list[str] = []
        while not (said and said[-1].startswith("serving")):
            said.append(process.stderr.readline())
            assert said[-1], said
        url = re.search(r"http://\S+", said[-1])[0]
        answer = httpx.post(f"{url}/completions", json={"model": "small", "prompt": "Once", "max_tokens": 2}, timeout=20)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)

    assert answer.json()["model"] == "small"
    assert any(re.search(r"KV cache: [\d,]+ blocks of 16", line) for line in said)
    assert (process.returncode, out, err) == (0, "", "")


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    return ended.value.code, capsys.readouterr().err


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with open_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]

        code, error = refused("/no/such/model", "--port", str(port), capsys=capsys)

    assert code == 1 and error == f"Error: cannot listen on 127.0.0.1, port {port}: Address already in use; give another --port or --host\n"


def test_a_model_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = refused("/no/such/model", "--port", "0", capsys=capsys)

    assert code == 1 and "there is no folder '/no/such/model'" in error


def test_what_is_not_installed_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "quantkit.server.listen", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)

    code, error = refused("reference", "--port", "0", capsys=capsys)

    assert code == 2 and "quantkit serve needs uvicorn: pip install 'quantkit[serve]'" in error


def test_addresses_that_are_not_this_machines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = refused("reference", "--host", "192.0.2.1", capsys=capsys)

    assert code == 1 and "cannot listen on 192.0.2.1" in error
