"""Models from the hub: against a small stand-in for it on loopback, through the real hub library.

Swarm runs in a process of its own, because the hub library reads HF_ENDPOINT, HF_HUB_OFFLINE and
HF_HOME once, when it is imported. One process serves all tests, each with its own repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from swarm.datatypes import Span
from swarm.models import load_span, resolve_model
from tests.tiny_models import save_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CLIENT = """
import json, sys
from swarm.datatypes import Span
from swarm.errors import SwarmError
from swarm.models import load_span, resolve_model

class Report:
    total = done = 0
    def start(self, description, total, unit): self.total += total or 0
    def advance(self, amount): self.done += amount
    def finish(self): pass

for line in sys.stdin:
    name, start, end = json.loads(line)
    report = Report()
    try:
        source = resolve_model(name, report=report)
        result = {"hash": source.model_hash, "num_blocks": source.num_blocks}
        if end:
            span = load_span(source, Span(start=start, end=end), report=report)
            result["sum"] = float(sum(p.double().sum() for p in span.parameters()))
        result |= {"total": report.total, "done": report.done}
    except SwarmError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(result), flush=True)
"""


class StandIn:
    """Serves the folders below one folder as repositories of the hub, and writes down what is asked of it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        """Files whose content was sent, in order."""
        self.replaced: dict[Path, bytes] = {}
        """Content sent instead of the file's own."""
        self.cut_off: dict[Path, int] = {}
        """Bytes after which the connection breaks, once per file."""
        self._port = 0
        self.start()

    def start(self) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                stand_in._answer(self, with_body=False)

            def do_GET(self) -> None:
                stand_in._answer(self, with_body=True)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @contextmanager
    def being_down(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        parts = request.path.partition("?")[0].strip("/").split("/")
        is_listing = parts[:2] == ["api", "models"]
        organisation, repo = parts[2:4] if is_listing else parts[:2]
        folder = self.root / organisation / repo
        if is_listing and folder.is_dir():
            body = json.dumps(self._listing(folder)).encode()
            self._send(request, body, {"Content-Type": "application/json"}, with_body)
            return
        file = folder / parts[-1]
        if not is_listing and parts[2:4] == ["resolve", COMMIT] and file.is_file():
            content = self.replaced.get(file, file.read_bytes())
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'}
            if with_body:
                self.fetched.append(file.name)
            cut_off = self.cut_off.pop(file, None) if with_body else None
            self._send(request, content, headers, with_body, cut_off=cut_off)
            return
        request.send_response(404)
        request.send_header("X-Error-Code", "EntryNotFound" if folder.is_dir() else "RepoNotFound")
        request.send_header("Content-Length", "0")
        request.end_headers()

    @staticmethod
    def _listing(folder: Path) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for file in sorted(folder.iterdir()):
            entry: dict[str, Any] = {"rfilename": file.name, "size": file.stat().st_size}
            if file.suffix == ".safetensors":
                sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": file.stat().st_size, "pointerSize": 130}
            siblings.append(entry)
        repo = f"{folder.parent.name}/{folder.name}"
        return {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False}

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        content: bytes,
        headers: dict[str, str],
        with_body: bool,
        cut_off: int | None = None,
    ) -> None:
        start = 0
        wanted = request.headers.get("Range", "")
        if with_body and wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        request.send_response(206 if start else 200)
        for key, value in headers.items():
            request.send_header(key, value)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        if with_body:
            request.wfile.write(content[start:] if cut_off is None else content[start : start + cut_off])
            if cut_off is not None:
                request.close_connection = True


