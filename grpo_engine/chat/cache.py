"""Replies kept on disk, so that a run that goes on never pays twice.

One JSON object a line, ``{"replies": {key: reply}}``, appended under a lock: several processes may
share a file, each reading what was there when it opened it. A line that a kill has cut short is
dropped when the file is opened, so the replies of one line are there together or not at all (what
was drawn in one batch must be drawn again as one, to the bit).
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

from grpo_engine.types import UserError


class ReplyCache:
    """``get`` and ``put`` by key. Thread-safe. Raises UserError for a file of something else or
    one that cannot be written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115 (lives as long as the cache)
        except OSError as error:
            raise UserError(f"cache {self.path}: cannot be opened ({error.strerror})") from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def put(self, replies: dict[str, str]) -> None:
        """Keep ``replies`` {key: reply}; they are on the disk when this returns."""
        line = json.dumps({"replies": replies}, ensure_ascii=False) + "\n"
        with self._lock:
            self._replies.update(replies)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._file.write(line.encode("utf-8"))
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._file.seek(0)
            end = 0
            for number, line in enumerate(self._file, start=1):
                if not line.endswith(b"\n"):
                    self._file.truncate(end)
                    break
                end += len(line)
                self._take(line, number)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _take(self, line: bytes, number: int) -> None:
        try:
            replies = dict(json.loads(line)["replies"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"cache {self.path}:{number}: no replies of a chat model") from None
        for key, reply in replies.items():
            self._replies.setdefault(key, reply)  # two processes asked: the first has been used
