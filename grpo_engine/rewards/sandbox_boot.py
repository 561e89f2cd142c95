"""What runs inside the sandbox: process 1, and below it the driver of one program.

``sandbox.py`` sends this file as source text to a bare interpreter, so it needs nothing but the
standard library and imports nothing of ours. It gets code and inputs; **expected values never come
here**, and whatever it reports is only ever treated as plain data.

The first process reads the job (8-byte length, JSON) from the channel, forks, and waits: it is
process 1 of its namespace, so its exit takes everything with it, and the forked child, which runs
foreign code, cannot be process 1 itself (such a process is immune to most signals). Jobs:

* ``program``: run the code as ``__main__``; the channel is closed first.
* ``candidate``: define the code's functions, then answer one call per line.
* ``check``: run a trusted test whose ``candidate`` asks for each call over the channel.

Values travel as tagged JSON: null, booleans, integers below 2**63, finite floats, strings and
lists as themselves; every other value as an object with one key, its type.
"""

import builtins
import contextlib
import json
import math
import os
import resource
import socket
import sys
import types

MAX_DEPTH = 100
MAX_INT_BITS = 1 << 17
_TAGS = ("tuple", "set", "frozenset", "dict", "int", "float", "complex", "bytes")
# These would end a caller's loop early instead of failing its test.
_DISGUISED = ("StopIteration", "StopAsyncIteration", "GeneratorExit")


class NotPlainError(ValueError):
    """A value that has no plain-data form: another type, too deep, or too large."""


def encode(value, depth=MAX_DEPTH):
    """``value`` as JSON-ready plain data. Subclasses are reduced to their built-in base."""
    if depth == 0:
        raise NotPlainError("nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__add__(value, 0)
        if number.bit_length() < 64:
            return number
        if number.bit_length() > MAX_INT_BITS:
            raise NotPlainError("integer too large")
        return {"int": hex(number)}
    if isinstance(value, float):
        number = float.__pos__(value)
        return number if math.isfinite(number) else {"float": repr(number)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"dict": [[encode(k, depth - 1), encode(v, depth - 1)] for k, v in pairs]}
    for base in (list, tuple, set, frozenset):
        if isinstance(value, base):
            items = [encode(item, depth - 1) for item in base.__iter__(value)]
            return items if base is list else {base.__name__: items}
    raise NotPlainError("a value of type " + type(value).__name__)


def decode(plain, depth=MAX_DEPTH):
    """The value that ``encode`` described. Raises NotPlainError for what it cannot have written."""
    if depth == 0:
        raise NotPlainError("nested too deeply")
    if plain is None or isinstance(plain, (bool, int, float, str)):
        return plain
    if isinstance(plain, list):
        return [decode(item, depth - 1) for item in plain]
    if not isinstance(plain, dict) or len(plain) != 1 or next(iter(plain)) not in _TAGS:
        raise NotPlainError("not tagged plain data")
    ((tag, content),) = plain.items()
    try:
        if tag == "int":
            return int(content, 16)
        if tag == "float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content]
        if tag == "bytes":
            return bytes.fromhex(content)
        if tag == "complex":
            return complex(decode(content[0], 2), decode(content[1], 2))
        if tag == "dict":
            return {decode(k, depth - 1): decode(v, depth - 1) for k, v in content}
        return getattr(builtins, tag)(decode(item, depth - 1) for item in content)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise NotPlainError("malformed " + tag) from error


class Channel:
    """One JSON document a line over a socket."""

    def __init__(self, sock):
        self.socket = sock
        self.lines = sock.makefile("rb")

    def send(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self):
        line = self.lines.readline()
        return json.loads(line) if line else None

    def close(self):
        self.lines.close()
        self.socket.close()


def set_limits(limits):
    """Set inside the user namespace: set outside, parallel sandboxes would share NPROC."""
    for name, value in limits.items():
        which = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(which)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(which, (value, value))


def module(name):
    """A fresh module under ``name``, where pickle and dataclasses look for it."""
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made.__dict__


def run_program(code):
    namespace = module("__main__")
    sys.argv = ["solution.py"]
    builtins.exit = builtins.quit = sys.exit  # made by the module site, which is not loaded
    exec(compile(code, "solution.py", "exec", dont_inherit=True), namespace)


def serve_candidate(job, channel):
    namespace = module("solution")
    builtins.exit = builtins.quit = sys.exit
    exec(compile(job["prelude"], "prelude.py", "exec", dont_inherit=True), namespace)
    exec(compile(job["code"], "solution.py", "exec", dont_inherit=True), namespace)
    name = job["entry_point"]
    function = namespace[name] if name in namespace else getattr(namespace["Solution"](), name)
    while (request := channel.receive()) is not None:
        try:
            value = function(*decode(request["args"]), **decode(request["kwargs"]))
            reply = {"value": encode(value)}
        except Exception as error:
            reply = {"raised": type(error).__name__, "message": str(error)[:500]}
        channel.send(reply)


class Unusable(BaseException):
    """The test itself cannot be run this way, whatever the candidate."""


def run_check(job, channel):
    unusable = []

    def candidate(*args, **kwargs):
        try:
            request = {"args": encode(list(args)), "kwargs": encode(kwargs)}
        except NotPlainError as error:
            unusable.append("passes the candidate " + str(error))
            raise Unusable from error
        channel.send(request)
        reply = channel.receive()
        if "value" in reply:
            return decode(reply["value"])
        kind = getattr(builtins, reply["raised"], None)
        plain = isinstance(kind, type) and issubclass(kind, Exception)
        if not plain or reply["raised"] in _DISGUISED:
            kind = RuntimeError
        try:
            error = kind(reply["message"])
        except TypeError:  # UnicodeDecodeError and the like want more arguments
            error = RuntimeError(reply["message"])
        raise error

    namespace = module("test")
    namespace[job["entry_point"]] = candidate
    try:
        exec(compile(job["code"], "test.py", "exec", dont_inherit=True), namespace)
        check = namespace["check"]
    except BaseException as error:
        unusable.append(f"{type(error).__name__}: {error}")
        check = None
    failure = None
    if check is not None:
        try:
            check(candidate)
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"[:500]
    channel.send({"done": {"failure": failure, "unusable": unusable[0] if unusable else None}})


def run_child(job, channel):
    set_limits(job["limits"])
    channel.send("ready")
    if job["kind"] == "program":
        channel.close()
        run_program(job["code"])
    elif job["kind"] == "candidate":
        serve_candidate(job, channel)
    else:
        run_check(job, channel)


def main():
    # Should the machine run out of memory, this goes first. /proc is read-only in some containers,
    # and no wall depends on it.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    sock = socket.socket(fileno=int(sys.argv[1]))
    length = int.from_bytes(sock.recv(8, socket.MSG_WAITALL), "big")
    job = json.loads(sock.recv(length, socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        run_child(job, Channel(sock))
        return  # the interpreter ends as after any program: threads joined, atexit run
    sock.close()
    while True:
        ended, status = os.wait()  # orphans come here too
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
