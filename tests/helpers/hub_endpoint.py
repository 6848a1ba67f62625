"""A hub on this machine: the HTTP calls that huggingface_hub makes while pushing, and no more.

It keeps repositories in memory and the requests it saw, without their bodies. Trouble is ordered
by ``drop`` (close the connection instead of answering) and ``fail`` (answer with a status).
"""

import base64
import hashlib
import json
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD_TOKEN = "hf_GoodTokenThatMayWrite123"
READ_TOKEN = "hf_TokenThatMayOnlyRead4567"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    #: (oid, first line, branch or pull request) of every commit.
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    pull_requests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


class HubEndpoint:
    """Use as a context manager; ``url`` is what to give as endpoint."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.drop: dict[str, int] = {}
        self.fail: dict[str, tuple[int, str]] = {}
        self.uploads: list[str] = []
        endpoint = self

        class Handler(_Handler):
            hub = endpoint

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, *, private=True, files=None, ignored=()):
        self.repositories[name] = Repository(private, dict(files or {}), ignored=ignored)
        return self.repositories[name]


class _Handler(BaseHTTPRequestHandler):
    hub: HubEndpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.query = urllib.parse.parse_qs(self.path.partition("?")[2])
        self.hub.requests.append((self.command, path))
        for part, times in self.hub.drop.items():
            if part in path and times > 0:
                self.hub.drop[part] -= 1
                # Some of the body, then nothing: what a lost connection looks like.
                if self.command in ("POST", "PUT"):
                    self.rfile.read1(100)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._read_chunks()
        for part, (status, text) in self.hub.fail.items():
            if part in path:
                self._answer(status, {"error": text.format(sent=self.headers["Authorization"])})
                return
        if path.startswith("/lfs/"):
            self._put_object(path, body)
        elif self._role() is None:
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self._route(path, body)

    def _read_chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _role(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return {GOOD_TOKEN: "write", READ_TOKEN: "read"}.get(token)

    def _answer(self, status, content, **headers):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _put_object(self, path, body):
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "the content has another hash"})
            return
        self.hub.objects[oid] = body
        self.hub.uploads.append(oid)
        self._answer(200, {})

    def _route(self, path, body):
        if path == "/api/whoami-v2":
            access = {"role": self._role(), "displayName": "test"}
            self._answer(
                200, {"name": "me", "type": "user", "auth": {"accessToken": access}, "orgs": []}
            )
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            parts = path.removeprefix("/api/models/").split("/")
            name = "/".join(parts[:2])
            if name not in self.hub.repositories:
                self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return
            self._repository(name, self.hub.repositories[name], parts[2:], body)

    def _create(self, asked):
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if not name.startswith("me/"):
            self._answer(403, {"error": "You may not write in this namespace"})
        elif name in self.hub.repositories:
            self._answer(409, {**answer, "error": "You already created this model repo"})
        else:
            self.hub.add(name, private=asked.get("visibility") == "private")
            self._answer(200, answer)

    def _batch(self, asked):
        objects = []
        for item in asked["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _repository(self, name, repo, rest, body):
        # The client asks for the revision where nothing has changed since the last commit.
        if rest in ([], ["revision", "main"]):
            head = repo.commits[-1][0] if repo.commits else "0" * 40
            siblings = [{"rfilename": path} for path in repo.files]
            self._answer(
                200, {"id": name, "private": repo.private, "sha": head, "siblings": siblings}
            )
        elif rest[0] == "tree":
            self._answer(200, [_entry(path, data) for path, data in repo.files.items()])
        elif rest[0] == "paths-info":
            files = repo.pull_requests.get("/".join(rest[1:]), repo.files)
            wanted = urllib.parse.parse_qs(body.decode())["paths"]
            self._answer(200, [_entry(path, files[path]) for path in wanted if path in files])
        elif rest[0] == "preupload":
            self._preupload(repo, json.loads(body))
        elif rest[0] == "commit":
            self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": "/".join(rest)})

    def _preupload(self, repo, asked):
        answers = []
        for file in asked["files"]:
            mode = "lfs" if _is_large(file["path"]) else "regular"
            oid = None
            if file["path"] in repo.files:
                data = repo.files[file["path"]]
                oid = hashlib.sha256(data).hexdigest() if mode == "lfs" else _git_hash(data)
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": mode,
                    "shouldIgnore": file["path"] in repo.ignored,
                    "oid": oid,
                }
            )
        self._answer(200, {"files": answers})

    def _commit(self, name, repo, lines):
        if self._role() != "write":
            self._answer(403, {"error": "This token may not write"})
            return
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(repr(sorted(files)).encode() + str(len(repo.commits)).encode())
        oid = oid.hexdigest()
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        revision = "main"
        if self.query.get("create_pr"):
            number = len(repo.pull_requests) + 1
            revision = f"refs/pr/{number}"
            repo.pull_requests[revision] = files
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        else:
            repo.files = files
        repo.commits.append((oid, lines[0]["value"]["summary"], revision))
        self._answer(200, answer)


def _is_large(path):
    return path.endswith((".safetensors", ".gguf", "tokenizer.json"))


def _git_hash(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(path, data):
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
    if _is_large(path):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return entry
