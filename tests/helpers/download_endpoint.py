"""Two hubs on this machine: the HTTP calls that are made while downloading, and no more.

Hugging Face's, as huggingface_hub and datasets ask it, and ModelScope's, as modelscope-hub does.
The files are those of folders; every request is kept.
"""

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class DownloadEndpoint:
    """Use as a context manager; ``url`` is what to give as endpoint.

    Args:
        models: Folders by ``owner/name``.
        datasets: The same.
    """

    def __init__(self, models, datasets):
        self.folders = {"models": models, "datasets": datasets}
        self.requests: list[str] = []
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


class _Handler(BaseHTTPRequestHandler):
    hub: DownloadEndpoint
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = urllib.parse.urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        query = urllib.parse.parse_qs(asked.query)
        words = urllib.parse.unquote(asked.path).strip("/").split("/")
        if words[:2] == ["api", "v1"]:
            self._answer_modelscope(words[2:], query)
        elif words[0] == "api":
            self._answer_hub(words[1:], urllib.parse.parse_qs(body))
        else:
            kind = "datasets" if words[0] == "datasets" else "models"
            owner, name, _, _, *path = words[1:] if kind == "datasets" else words
            self._send_file(self.hub.folders[kind].get(f"{owner}/{name}"), "/".join(path))

    do_HEAD = do_POST = do_GET

    def _answer_modelscope(self, words, query):
        kind, owner, name, *rest = [*words, "", "", ""][: max(3, len(words))]
        folder = self.hub.folders.get(kind, {}).get(f"{owner}/{name}")
        if kind == "repos":
            self._answer({"Code": 200, "Data": {}})
        elif folder is None:
            self._answer({"Code": 10010205001, "Message": "Repository not found"}, 404)
        elif "FilePath" in query:
            self._send_file(folder, query["FilePath"][0])
        elif rest in (["repo", "files"], ["repo", "tree"]):
            files = [
                {
                    "Path": path,
                    "Name": path,
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": _sha(data),
                }
                for path, data in _list(folder)
            ]
            self._answer({"Code": 200, "Data": {"Files": files, "TotalCount": len(files)}})
        else:
            self._answer({"Code": 200, "Data": {"Id": 1}})

    def _answer_hub(self, words, form):
        kind, owner, name, *rest = [*words, "", ""][: max(3, len(words))]
        folder = self.hub.folders.get(kind, {}).get(f"{owner}/{name}")
        if folder is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": path} for path, _ in _list(folder)]
            self._answer(
                {"id": f"{owner}/{name}", "private": False, "sha": "0" * 40, "siblings": siblings}
            )
        elif rest[0] in ("tree", "paths-info"):
            wanted = form.get("paths")
            self._answer(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": _sha(data)[:40]}
                    for path, data in _list(folder)
                    if wanted is None or path in wanted
                ]
            )
        else:
            self._answer({"error": "/".join(rest)}, 404)

    def _send_file(self, folder, path):
        if folder is None or not (Path(folder) / path).is_file():
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        data = (Path(folder) / path).read_bytes()
        self._send(200, data, X_Repo_Commit="0" * 40, ETag=f'"{_sha(data)[:40]}"')

    def _answer(self, content, status=200, **headers):
        self._send(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def _send(self, status, data, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _list(folder):
    """Every file of a folder, by its path there."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in files]


def _sha(data):
    return hashlib.sha256(data).hexdigest()
