"""A server that speaks as much of the Hugging Face hub's protocol as reading one dataset takes."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(name: str, folder: Path) -> Iterator[str]:
    """Serve the files of a folder as the dataset ``name``; yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            if re.fullmatch(rf"/api/datasets/{name}(/revision/[^/]+)?", path):
                siblings = [{"rfilename": file} for file in files]
                self.reply(json.dumps({"id": name, "sha": COMMIT, "private": False, "siblings": siblings}).encode())
            elif path == f"/api/datasets/{name}/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()
                ]
                self.reply(json.dumps(entries).encode())
            elif path.startswith(f"/datasets/{name}/resolve/{COMMIT}/") and path.split("/")[-1] in files:
                self.file(files[path.split("/")[-1]])
            else:
                missing = "EntryNotFound" if name in path else "RepoNotFound"
                self.reply(b"{}", 404, {"X-Error-Code": missing, "X-Error-Message": "not found"})

        def file(self, data: bytes) -> None:
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted and self.command == "GET":
                first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self.reply(data[first : last + 1], 206, headers)
            else:
                self.reply(data, 200, headers)

        def reply(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in (headers or {"Content-Type": "application/json"}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
