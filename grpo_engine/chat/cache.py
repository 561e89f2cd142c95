"""Replies kept on disk, so that a run that goes on never pays twice.

One JSON object a line, ``{"replies": {key: reply}}``, appended under a lock: several processes may
share a file, each reading what was there when it opened it. A line that a kill has cut short is
dropped when the file is opened, so the replies of one line are there together or not at all (what
was drawn in one batch must be drawn again as one, to the bit). In memory is only where each reply
is: there may be more of them than fit there.
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
        self._places: dict[str, tuple[int, int]] = {}  # of each key's line: offset, length
        self._last: tuple[tuple[int, int] | None, dict[str, str]] = (None, {})  # line read last
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
        return len(self._places)

    def get(self, key: str) -> str | None:
        place = self._places.get(key)
        if place is None:
            return None
        last, replies = self._last
        if place != last:
            offset, length = place
            replies = json.loads(os.pread(self._file.fileno(), length, offset))["replies"]
            self._last = place, replies
        return replies[key]

    def put(self, replies: dict[str, str]) -> None:
        """Keep ``replies`` {key: reply}; they are on the disk when this returns."""
        text = json.dumps({"replies": replies}, ensure_ascii=False) + "\n"
        line = text.encode("utf-8")
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                offset = self._file.seek(0, os.SEEK_END)
                self._file.write(line)
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._places |= dict.fromkeys(replies, (offset, len(line)))

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
                self._take(line, number, end)
                end += len(line)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _take(self, line: bytes, number: int, offset: int) -> None:
        try:
            replies = dict(json.loads(line)["replies"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"cache {self.path}:{number}: no replies of a chat model") from None
        for key in replies:  # two processes asked: the first has been used
            self._places.setdefault(key, (offset, len(line)))
