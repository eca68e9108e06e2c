"""A hub of models on this machine: as much of its HTTP interface as sending and reading a model takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_of_the_stub"


@dataclass
class HubStub:
    """What was sent, by repository and branch, and what the stub answers with.

    Attributes:
        files: the content of each file.
        commits: message and names of each commit, in their order.
        refuses: a status with which commits are refused; 0 takes them.
    """

    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    refuses: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their hash, until they are committed

    def __enter__(self) -> HubStub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, name: str, branch: str, lines: list[dict]) -> None:
        message, sent = "", {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                sent[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                sent[value["path"]] = self.stored[value["oid"]]
        self.files.setdefault((name, branch), {}).update(sent)
        self.commits.append((branch, message, sorted(sent)))


def _handler(hub: HubStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, content: object = None, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def read(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            path, body = unquote(urlparse(self.path).path), self.read()
            parts = path.strip("/").split("/")
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if path == "/api/repos/create":
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                hub.files.setdefault((name, "main"), {})
                hub.private[name] = bool(wanted.get("private"))
                return self.answer(200, {"url": f"{hub.endpoint}/{name}", "id": name, "name": name})
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**wanted, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}}
                    for wanted in json.loads(body)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            name, what = "/".join(parts[2:4]), parts[4]
            if what == "branch":
                hub.files.setdefault((name, parts[5]), {})
                return self.answer(200, {})
            if what == "preupload":
                files = [
                    {"path": file["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pt", ".bin")) else "regular"}
                    for file in json.loads(body)["files"]
                ]  # fmt: skip
                return self.answer(200, {"files": files})
            if what == "commit" and hub.refuses:
                return self.answer(hub.refuses, {"error": "the stub is told to refuse"})
            hub.commit(name, parts[5], [json.loads(line) for line in body.splitlines()])
            url = f"{hub.endpoint}/{name}/commit/{'0' * 40}"
            return self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})

        def do_PUT(self) -> None:
            body = self.read()
            assert hashlib.sha256(body).hexdigest() == self.path.rsplit("/", 1)[1]
            hub.stored[self.path.rsplit("/", 1)[1]] = body
            self.answer(200)

        def do_GET(self) -> None:
            parts = unquote(urlparse(self.path).path).strip("/").split("/")
            if parts[0] == "api":  # of a model: what there is
                name, branch = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                known = hub.files.get((name, "main" if set(branch) == {"0"} else branch))
                if known is None:
                    return self.answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
                if parts[4:5] == ["tree"]:
                    entries = [
                        {"type": "file", "path": file, "size": len(text), "oid": "0"} for file, text in known.items()
                    ]
                    return self.answer(200, entries)
                siblings = [{"rfilename": file} for file in known]
                return self.answer(200, {"id": name, "sha": "0" * 40, "siblings": siblings, "private": False})
            name, branch, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            known = hub.files.get((name, "main" if set(branch) == {"0"} else branch))
            if known is None:
                return self.answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
            if file not in known:
                return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)
            content = known[file]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, content, ETag=tag, X_Repo_Commit="0" * 40, Accept_Ranges="bytes")

        do_HEAD = do_GET  # noqa: N815

    return Handler
