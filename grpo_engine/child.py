"""What a process of ours and its parent share: frames over a socket, a lifeline, errors in words. A
leaf of the standard library: workers start in a tenth of a second.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import socket
import struct
import traceback
from typing import Any

LENGTH = struct.Struct("!Q")
MAX_MESSAGE_CHARS = 500


def die_with(lifeline_fd: int) -> None:
    """Have the kernel kill this process's group when the other end of the lifeline, a pipe, closes:
    SIGIO, whose default action is to kill, reaches it even in a C loop."""
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())  # its children die as well
    flags = fcntl.fcntl(lifeline_fd, fcntl.F_GETFL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, flags | os.O_NONBLOCK | os.O_ASYNC)
    try:
        if os.read(lifeline_fd, 1) == b"":  # the parent was gone before the signal was armed
            os._exit(1)
    except BlockingIOError:
        return


def framed(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def send(channel: socket.socket, message: Any) -> None:
    channel.sendall(framed(pickle.dumps(message)))


def receive(channel: socket.socket) -> Any:
    """The next message, or None when the other end has closed."""
    header = _exactly(channel, LENGTH.size)
    if header is None:
        return None
    body = _exactly(channel, LENGTH.unpack(header)[0])
    return None if body is None else pickle.loads(body)


def _exactly(channel: socket.socket, size: int) -> bytearray | None:
    received = bytearray()
    while len(received) < size:
        piece = channel.recv(min(size - len(received), 1 << 20))
        if not piece:
            return None
        received += piece
    return received


def describe(error: BaseException) -> str:
    """``ValueError: why (file.py:12)`` on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return text[:MAX_MESSAGE_CHARS] + place
