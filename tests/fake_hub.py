"""A hub on 127.0.0.1 with one repository, which passes for a model and for a dataset.

It answers, or refuses, as huggingface_hub expects it.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

MODEL = "Owner/tiny-llama.w4a16"
GATED, BROKEN = "Owner/gated", "Owner/broken"
TOKEN = "hf_right"


@dataclass
class Hub:
    """What the hub has, and what it was asked."""

    files: dict[str, bytes]  # of the main branch
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    endpoint: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path
    headers: list[Mapping[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # file -> bytes of its content
    knows_ranges: bool = True
    needs_token: bool = False
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes sent before each cut
    slow: dict[str, float] = field(default_factory=dict)  # file -> seconds before every MiB

    def commit(self, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or commit."""
        branches = {"main": self.files} | self.branches
        commits = {sha_of(files): files for files in branches.values()}
        return branches.get(revision, commits.get(revision))

    def downloaded(self) -> set[str]:
        """The files whose content was asked for."""
        found = (
            path.partition("/resolve/")[2] for method, path in self.requests if method == "GET"
        )
        return {path.partition("/")[2] for path in found if path}


def sha_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return digest.hexdigest()


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub(files)

    class Handler(_Handler):
        state = hub

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that went away

    server = Server(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0]).lstrip("/")
        if "Owner/" not in path:  # the library also asks for things that belong to no model
            return self._refuse(404, None, "Not found")
        self.state.requests.append((self.command, path))
        self.state.headers.append(dict(self.headers.items()))
        if BROKEN in path:
            return self._refuse(503, None, "The hub is being mended")
        if GATED in path:
            return self._refuse(403, "GatedRepo", f"Access to model {GATED} is restricted.")
        token = self.headers.get("authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if MODEL not in path or (self.state.needs_token and token is None):
            return self._refuse(401, "RepoNotFound", "Repository not found")
        path = path.replace("api/datasets/", "api/models/").removeprefix("datasets/")
        if path == f"api/models/{MODEL}":
            return self._revision("main")
        if path.startswith(f"api/models/{MODEL}/revision/"):
            return self._revision(path.partition("/revision/")[2])
        if path.startswith(f"api/models/{MODEL}/tree/"):
            return self._tree(path.partition("/tree/")[2])
        revision, _, name = path.removeprefix(f"{MODEL}/resolve/").partition("/")
        files = self.state.commit(revision)
        if files is None or name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._file(name, files[name], sha_of(files))

    def _revision(self, revision: str) -> None:
        files = self.state.commit(revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": MODEL, "sha": sha_of(files), "siblings": siblings})

    def _tree(self, revision: str) -> None:
        files = self.state.commit(revision)
        assert files is not None
        self._json(
            [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in files.items()
            ]
        )

    def _file(self, name: str, data: bytes, commit: str) -> None:
        start, stop = 0, len(data)
        asked = self.headers.get("Range") if self.state.knows_ranges else None
        if asked:
            self.state.ranges.append(asked)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or stop) + 1, stop)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.state.cuts.get(name)
        if cuts:
            self.wfile.write(data[start : start + cuts.pop(0)])
            self.close_connection = True
        else:
            for i in range(start, stop, 1 << 20):
                time.sleep(self.state.slow.get(name, 0))
                piece = data[i : min(i + (1 << 20), stop)]
                self.wfile.write(piece)
                self.state.sent[name] += len(piece)

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
