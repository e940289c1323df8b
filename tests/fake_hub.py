"""A Hub on 127.0.0.1: what huggingface_hub asks of it to create a repo, commit small files, list them and fetch them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class FakeHub(ThreadingHTTPServer):
    """repos: id → branch → commits, each (sha, {path: bytes}), newest last. requests: "METHOD path" in their order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self.visibility: dict[str, str] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.agents: set[str] = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def files(self, repo_id, revision="main"):
        return self.repos[repo_id][revision][-1][1]

    def put(self, repo_id, files, revision="main"):
        """A commit that holds exactly `files`."""
        branch = self.repos.setdefault(repo_id, {}).setdefault(revision, [])
        listing = [len(branch), repo_id, *sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())]
        branch.append((hashlib.sha1(json.dumps(listing).encode()).hexdigest(), dict(files)))
        return branch[-1][0]

    def at(self, repo_id, revision):
        """The commit (sha, files) that a branch or a sha names; None for neither."""
        branches = self.repos[repo_id]
        if revision in branches:
            return branches[revision][-1]
        return next((commit for branch in branches.values() for commit in branch if commit[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _answer(self):
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        self.server.agents.add(self.headers.get("User-Agent", ""))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *map(unquote, match.groups()))
        return self._refuse(404, "", f"no such route: {self.command} {path}")

    def _json(self, value, status=200, **headers):
        self._bytes(json.dumps(value).encode(), status, **{"Content-Type": "application/json", **headers})

    def _bytes(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, code, message):
        self._json({"error": message}, status, **{"X-Error-Code": code, "X-Error-Message": message})

    def _signed_in(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._refuse(401, "", "Invalid credentials in Authorization header")
        return False

    def _commit(self, repo_id, revision):
        """The commit asked for; None once a refusal was sent."""
        hidden = self.server.visibility.get(repo_id) == "private" and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo_id not in self.server.repos or hidden:
            return self._refuse(401, "RepoNotFound", "Repository not found")
        commit = self.server.at(repo_id, revision)
        return commit if commit else self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def create_repo(self):
        if not self._signed_in():
            return
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repos:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        self.server.put(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.visibility[repo_id] = asked.get("visibility", "public")
        return self._json({"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, repo_id, branch):
        if not self._signed_in():
            return
        branches = self.server.repos[repo_id]
        if branch in branches:
            return self._refuse(409, "", "Reference already exists")
        branches[branch] = list(branches["main"])
        return self._json({})

    def validate(self):
        if json.loads(self.body)["content"].startswith("---\nbroken"):
            return self._json({"errors": [{"message": "not a mapping"}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        if self._commit(repo_id, revision):
            files = json.loads(self.body)["files"]
            self._json({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})

    def commit(self, repo_id, revision):
        if not self._signed_in() or not (before := self._commit(repo_id, revision)):
            return
        files = dict(before[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._refuse(400, "", f"unexpected operation {line['key']}")
        sha = self.server.put(repo_id, files, revision)
        return self._json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def repo_info(self, repo_id, revision="main"):
        if commit := self._commit(repo_id, revision):
            siblings = [{"rfilename": path} for path in commit[1]]
            self._json({"id": repo_id, "modelId": repo_id, "sha": commit[0], "siblings": siblings, "tags": []})

    def tree(self, repo_id, revision):
        if commit := self._commit(repo_id, revision):
            files = commit[1].items()
            rows = [{"type": "file", "path": path, "size": len(content), "oid": _oid(content)} for path, content in files]
            folders = sorted({path.rsplit("/", 1)[0] for path, _ in files if "/" in path})
            self._json([*rows, *({"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders)])

    def file(self, repo_id, revision, path):
        if not (commit := self._commit(repo_id, revision)):
            return
        if path not in commit[1]:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist")
        headers = {"ETag": f'"{_oid(commit[1][path])}"', "X-Repo-Commit": commit[0]}
        return self._bytes(commit[1][path], **headers)


def _oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"([^/]+/[^/]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create_repo),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler.create_branch),
    (rf"POST /api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    (rf"GET /api/models/{_REPO}", _Handler.repo_info),
    (rf"GET /api/models/{_REPO}/revision/([^/]+)", _Handler.repo_info),
    (rf"GET /api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
)
