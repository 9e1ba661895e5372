"""A double of the hub's HTTP interface, as far as `huggingface_hub` uses it for model repositories.

It keeps commits in memory, decides which files are large as the hub does by default, checks tokens, and records what
came and went.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

TOKEN = "hf_doubledoubledouble"
LARGE = re.compile(r".*\.(safetensors|bin|onnx|npy)")
"""Files that the hub stores as LFS in a new repository."""


def point(url: str) -> dict[str, object]:
    """The constants of `huggingface_hub` that point it at a server. It reads them from the environment when it is first
    imported, which tests have done long before."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    where = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    return {**where, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}


class File(NamedTuple):
    content: bytes
    large: bool

    @property
    def blob(self) -> str:
        shown = self.content
        if self.large:
            oid = hashlib.sha256(self.content).hexdigest()
            shown = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(self.content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(shown) + shown).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.large else self.blob


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.commits: list[dict[str, File]] = []
        self.shas: list[str] = []
        self.branches: dict[str, int] = {}
        self.add("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})

    def add(self, branch: str, files: dict[str, File]) -> str:
        self.commits.append(files)
        self.shas.append(hashlib.sha1(f"{len(self.commits)} {id(self)}".encode()).hexdigest())
        self.branches[branch] = len(self.commits) - 1
        return self.shas[-1]

    def at(self, revision: str) -> tuple[str, dict[str, File]] | None:
        number = self.branches.get(revision, self.shas.index(revision) if revision in self.shas else None)
        return None if number is None else (self.shas[number], self.commits[number])

    @property
    def files(self) -> dict[str, bytes]:
        """What is on `main`."""
        return {path: file.content for path, file in self.commits[self.branches["main"]].items()}

    def change(self, path: str, content: bytes | None) -> None:
        """Somebody commits another content of one file, or none."""
        files = dict(self.commits[self.branches["main"]])
        files.pop(path, None)
        if content is not None:
            files[path] = File(content, bool(LARGE.fullmatch(path)))
        self.add("main", files)


class Double:
    """The server.

    Attributes:
        repos: by OWNER/NAME.
        asked: of each request its method and path.
        sent, fetched: the bytes of files that came in and went out, by path or hash.
        token: what a request has to have.
        gate: called before a file goes out, with its path; it may wait or raise.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent: dict[str, int] = {}
        self.fetched: dict[str, int] = {}
        self.gate: Callable[[str], None] = lambda path: None
        self.lock = threading.Lock()
        double = self

        class Handler(_Handler):
            hub = double

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that was killed is no fault of the double."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def forget(self) -> None:
        """Begin to record anew."""
        self.asked, self.sent, self.fetched = [], {}, {}


class Refusal(Exception):
    def __init__(self, code: int, why: str, kind: str | None = None):
        super().__init__(why)
        self.code, self.why, self.kind = code, why, kind


class _Handler(BaseHTTPRequestHandler):
    hub: Double
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one piece; otherwise the second one waits for 40 ms
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path, _, _ = self.path.partition("?")
        path = urllib.parse.unquote(path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.asked.append((self.command, path))
        try:
            if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Invalid credentials in Authorization header")
            for pattern, method, act in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command.replace("HEAD", "GET"):
                    act(self, body, **{key: value for key, value in match.groupdict().items() if value is not None})
                    return
            raise Refusal(404, f"the double has no {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.why}
            self._answer(
                {"error": refusal.why}, refusal.code, headers | ({"X-Error-Code": refusal.kind} if refusal.kind else {})
            )

    def _answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        given = {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
        for name, text in given.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, repo: str) -> Repo:
        if repo not in self.hub.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[repo]

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        found = self._repo(repo).at(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # -- what it can do ---------------------------------------------------------------------------------

    def validate(self, body: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "somebody":
            raise Refusal(403, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[name] = Repo(private)
        self._answer({"url": f"{self.hub.url}/{name}"})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        sha, files = self._at(repo, revision)
        listed = [{"rfilename": path} for path in files]
        self._answer({"id": repo, "sha": sha, "private": self._repo(repo).private, "siblings": listed})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self._at(repo, revision)
        found: list[dict[str, Any]] = [{"type": "directory", "path": "tasks", "oid": "0" * 40, "size": 0}]
        for path, file in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.blob, "size": len(file.content)}
            if file.large:
                entry["lfs"] = {"oid": file.etag, "size": len(file.content), "pointerSize": 130}
            found.append(entry)
        begin = int(dict(urllib.parse.parse_qsl(self.path.partition("?")[2])).get("cursor", 0))
        page, rest = found[begin : begin + 10], found[begin + 10 :]
        next_ = f'<{self.hub.url}{self.path.partition("?")[0]}?recursive=true&cursor={begin + 10}>; rel="next"'
        self._answer(page, headers={"Link": next_} if rest else {})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        found = self._repo(repo)
        found.branches[name] = found.branches["main"]
        self._answer({})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self._at(repo, revision)
        ignored = files[".gitignore"].content.decode().split() if ".gitignore" in files else []
        answer = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if LARGE.fullmatch(path) else "regular"
            hidden = any(path.startswith(name) for name in ignored)
            told = {"path": path, "uploadMode": mode, "shouldIgnore": hidden}
            answer.append(told | ({"oid": files[path].etag} if path in files else {}))
        self._answer({"files": answer})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            one = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(one)
        self._answer({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        with self.hub.lock:
            self.hub.large[oid] = body
            self.hub.sent[oid] = len(body)
        self._answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        sha, before = self._at(repo, revision)
        header, *lines = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit") not in (None, sha):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(before)
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = File(self.hub.large[value["oid"]], True)
            else:
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(content, False)
                self.hub.sent[value["path"]] = len(content)
        made = self._repo(repo).add(revision, files)
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha, files = self._at(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        content, code, start = file.content, 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            content, code = content[int(start[1]) :], 206
        if self.command == "GET":
            self.hub.gate(path)
            with self.hub.lock:
                self.hub.fetched[path] = self.hub.fetched.get(path, 0) + len(content)
        self._answer(content, code, headers)


MODEL, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    (r"/api/validate-yaml", "POST", _Handler.validate),
    (r"/api/repos/create", "POST", _Handler.create),
    (rf"/api/models/{MODEL}", "GET", _Handler.info),
    (rf"/api/models/{MODEL}/revision/{REVISION}", "GET", _Handler.info),
    (rf"/api/models/{MODEL}/tree/{REVISION}", "GET", _Handler.tree),
    (rf"/api/models/{MODEL}/branch/(?P<name>[^/]+)", "POST", _Handler.branch),
    (rf"/api/models/{MODEL}/preupload/{REVISION}", "POST", _Handler.preupload),
    (rf"/api/models/{MODEL}/commit/{REVISION}", "POST", _Handler.commit),
    (rf"/{MODEL}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", "PUT", _Handler.upload),
    (rf"/{MODEL}/resolve/{REVISION}/(?P<path>.+)", "GET", _Handler.resolve),
]


if __name__ == "__main__":  # the command, as a process that has imported the client already
    import os

    from huggingface_hub import constants

    from perpetune.cli import main

    for name, value in point(os.environ["HF_ENDPOINT"]).items():
        setattr(constants, name, value)
    main()
