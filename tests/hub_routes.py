"""The HTTP side of the test hub: which request is answered with what."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from hub import Blob, Fault, Hub, Repository

PAGE = b"<!DOCTYPE html><html><body>Log in to this network first.</body></html>"


class Refused(Exception):
    """An answer that is an error: status, and the code and message that the hub sends in headers."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class Routes(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer it, or let it go wrong where a fault says so."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = " ".join(filter(None, [self.command, self.path, self.headers.get("Range")]))
        self.hub.requests.append(request)
        self.fault = self.hub.fault(request)
        self.hub.stopped.wait(self.hub.latency_s)
        try:
            if self.fault is not None:
                self.go_wrong(self.fault)
            self.route()
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            retry = self.fault.retry_after if self.fault is not None and refused.status == 429 else None
            headers |= {"Retry-After": str(retry)} if retry is not None else {}
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other side has gone
                self.json({"error": refused.message}, refused.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the other side has seen enough

    do_HEAD = do_POST = do_PUT = do_GET

    def go_wrong(self, fault: Fault) -> None:
        """Refuse, or wait; ``cut`` and ``html`` go wrong in the answer."""
        if fault.kind == "slow":
            self.hub.stalls()
            self.hub.stopped.wait(fault.seconds)
        if isinstance(fault.kind, int):
            code = {403: "GatedRepo", 404: "EntryNotFound"}.get(fault.kind, "")
            message = {401: "Invalid credentials in Authorization header", 500: "Internal Error - we're working on it"}
            raise Refused(fault.kind, code, message.get(fault.kind, ""))

    def route(self) -> None:
        """Find what answers the path. A revision's slashes are escaped, so that the path is split before unescaping."""
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.user = self.signed_in()
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            repository, rest = self.repository(parts[1], parts[2:])
            self.of_repository(repository, rest)
        elif parts[0] == "api":
            self.of_hub("/".join(parts[1:]))
        elif parts[0] == "blobs":
            self.uploaded(parts[1]) if self.command == "PUT" else self.file(self.blob(parts[1]), {})
        else:
            kind = parts[0] if parts[0] == "datasets" else "models"
            repository, rest = self.repository(kind, parts[kind == "datasets" :])
            self.of_git(repository, rest)

    def blob(self, sha256: str) -> Blob:
        """A large file. What a thread of an earlier test still asks for is gone with that test's repositories."""
        found = self.hub.blobs.get(sha256)
        if found is None:
            raise Refused(404, "EntryNotFound", f"no file has the digest {sha256}")
        return found

    def signed_in(self) -> tuple[str, str] | None:
        """User and role of the token, if one was sent."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repository(self, kind: str, parts: list[str]) -> tuple[Repository, list[str]]:
        """The repository that a path begins with, and the rest of the path."""
        for length in (2, 1):
            name = "/".join(parts[:length]).removesuffix(".git")
            found = self.hub.repositories.get((kind, name))
            if found is not None:
                if found.private and self.user is None:
                    break
                if found.gated and self.user is None:
                    raise Refused(401, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted.")
                return found, parts[length:]
        raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")

    def of_hub(self, path: str) -> None:
        """What is asked of no repository."""
        if path == "whoami-v2":
            if self.user is None:
                raise Refused(401, "", "Invalid username or password.")
            name, role = self.user
            self.json({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})
        elif path == "validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif path == "repos/create":
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or (self.user or [''])[0]}/{asked['name']}"
            self.may_write(name)
            made = ("models", name) not in self.hub.repositories
            if made:
                self.hub.add("models", name, {".gitattributes": ""}, private=asked.get("visibility") == "private")
            self.json({"url": f"{self.hub.address}/{name}"}, 200 if made else 409)
        else:
            raise Refused(404, "", f"no such page: {path}")

    def of_repository(self, repository: Repository, rest: list[str]) -> None:
        """The API of one repository."""
        what = rest[0] if rest else "revision"
        if what == "revision":
            self.info(repository, rest[1] if rest else "main")
        elif what == "refs":
            refs = [
                {"name": name.removeprefix("refs/convert/"), "ref": name, "targetCommit": commit}
                for name, commit in repository.branches.items()
            ]
            converts = [ref for ref in refs if ref["ref"].startswith("refs/convert/")]
            branches = [ref for ref in refs if ref not in converts]
            self.json({"branches": branches, "converts": converts, "tags": []})
        elif what == "tree":
            self.tree(repository, rest[1], "/".join(rest[2:]))
        elif what == "paths-info":
            commit = self.commit(repository, rest[1])
            asked = parse_qs(self.body.decode())["paths"]
            found = self.hub.entries(repository.commits[commit], commit, "", True)
            self.json([found[path] for path in asked if path in found])
        elif what == "auth-check":
            if rest[1:] == ["write"]:
                self.may_write(repository.name)
            self.json({})
        elif what == "preupload":
            self.may_write(repository.name)
            files = json.loads(self.body)["files"]
            modes = [(file["path"], "lfs" if file["size"] >= self.hub.large else "regular") for file in files]
            self.json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})
        elif what == "commit":
            self.may_write(repository.name)
            self.committed(repository, rest[1])
        else:
            raise Refused(404, "", f"no such page: {what}")

    def of_git(self, repository: Repository, rest: list[str]) -> None:
        """A file at a revision, or where large files are to be sent."""
        if rest[0] == "resolve":
            commit = self.commit(repository, rest[1])
            blob = repository.commits[commit].get("/".join(rest[2:]))
            if blob is None:
                raise Refused(404, "EntryNotFound", "Entry not found")
            self.file(blob, {"X-Repo-Commit": commit})
        elif rest == ["info", "lfs", "objects", "batch"]:
            self.may_write(repository.name)
            objects = json.loads(self.body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/blobs/{entry['oid']}"}}
            self.json({"transfer": "basic", "objects": objects})
        else:
            raise Refused(404, "", "no such page")

    def commit(self, repository: Repository, revision: str) -> str:
        """The commit behind a revision."""
        found = repository.resolve(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def may_write(self, name: str) -> None:
        """Refuse who may not."""
        if self.user is None:
            raise Refused(401, "", "Invalid username or password.")
        if self.user != (name.split("/")[0], "write"):
            raise Refused(403, "", "You don't have the rights to create a model under this namespace")

    def info(self, repository: Repository, revision: str) -> None:
        """Name, commit and files."""
        commit = self.commit(repository, revision)
        files = [{"rfilename": path} for path in repository.commits[commit]]
        facts = {"private": repository.private, "gated": repository.gated, "tags": [], "siblings": files}
        self.json({"id": repository.name, "sha": commit, **facts})

    def tree(self, repository: Repository, revision: str, folder: str) -> None:
        """One page of a folder's entries, with the address of the next."""
        commit = self.commit(repository, revision)
        recursive = self.query.get("recursive") == "true"
        found = list(self.hub.entries(repository.commits[commit], commit, folder, recursive).values())
        if folder and not found:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        first = int(self.query.get("cursor", 0))
        page = found[first : first + self.hub.page_size]
        headers = {}
        if first + len(page) < len(found):
            kept = "&".join(f"{key}={value}" for key, value in self.query.items() if key != "cursor")
            address = f"{self.hub.address}{urlsplit(self.path).path}?{kept}&cursor={first + len(page)}"
            headers["Link"] = f'<{address}>; rel="next"'
        self.json(page, 200, headers)

    def committed(self, repository: Repository, revision: str) -> None:
        """Make a commit of the lines sent, of which the first is its message."""
        files = {}
        for line in self.body.splitlines()[1:]:
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = repository.commit(files, revision)
        self.json({"commitUrl": f"{self.hub.address}/{repository.name}/commit/{commit}", "commitOid": commit})

    def uploaded(self, oid: str) -> None:
        """Keep a large file until it is committed."""
        self.hub.uploads[oid] = self.body
        self.json({})

    def file(self, blob: Blob, headers: dict[str, str]) -> None:
        """A file, or a part of it; a large one that was asked for by its name is somewhere else."""
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.size >= self.hub.large and "X-Repo-Commit" in headers:
            linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            self.hub.blobs[blob.sha256] = blob
            self.answer(302, headers | linked | {"Location": f"{self.hub.store}/blobs/{blob.sha256}"}, 0)
            return
        headers["ETag"] = f'"{blob.oid}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2] or blob.size)) if wanted else (0, blob.size)
        last = min(last, blob.size - 1)
        if first > last and blob.size:
            raise Refused(416)
        headers |= {"Content-Range": f"bytes {first}-{last}/{blob.size}"} if wanted else {}
        self.answer(206 if wanted else 200, headers, last - first + 1, blob.read(first, last))

    def json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """An answer of the API."""
        body = json.dumps(value).encode()
        self.answer(status, {"Content-Type": "application/json", **(headers or {})}, len(body), [body])

    def answer(self, status: int, headers: dict[str, str], size: int, pieces: Any = ()) -> None:
        """Send it, at the speed of the line; half of it where it is to be cut off, a page where it is to be one."""
        kind = self.fault.kind if self.fault is not None and status < 300 else None
        if kind == "html":
            headers, size, pieces = {"Content-Type": "text/html"}, len(PAGE), [PAGE]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if kind == "drip":
            pieces = (bytes([byte]) for piece in pieces for byte in piece)
        left = size // 2 if kind == "cut" else size
        for piece in pieces if self.command != "HEAD" else ():
            self.hub.wait(len(piece[:left]))
            self.wfile.write(piece[:left])
            if self.fault is not None and kind == "drip":
                self.hub.stopped.wait(self.fault.seconds)
            left -= len(piece[:left])
        if kind == "cut":
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
