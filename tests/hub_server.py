"""A small stand-in for the hub's API on 127.0.0.1: what `huggingface_hub` asks of it to publish a model over LFS, and ways to go wrong.

It keeps what it was sent and counts the bytes. No Xet: a client of it has HF_HUB_DISABLE_XET set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_" + "TestTokenOfNobody" * 2
OWNERS = ("me", "team")
CHUNK = 1 << 16


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes | str]]  # of a branch, a file's bytes, or the sha256 of a large one
    commits: int = 0


@dataclass
class Fault:
    """What the next `times` requests that match get in place of an answer: a status, or no more than so many bytes of them read and then the
    connection cut (or, where it `stalls`, kept until the client is gone). With neither, they are carried out and the answer is lost."""

    request: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    error: str = ""
    cut_after: int | None = None
    stalls: bool = False
    times: int = 1


class Hub:
    """The state of the stand-in; `requests` are `METHOD /path`, `received` the bodies, `stored` the large files by sha256."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.received: list[bytes] = []
        self.large_bytes: dict[str, int] = {}  # sent for each large file, whole or not
        self.faults: list[Fault] = []
        self.ignored: set[str] = set()  # by a .gitignore of the repository
        self.stalled = threading.Event()
        self.lock = threading.Lock()
        self.url = ""

    def add(self, name: str, *, private: bool = False, **files: bytes) -> None:
        self.repos[name] = Repo(private, {"main": {".gitattributes": b"*.safetensors filter=lfs\n", **files}})

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def contents(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        files = self.repos[repo].branches[branch]
        return {name: self.stored[value] if isinstance(value, str) else value for name, value in files.items() if name != ".gitattributes"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        return

    def _any(self) -> None:
        path = urlparse(self.path)
        request = f"{self.command} {unquote(path.path)}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        limit = fault.cut_after if fault else None
        body = self._body(limit)
        if fault and limit is not None:
            self.close_connection = True
            if fault.stalls:
                self.hub.stalled.set()
                while self.connection.recv(CHUNK):  # until the client is gone
                    pass
        elif fault and fault.status:
            self._answer(fault.status, {"error": fault.error}, fault.headers)
        else:
            self.hub.received.append(body)
            self._loses_answer = fault is not None
            self._serve(path.path, request, body)

    def _serve(self, path: str, request: str, body: bytes) -> None:
        if path.startswith("/lfs/"):
            self._put(path.removeprefix("/lfs/"), body)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self._route(request, body)

    do_GET = do_POST = do_PUT = _any

    def _body(self, limit: int | None) -> bytes:
        oid = self.path.removeprefix("/lfs/") if self.path.startswith("/lfs/") else None
        parts, left = [], int(self.headers.get("Content-Length", 0))
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        if limit is not None:
            left, chunked = (limit if chunked else min(limit, left)), False
        while chunked or left:
            if chunked:
                size = int(self.rfile.readline(), 16)
                part = self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
            else:
                part = self.rfile.read(min(left, CHUNK))
                left -= len(part)
                if not part:
                    break
            parts.append(part)
            if oid:
                self.hub.large_bytes[oid] = self.hub.large_bytes.get(oid, 0) + len(part)
        return b"".join(parts)

    def _answer(self, status: int, value: object = None, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "_loses_answer", False):
            self.close_connection = True
            return
        body = json.dumps({} if value is None else value).encode()
        self.send_response(status)
        said = {"X-Error-Message": value["error"]} if isinstance(value, dict) and value.get("error") else {}
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **said, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def _route(self, request: str, body: bytes) -> None:
        if request == "GET /api/whoami-v2":
            self._answer(200, {"name": "me", "type": "user", "orgs": [{"name": "team"}]})
        elif request == "POST /api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif request == "POST /api/repos/create":
            self._create(json.loads(body))
        elif request.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            found = re.fullmatch(r"\w+ /api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", request)
            assert found, request
            self._of_repo(*found.groups(), body)

    def _of_repo(self, name: str, verb: str | None, branch: str | None, body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif verb is None:
            self._answer(200, {"id": name, "_id": "0", "private": repo.private, "sha": "0" * 40, "siblings": [], "tags": []})
        elif verb == "branch":
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            self._answer(200)
        elif branch not in repo.branches:
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            of_verb = {"tree": self._tree, "preupload": self._preupload, "commit": self._commit}
            of_verb[verb](repo, repo.branches[branch], body)

    def _create(self, wanted: dict) -> None:
        owner = wanted.get("organization") or "me"
        name = f"{owner}/{wanted['name']}"
        if owner not in OWNERS:
            self._answer(403, {"error": f"You don't have the rights to create a model under the namespace {owner}"})
        elif name in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo"})
        else:
            self.hub.add(name, private=wanted.get("visibility") == "private")
            self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _tree(self, repo: Repo, files: dict[str, bytes | str], body: bytes) -> None:
        self._answer(200, [self._entry(name, value) for name, value in sorted(files.items())])

    def _entry(self, name: str, value: bytes | str) -> dict:
        if isinstance(value, str):
            size = len(self.hub.stored[value])
            lfs = {"oid": value, "size": size, "pointerSize": 134}
            return {"type": "file", "path": name, "size": size, "oid": "1" * 40, "lfs": lfs}
        return {"type": "file", "path": name, "size": len(value), "oid": _git_id(value)}

    def _preupload(self, repo: Repo, files: dict[str, bytes | str], body: bytes) -> None:
        told = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".gguf"))
            there = files.get(file["path"])
            oid = there if isinstance(there, str) or there is None else _git_id(there)
            told.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": file["path"] in self.hub.ignored,
                    "oid": oid,
                }
            )
        self._answer(200, {"files": told})

    def _batch(self, wanted: dict) -> None:
        objects = []
        for entry in wanted["objects"]:
            upload = {} if entry["oid"] in self.hub.stored else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
            objects.append({"oid": entry["oid"], "size": entry["size"], **upload})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "other bytes than promised"})
        else:
            self.hub.stored[oid] = body
            self._answer(200)

    def _commit(self, repo: Repo, files: dict[str, bytes | str], body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if value.get("path") in self.hub.ignored:
                continue
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                assert value["oid"] in self.hub.stored
                files[value["path"]] = value["oid"]
        repo.commits += 1
        self._answer(
            200, {"commitUrl": f"{self.hub.url}/me/x/commit/{repo.commits}", "commitOid": f"{repo.commits:040d}", "hookOutput": ""}
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub of its own for a test, on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _git_id(value: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(value) + value, usedforsecurity=False).hexdigest()
