"""A loopback Hub: as much of its HTTP as `huggingface_hub` uses to make repositories, upload and download.

Files go to large storage as on the Hub, by their suffix; a commit whose parent is not the head is refused.
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, OWNER = "hf_loopback", "org"
LARGE = ".safetensors"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Branches of commits; a commit is its id and its files, name -> content."""

    def __init__(self, private):
        self.private, self.branches, self.pulls = private, {"main": []}, 0
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch, files, deleted=()):
        old = self.branches[branch][-1][1] if self.branches[branch] else {}
        files = {name: content for name, content in {**old, **files}.items() if name not in deleted}
        oid = hashlib.sha1(f"{branch} {len(self.branches[branch])} {sorted(files)}".encode()).hexdigest()
        self.branches[branch].append((oid, files))
        return oid

    def find(self, revision):
        for name, commits in self.branches.items():
            for number, (oid, files) in enumerate(commits):
                if revision == oid or (revision == name and number == len(commits) - 1):
                    return oid, files
        return None


class HubServer:
    """
    objects: large files that have arrived, by SHA-256. puts: their hashes in the order in which they came.
    hold: hashes are held back from this many on, until the process that sends them is gone; `held` is set then.
    before_commit: called with the repository when a commit arrives. ignored: names that a `.gitignore` keeps out.
    conflict: status of a commit whose parent is not the head.
    """

    def __init__(self):
        self.repositories, self.objects, self.puts, self.requests = {}, {}, [], []
        self.hold, self.held, self.before_commit, self.ignored, self.conflict = None, threading.Event(), None, (), 412
        self.lock, self.started = threading.Lock(), 0
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def files(self, repo, revision="main"):
        return self.repositories[repo].find(revision)[1]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.route()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            valid = json.loads(body)["content"].startswith("---\n")
            return self.answer(200 if valid else 400, {"errors": [] if valid else [{"message": "no YAML"}]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body)["objects"])
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        repository = self.hub.repositories.get(match[1]) if match else None
        if repository is None:
            return self.missing("RepoNotFound")
        return getattr(self, match[2])(match[1], repository, match[3], body)

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != OWNER:
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = Repository(wanted.get("visibility") == "private")
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, name, repository, revision, body):
        _, files = repository.find(revision)
        answers = []
        for file in json.loads(body)["files"]:
            large, old = file["path"].endswith(LARGE), files.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_oid(old)
            mode, ignored = "lfs" if large else "regular", file["path"] in self.hub.ignored
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        self.answer(200, {"files": answers})

    def batch(self, objects):
        answers = []
        for wanted in objects:
            oid = wanted["oid"]
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/storage/{oid}"}}}
            answers.append({**wanted, **({} if oid in self.hub.objects else upload)})
        self.answer(200, {"objects": answers, "transfer": "basic"})

    def do_PUT(self):
        oid = self.route().removeprefix("/storage/")
        with self.hub.lock:
            held = self.hub.hold is not None and self.hub.started >= self.hub.hold
            self.hub.started += not held
        if held:
            while len(self.hub.puts) < self.hub.hold:  # those before it arrive as a whole
                time.sleep(0.01)
            self.hub.held.set()
            self.connection.settimeout(60)
            while self.rfile.read1(2**16):  # until the sender is gone
                pass
            self.close_connection = True
            return None
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.hub.puts.append(oid)
        return self.answer(200, {})

    def commit(self, name, repository, revision, body):
        if self.hub.before_commit:
            self.hub.before_commit(repository)
        lines = [json.loads(line) for line in body.splitlines()]
        head, files = repository.find(revision)
        if lines[0]["value"].get("parentCommit", head) != head:
            return self.answer(
                self.hub.conflict, {"error": "A commit has happened since. Please refresh and try again"}
            )
        added, deleted = {}, []
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                added[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                added[path] = self.hub.objects[line["value"]["oid"]]
            else:
                deleted.append(path)
        branch, extra = revision, {}
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            repository.pulls += 1
            branch = f"refs/pr/{repository.pulls}"
            repository.branches[branch] = [(head, files)]
            extra = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{repository.pulls}"}
        oid = repository.commit(branch, added, deleted)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, **extra})

    def branch(self, name, repository, branch, body):
        if branch in repository.branches:
            return self.answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = list(repository.branches["main"])
        return self.answer(200, {})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.route()
        match = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+?)(?:/(revision|tree|resolve)/(refs/pr/\d+|[^/]+)(?:/(.+))?)?", path
        )
        repository = self.hub.repositories.get(match[1]) if match else None
        if repository is None:
            return self.missing("RepoNotFound")
        found = repository.find(match[3] or "main")
        if found is None:
            return self.missing("RevisionNotFound")
        oid, files = found
        if match[2] == "resolve":
            if match[4] not in files:
                return self.missing("EntryNotFound")
            return self.send(200, files[match[4]], {"X-Repo-Commit": oid, "ETag": f'"{git_oid(files[match[4]])}"'})
        if match[2] == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": git_oid(content)}
                for file, content in files.items()
                if not match[4] or file.startswith(f"{match[4]}/")
            ]
            return self.answer(200, entries) if entries else self.missing("EntryNotFound")
        siblings = [{"rfilename": file} for file in files]
        return self.answer(200, {"id": match[1], "sha": oid, "private": repository.private, "siblings": siblings})

    def missing(self, code):
        self.send(404, json.dumps({"error": "not found"}).encode(), {"X-Error-Code": code})

    def route(self):
        self.hub.requests.append((self.command, self.path))
        return unquote(urlsplit(self.path).path)

    def answer(self, status, content):
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass
