"""A hub with one data set on the loopback, as far as the `datasets` library asks it."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping


class Hub(http.server.ThreadingHTTPServer):
    """Serves one data set.

    Args:
        name: of the data set, `owner/name`.
        revisions: the commit of a branch or tag, which may change while it is served.
        files: by commit and path.
    """

    def __init__(self, name: str, revisions: Mapping[str, str], files: Mapping[str, Mapping[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.revisions, self.files = name, revisions, files
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub answers in the block."""
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        match [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]:
            case ["api", "datasets", owner, name, *asked] if f"{owner}/{name}" == self.server.name:
                self._about(asked or ["revision", "main"], "recursive=true" in url.query)
            case ["datasets", owner, name, "resolve", revision, *path] if f"{owner}/{name}" == self.server.name:
                self._file(revision, "/".join(path))
            case ["api", "datasets", *_]:
                self._missing("RepoNotFound")
            case _:
                self._missing("EntryNotFound")

    do_HEAD = do_GET

    def _about(self, asked: list[str], recursive: bool) -> None:
        commit = self._commit(asked[1])
        if commit is None:
            return self._missing("RevisionNotFound")
        files = self.server.files[commit]
        if asked[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json({"_id": "1", "id": self.server.name, "sha": commit, "siblings": siblings})
        under = "/".join(asked[2:])
        entries: dict[str, dict[str, object]] = {}
        for path, content in files.items():
            rest = path.removeprefix(f"{under}/" if under else "")
            if under and rest == path:
                continue
            if "/" in rest and not recursive:
                folder = path.removesuffix(rest) + rest.split("/")[0]
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            else:
                entries[path] = {"type": "file", "oid": _oid(content), "size": len(content), "path": path}
        return self._json(list(entries.values())) if entries else self._missing("EntryNotFound")

    def _file(self, revision: str, path: str) -> None:
        commit = self._commit(revision)
        content = self.server.files.get(commit or "", {}).get(path)
        if content is None:
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": str(commit), "Accept-Ranges": "bytes"}
        if part := self.headers.get("Range"):
            first, last = part.removeprefix("bytes=").split("-")
            stop = min(int(last) + 1, len(content)) if last else len(content)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            return self._send(206, content[int(first) : stop], headers)
        return self._send(200, content, headers)

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.server.files else self.server.revisions.get(revision)

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _missing(self, what: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": what})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
