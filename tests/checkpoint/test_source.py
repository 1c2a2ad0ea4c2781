"""A name becomes a local folder, or an error that says what would work. The Hub is a small server of this test, never the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quantkit.checkpoint.source import Source, resolve
from quantkit.errors import SourceError

_ROOT = Path(__file__).parents[2]
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Source(Path("org/name"), "name", "org/name")
    assert resolve(str(tmp_path / "org")) == Source(tmp_path / "org", "org", str(tmp_path / "org"))


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").folder == tmp_path / "model"


def test_reference_is_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reference").mkdir()
    monkeypatch.chdir(tmp_path)
    source = resolve("reference")
    assert source.name == "reference" and (source.folder / "config.json").is_file()
    assert resolve("./reference").folder == Path("reference")


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.gguf", "GGUF"), ("model.safetensors", "give the folder that holds it"), ("notes.txt", "is a file")],
)
def test_file_is_refused_with_what_is_expected(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SourceError, match=message):
        resolve(str(tmp_path / name))


@pytest.mark.parametrize("prefix", ["", "./"], ids=["absolute", "relative"])
def test_mistyped_path_is_answered_with_near_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    (tmp_path / "llama-1b").mkdir()
    (tmp_path / "llama-1b.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"did you mean .*llama-1b\?"):
        resolve(f"{prefix or f'{tmp_path}/'}lama-1b")


@pytest.mark.parametrize("source", ["", "a/b/c", "org/name:Q4_K_M", "C:\\models", "../up"], ids=repr)
def test_what_cannot_be_a_hub_id_is_refused_without_the_network(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SourceError, match="there is no folder"):
        resolve(source)


def test_modelscope_names_its_package_when_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(SourceError, match=r"pip install 'quantkit\[modelscope\]'"):
        resolve("modelscope:org/name")


_RESOLVE = """
    import json, sys
    from quantkit.checkpoint.source import resolve
    from quantkit.errors import SourceError

    for request in json.loads(sys.argv[1]):
        try:
            found = resolve(**request)
            print(json.dumps([str(found.folder), found.name]))
        except SourceError as error:
            print(json.dumps(str(error)))
"""


def _resolve_elsewhere(home: Path, requests: list[dict[str, object]], **environment: str) -> list[object]:
    """The answers of another process, because huggingface_hub reads its environment when it is imported."""
    command = [sys.executable, "-c", textwrap.dedent(_RESOLVE), json.dumps(requests)]
    given = {**os.environ, "PYTHONPATH": str(_ROOT), "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    given = {key: value for key, value in given.items() if key not in ("HF_TOKEN", "HF_HUB_CACHE")}
    lines = subprocess.run(command, cwd=home, env=given, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def _cache(home: Path, name: str, *files: str) -> Path:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT)
    for file in files:
        (snapshot / file).touch()
    return snapshot


def test_offline_only_the_cache_is_used(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path, "org/cached", "config.json", "model.safetensors")
    _cache(tmp_path, "org/pickles", "config.json")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "absent-1b").mkdir()
    requests = [{"source": "org/cached"}, {"source": "org/absent"}, {"source": "org/cached", "revision": "v2"}, {"source": "org/pickles"}]
    cached, absent, revision, pickles = _resolve_elsewhere(tmp_path, requests, HF_HUB_OFFLINE="1")
    assert cached == [str(snapshot), "org/cached"]
    assert "HF_HUB_OFFLINE=1 forbids the network" in str(absent) and "did you mean org/absent-1b" in str(absent)
    assert "at revision 'v2' is not in the local cache" in str(revision)
    assert "no safetensors files" in str(pickles) and "save_pretrained" in str(pickles)


class _Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does about a gated, an absent, a branchless and a broken repository, and serves a whole one."""

    FILES = ("config.json", "model.safetensors", "modeling_own.py", "pytorch_model.bin", "tokenizer.json")
    ANSWERS = (("gated", 403, "GatedRepo"), ("absent", 404, "RepoNotFound"), ("branchless", 404, "RevisionNotFound"), ("broken", 418, ""))

    def do_GET(self) -> None:
        if "whole" in self.path:
            self._serve()
            return
        status, code = next(((status, code) for word, status, code in self.ANSWERS if word in self.path), (404, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _serve(self) -> None:
        """What the repository is, its files, or one of them, which holds its own name."""
        file = self.path.rpartition("/")[2]
        tree = [{"type": "file", "path": name, "size": len(name), "oid": name} for name in self.FILES]
        about = {"id": "org/whole", "sha": _COMMIT, "siblings": [{"rfilename": name} for name in self.FILES]}
        content = (json.dumps(tree if "/tree/" in self.path else about) if "/api/" in self.path else file).encode()
        self.send_response(200)
        for header in (("X-Repo-Commit", _COMMIT), ("ETag", f'"{file}"'), ("Content-Length", str(len(content)))):
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_the_hub_refuses_is_said_with_what_would_work(tmp_path: Path, hub: str) -> None:
    requests = [{"source": "org/gated"}, {"source": "org/absent"}, {"source": "org/branchless", "revision": "v9"}, {"source": "org/broken"}]
    gated, absent, branchless, broken = map(str, _resolve_elsewhere(tmp_path, requests, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub))
    assert "is gated" in gated and "hf auth login" in gated
    assert "no model of this name" in absent and "private" in absent
    assert "has no revision 'v9'" in branchless
    assert "org/broken" in broken and "local" in broken


def test_python_files_are_fetched_only_for_who_trusts_them(tmp_path: Path, hub: str) -> None:
    requests = [{"source": "org/whole"}, {"source": "org/whole", "trust_remote_code": True}]
    for request, python in zip(requests, ([], ["modeling_own.py"]), strict=True):
        [(folder, name)] = _resolve_elsewhere(tmp_path, [request], HF_HUB_OFFLINE="0", HF_ENDPOINT=hub)
        fetched = sorted(path.name for path in Path(folder).iterdir())
        assert name == "org/whole" and fetched == sorted(["config.json", "model.safetensors", "tokenizer.json", *python])


def test_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    [answer] = _resolve_elsewhere(tmp_path, [{"source": "org/name"}], HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in str(answer) and "give its folder" in str(answer)
