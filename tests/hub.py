"""The hub, served from this machine, and a program that asks it."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path


class Hub(http.server.BaseHTTPRequestHandler):
    """The three questions that the hub's client asks: which commit, which files, and a file."""

    repositories: dict[str, Path]
    requests: list[str]

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        if path == "stop":
            self.answer(b"")
            threading.Thread(target=self.server.server_close).start()
            self.server.shutdown()
            return
        is_api = path.startswith(("api/models/", "api/datasets/"))
        owner, name, *rest = path.removeprefix("api/models/").removeprefix("api/").removeprefix("datasets/").split("/")
        root = self.repositories.get(f"{owner}/{name}")
        if root is None:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
            return
        files = [file for file in sorted(root.rglob("*")) if file.is_file()]
        if is_api and rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": str(file.relative_to(root)), "size": file.stat().st_size, "oid": "0" * 40}
                for file in files
            ]
            self.answer(json.dumps(listing).encode())
        elif is_api:
            names = [{"rfilename": str(file.relative_to(root))} for file in files]
            answer = {"id": f"{owner}/{name}", "modelId": f"{owner}/{name}", "sha": "a" * 40, "siblings": names}
            self.answer(json.dumps(answer).encode())
        else:
            file = root.joinpath(*rest[2:])
            self.requests.append(f"{self.command} {name}/{'/'.join(rest[2:])}")
            self.answer(file.read_bytes(), 200, {"ETag": f'"{abs(hash(file))}"', "X-Repo-Commit": "a" * 40})

    do_HEAD = do_GET

    def answer(self, body, status=200, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def ask_hub(tmp_path: Path, repositories: dict[str, Path], client: str) -> tuple[list[str], set[str]]:
    """Run a program that asks the hub, served here: the lines that it prints, and the files that it downloads."""
    handler = type("Served", (Hub,), {"repositories": repositories, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-W", "error", "-c", client]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), {request for request in handler.requests if request.startswith("GET")}
