"""The second tier of the sandbox: what bubblewrap does, by system calls from Python.

Used where bubblewrap is missing but user namespaces are allowed. ``sandbox.py`` sends this file as
source text to a bare interpreter; its one argument is JSON: ``binds``, ``symlinks``, ``sizes`` (MiB
of each tmpfs), ``inodes``, ``status_fd``, ``seccomp_fd`` and ``command``. The outer process reports
``{"child-pid": N}`` like bubblewrap and waits; the child becomes process 1 of the new namespaces.
"""

import ctypes
import json
import os
import signal
import struct
import sys

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
_DETACH = 2
_CLONE_NEW = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 24, 22, 38
_LAST_CAPABILITY = 63
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
# Covered by our tmpfs, in our own mount namespace only. No interpreter lives there.
_NEW_ROOT = "/sys"

libc = ctypes.CDLL(None, use_errno=True)


def checked(name, result):
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def text(value):
    return None if value is None else value.encode()


def mount(source, target, kind=None, flags=0, options=None):
    arguments = text(source), text(target), text(kind), ctypes.c_ulong(flags), text(options)
    checked(f"mount {target}", libc.mount(*arguments))


def read_only(target):
    """Make ``target`` and every mount below it read-only, without set-uid and devices."""
    attributes = struct.pack("=QQQQ", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    arguments = _MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, 32
    checked("mount_setattr", libc.syscall(*arguments))


def new_namespaces():
    uid, gid = os.getuid(), os.getgid()
    checked("unshare", libc.unshare(_CLONE_NEW))
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    with open("/proc/self/gid_map", "w") as file:
        file.write(f"{gid} {gid} 1")


def build_root(plan):
    mount(None, "/", None, _REC | _PRIVATE)
    mount("tmpfs", _NEW_ROOT, "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=1000,mode=0755")
    # Before the binds: an interpreter under /tmp must not be covered.
    for path, size in plan["sizes"].items():
        os.makedirs(_NEW_ROOT + path, exist_ok=True)
        options = f"size={size}m,nr_inodes={plan['inodes']},mode=0755"
        mount("tmpfs", _NEW_ROOT + path, "tmpfs", _NOSUID | _NODEV, options)
    for path in plan["binds"]:
        target = _NEW_ROOT + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        mount(path, target, None, _BIND | _REC)
        read_only(target)
    for path, destination in plan["symlinks"]:
        os.symlink(destination, _NEW_ROOT + path)
    os.mkdir(_NEW_ROOT + "/proc")
    for name in ("null", "zero", "full", "random", "urandom"):
        open(f"{_NEW_ROOT}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{_NEW_ROOT}/dev/{name}", None, _BIND)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink("/proc/self/fd" + target, f"{_NEW_ROOT}/dev/{name}")


def enter_root():
    mount("proc", _NEW_ROOT + "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    os.chdir(_NEW_ROOT)
    if os.uname().machine not in _PIVOT_ROOT:
        raise OSError(f"the number of pivot_root on {os.uname().machine} is not known")
    checked("pivot_root", libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."))
    checked("umount2", libc.umount2(b".", _DETACH))
    os.chdir("/work")
    mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def give_up_privileges(bpf):
    for capability in range(_LAST_CAPABILITY + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # past the kernel's last one: EINVAL
    checked("no_new_privs", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if bpf:
        code = ctypes.create_string_buffer(bpf, len(bpf))
        program = struct.pack("HxxxxxxP", len(bpf) // 8, ctypes.addressof(code))
        checked("seccomp", libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0))


def main():
    plan = json.loads(sys.argv[1])
    checked("prctl", libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    with open(plan["seccomp_fd"], "rb") as file:
        bpf = file.read()
    new_namespaces()
    build_root(plan)
    child = os.fork()
    if child == 0:
        os.close(plan["status_fd"])
        checked("prctl", libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        os.setsid()
        enter_root()
        give_up_privileges(bpf)
        # The capabilities end here: the user is not 0, in its own namespace either.
        os.execv(plan["command"][0], plan["command"])
    os.write(plan["status_fd"], json.dumps({"child-pid": child}).encode())
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