class Swarm:
    """A process that resolves and loads models by name, one after the other."""

    def __init__(self, hub: StandIn, home: Path, **settings: str) -> None:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home / "hf"),
            "SWARM_CACHE": str(home / "swarm"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parents[3]),
            **settings,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def load(self, name: str, blocks: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        """What became of resolving the model and, unless `blocks` is empty, loading that span."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, *blocks]) + "\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert "\n" not in result.get("message", "")
        return result

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path_factory.mktemp("hub"))
    yield stand_in
    stand_in.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def swarm(hub: StandIn, home: Path) -> Iterator[Swarm]:
    process = Swarm(hub, home)
    yield process
    process.close()


@pytest.fixture
def repo(hub: StandIn, request: pytest.FixtureRequest) -> str:
    """A repository of this test's own, with a tiny model in several shards."""
    name = f"someone/{request.node.name}"
    save_tiny_model("llama", hub.root / name, num_shards=6)
    hub.fetched.clear()
    return name


def local_sum(folder: Path, tmp_path: Path, blocks: tuple[int, int]) -> float:
    source = resolve_model(str(folder), cache_dir=tmp_path / "local")
    span = load_span(source, Span(start=blocks[0], end=blocks[1]))
    return float(sum(float(parameter.double().sum()) for parameter in span.parameters()))


def shards(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def test_resolving_fetches_no_weights_and_gives_the_identity_of_a_copy(
    hub: StandIn, swarm: Swarm, repo: str, tmp_path: Path
) -> None:
    """Looking at a swarm's state must not cost a download, and a clone of the repository is the same model."""
    found = swarm.load(repo)
    assert "config.json" in hub.fetched
    assert shards(hub.fetched) == []
    local = resolve_model(str(hub.root / repo), cache_dir=tmp_path)
    assert (found["hash"], found["num_blocks"]) == (local.model_hash, local.num_blocks)


def test_only_the_shards_of_the_span_are_fetched_and_only_once(
    hub: StandIn, swarm: Swarm, repo: str, tmp_path: Path
) -> None:
    """A server with a few blocks of a huge model downloads a few files of many."""
    first = swarm.load(repo, blocks=(2, 3))
    fetched = shards(hub.fetched)
    assert 0 < len(fetched) < len(list((hub.root / repo).glob("*.safetensors")))
    assert len(set(fetched)) == len(fetched)
    # The files' bytes, twice for shards: fetched, then checked.
    assert first["done"] == first["total"] > 0
    assert swarm.load(repo, blocks=(2, 3))["sum"] == first["sum"]
    assert shards(hub.fetched) == fetched
    assert first["sum"] == local_sum(hub.root / repo, tmp_path, (2, 3))


def test_without_a_connection_the_cache_serves(hub: StandIn, swarm: Swarm, home: Path, repo: str) -> None:
    """A server that restarts while the network, or the hub, is away comes back."""
    first = swarm.load(repo, blocks=(2, 3))
    with hub.being_down():
        again = swarm.load(repo, blocks=(2, 3))
        assert (again["hash"], again["sum"]) == (first["hash"], first["sum"])
    offline = Swarm(hub, home, HF_HUB_OFFLINE="1")
    try:
        again = offline.load(repo, blocks=(2, 3))
        assert (again["hash"], again["sum"]) == (first["hash"], first["sum"])
        missing = offline.load(repo, blocks=(0, 1))
        assert missing["error"] == "DownloadError"
        assert "HF_HUB_OFFLINE" in missing["message"]
    finally:
        offline.close()


def test_an_unreachable_hub_is_one_sentence(hub: StandIn, swarm: Swarm) -> None:
    """The first thing that goes wrong on a laptop is the network."""
    with hub.being_down():
        failure = swarm.load("someone/never-seen")
    assert failure["error"] == "DownloadError"
    assert "check the network connection" in failure["message"]


def test_an_unknown_repository_is_not_found(swarm: Swarm) -> None:
    """A misspelt id must not be reported as a network problem."""
    failure = swarm.load("someone/misspelt")
    assert failure["error"] == "ModelNotFoundError"
    assert "someone/misspelt" in failure["message"]


def test_a_repository_with_pickled_weights_only_is_refused(hub: StandIn, swarm: Swarm, repo: str) -> None:
    """Nothing is fetched from it at all."""
    for path in (hub.root / repo).glob("*.safetensors*"):
        path.unlink()
    (hub.root / repo / "pytorch_model.bin").write_bytes(b"\x80")
    failure = swarm.load(repo)
    assert failure["error"] == "ModelFilesError"
    assert "pickled" in failure["message"]
    assert hub.fetched == []


def test_a_file_that_arrives_altered_is_thrown_away(hub: StandIn, swarm: Swarm, repo: str, tmp_path: Path) -> None:
    """A server announces the identity that the hub published, so it must hold exactly those weights."""
    for path in (hub.root / repo).glob("*.safetensors"):
        content = path.read_bytes()
        hub.replaced[path] = content[:-4] + bytes(byte ^ 1 for byte in content[-4:])
    failure = swarm.load(repo, blocks=(2, 3))
    assert failure["error"] == "DownloadError"
    assert "arrived damaged" in failure["message"]
    hub.replaced.clear()
    assert swarm.load(repo, blocks=(2, 3))["sum"] == local_sum(hub.root / repo, tmp_path, (2, 3))


def test_a_broken_off_download_is_continued(hub: StandIn, swarm: Swarm, repo: str, tmp_path: Path) -> None:
    """Half a shard must never be used; here the connection breaks in the middle of each."""
    for path in (hub.root / repo).glob("*.safetensors"):
        hub.cut_off[path] = path.stat().st_size // 2
    found = swarm.load(repo, blocks=(2, 3))
    if "error" in found:
        assert found["error"] == "DownloadError"
        found = swarm.load(repo, blocks=(2, 3))
    assert found["sum"] == local_sum(hub.root / repo, tmp_path, (2, 3))


def test_a_model_in_a_single_file_is_fetched_when_it_is_needed(
    hub: StandIn, swarm: Swarm, repo: str, tmp_path: Path
) -> None:
    """Small models have no index: their tensor names are known only once the file is there."""
    for path in (hub.root / repo).glob("model*"):
        path.unlink()
    save_tiny_model("llama", hub.root / repo, num_shards=1)
    found = swarm.load(repo)
    assert found["hash"] == resolve_model(str(hub.root / repo), cache_dir=tmp_path).model_hash
    assert shards(hub.fetched) == []
    assert swarm.load(repo, blocks=(2, 3))["sum"] == local_sum(hub.root / repo, tmp_path, (2, 3))
    assert shards(hub.fetched) == ["model.safetensors"]
