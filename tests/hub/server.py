"""A server on this machine that speaks what huggingface_hub needs of the Hugging Face Hub's API."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

from huggingface_hub import constants

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
"""The roles of the tokens that the server knows; all are of the user `ada`, who may write to the
organization `lab`."""
LARGE = 4000
"""Bytes from which on a file is stored as an LFS object."""
NAME = r"[\w.-]+/[\w.-]+"


def digest(content):
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repository:
    """Files by commit, and the commits of branches."""

    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files, branch="main"):
        """Makes a commit of files, by name, the newest of a branch; returns its hash."""
        listed = repr(sorted((name, digest(content)) for name, content in files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}{listed}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def find(self, revision):
        """The hash of a branch or commit; None if there is none."""
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class Request(NamedTuple):
    method: str
    path: str
    range: str | None


class Hub(http.server.ThreadingHTTPServer):
    """A Hub with repositories; `requests` records what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}
        self.status = None
        """A status that all requests are answered with."""
        self.cuts: dict[str, int] = {}
        """Bytes after which the next answers with a file are cut off, by the file's name."""

    def add(self, name, files, branch="main", **kind):
        """Makes a repository of files, by name, or a commit in it; returns the commit's hash."""
        repository = self.repositories.setdefault(name, Repository(**kind))
        return repository.commit(files, branch)

    def add_folder(self, name, folder, *, without=(), **more):
        """Makes a repository of a folder's files, and of more, by name."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for left_out in without:
            del files[left_out]
        return self.add(name, files | more)

    def fetched(self):
        """The names of the files that were fetched, in order of the first request."""
        paths = (request.path for request in self.requests if request.method == "GET")
        found = (re.fullmatch(f"/{NAME}/resolve/[^/]+/(.*)", path) for path in paths)
        return list(dict.fromkeys(match[1] for match in found if match))

    def handle_error(self, request, client_address):
        pass  # of connections that are cut


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        hub = self.server
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        self.role = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if hub.status is not None:
            return self.answer(hub.status)
        for pattern, answer in ROUTES.items():
            method, form = pattern.split(" ")
            match = re.fullmatch(form.replace("NAME", f"({NAME})"), path)
            if match and self.command in method.split("|"):
                return answer(self, *match.groups())
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status, content=b"", code=None, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        for name, value in ({"Content_Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def readable(self, name):
        """The repository of a name; None where it was refused."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.role is None):
            self.answer(401, code="RepoNotFound")
            return None
        return repository

    def info(self, name, revision="main"):
        repository = self.readable(name)
        if repository is None:
            return None
        sha = repository.find(revision)
        if sha is None:
            return self.answer(404, code="RevisionNotFound")
        files = repository.commits[sha]
        siblings = [{"rfilename": file, "size": len(files[file])} for file in files]
        return self.answer(200, {"id": name, "sha": sha, "siblings": siblings})

    def tree(self, name, revision):
        repository = self.readable(name)
        if repository is None:
            return None
        files = repository.commits[repository.find(revision)]
        listed = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": digest(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 134}
            listed.append(entry)
        return self.answer(200, listed)

    def resolve(self, name, revision, file):
        repository = self.readable(name)
        if repository is None:
            return None
        if repository.gated and self.role is None:
            return self.answer(401, code="GatedRepo")
        sha = repository.find(revision)
        if sha is None:
            return self.answer(404, code="RevisionNotFound")
        content = repository.commits[sha].get(file)
        if content is None:
            return self.answer(404, code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"ETag": f'"{digest(content)}"', "X_Repo_Commit": sha}
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, start = 206, int(match[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content = content[start:]
        if self.command == "GET" and file in self.server.cuts:
            kept = self.server.cuts.pop(file)
            headers["Content_Length"] = len(content)
            self.answer(status, content[:kept], **headers)
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.answer(status, content, **headers)

    def validate_card(self):
        assert json.loads(self.body)["content"].startswith("---\n")
        return self.answer(200, {"errors": [], "warnings": []})

    def whoami(self):
        if self.role is None:
            return self.answer(401)
        token = {"displayName": "test", "role": self.role}
        return self.answer(
            200,
            {
                "type": "user",
                "name": "ada",
                "orgs": [{"name": "lab"}],
                "auth": {"type": "access_token", "accessToken": token},
            },
        )

    def may_write(self):
        if self.role == "write":
            return True
        self.answer(403, {"error": "no right to write"})
        return False

    def create(self):
        values = json.loads(self.body)
        name = f"{values['organization']}/{values['name']}"
        if not self.may_write():
            return None
        private = values.get("private") or values.get("visibility") == "private"
        self.server.add(name, {".gitattributes": b""}, private=private)
        return self.answer(200, {"url": f"{self.server.url}/{name}", "id": name})

    def branch(self, name, branch):
        repository = self.server.repositories[name]
        if branch in repository.branches:
            return self.answer(409)
        repository.branches[branch] = repository.branches["main"]
        return self.answer(200, {})

    def preupload(self, name, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self.answer(200, {"files": files})

    def batch(self, name):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}}
            for item in json.loads(self.body)["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid):
        assert digest(self.body) == oid
        self.server.objects[oid] = self.body
        return self.answer(200)

    def commit(self, name, branch):
        if not self.may_write():
            return None
        repository = self.server.repositories[name]
        files = dict(repository.commits[repository.branches[branch]])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, branch)
        return self.answer(200, {"commitUrl": f"{self.server.url}/{name}", "commitOid": sha})


ROUTES = {
    "GET /api/models/NAME": Handler.info,
    "GET /api/models/NAME/revision/(.+)": Handler.info,
    "GET /api/models/NAME/tree/(.+)": Handler.tree,
    "GET|HEAD /NAME/resolve/([^/]+)/(.+)": Handler.resolve,
    "GET /page/.*": lambda handler: handler.answer(200, b"<html>"),
    "GET /api/whoami-v2": Handler.whoami,
    "POST /api/validate-yaml": Handler.validate_card,
    "POST /api/repos/create": Handler.create,
    "POST /api/models/NAME/branch/(.+)": Handler.branch,
    "POST /api/models/NAME/preupload/(.+)": Handler.preupload,
    "POST /NAME.git/info/lfs/objects/batch": Handler.batch,
    "PUT /objects/(.+)": Handler.store,
    "POST /api/models/NAME/commit/(.+)": Handler.commit,
}
"""What answers a request, by its methods and its path."""


@contextlib.contextmanager
def serving():
    """A Hub that answers while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextlib.contextmanager
def using(url, home):
    """Makes huggingface_hub, which reads its environment once, use a Hub, and a cache in `home`."""
    with mock.patch.multiple(
        constants,
        ENDPOINT=url,
        HUGGINGFACE_CO_URL_TEMPLATE=url + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_CACHE=str(home / "hub"),
        HF_TOKEN_PATH=str(home / "token"),
        HF_HUB_OFFLINE=False,
        HF_HUB_DISABLE_XET=True,  # whose protocol the server does not speak
    ):
        yield
