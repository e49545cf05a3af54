"""Builds walls around a fresh interpreter, then runs the cell inside them. Standard library only; never imported.

In: settings and the text of sandbox_cell.py, on the command line: it runs as `python -c`, so it needs no file of the
project inside the walls. What it lists is allowed and the rest is refused, of system calls as of files: a kernel or a
Python newer than this file opens no new door.
"""

import ctypes
import json
import os
import resource
import signal
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Any

NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

# unshare(2), in the order user, mount, process, network, IPC, host name, cgroup
NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x2, 0x4, 0x1000, 0x4000, 0x40000, 0x2
MOUNT_ATTR_RDONLY_NOSUID_NODEV = 0x1 | 0x2 | 0x4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_PIVOT_ROOT, SYS_MOUNT_SETATTR = 155, 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_READ_FILE, LANDLOCK_READ_DIR = 1 << 2, 1 << 3
# By version: how many rights to files it knows; later ones as 5. Before 3 nothing forbids O_RDONLY | O_TRUNC.
LANDLOCK_RIGHTS = {3: 15, 4: 15, 5: 16}

AUDIT_ARCH_X86_64 = 0xC000003E
OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | 0o20000000  # the last: O_TMPFILE
ALLOWED_SYSTEM_CALLS = {  # x86-64 numbers; enough to compute, to read modules, and to talk through pipes that are open
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8, "mmap": 9, "mprotect": 10,
    "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "readv": 19,
    "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39,
    "exit": 60, "wait4": 61, "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrusage": 98,
    "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
    "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "getrandom": 318,
    "statx": 332, "faccessat2": 439,
}  # fmt: skip

# The last tier has no wall in the kernel; Python itself refuses what it announces (PEP 578), but for these.
ALLOWED_EVENTS = {
    "import", "exec", "compile", "marshal.loads", "builtins.id", "object.__getattr__", "object.__setattr__",
    "object.__delattr__", "function.__new__", "array.__new__", "sys._getframe", "sys._getframemodulename",
    "sys.excepthook", "sys.unraisablehook", "time.sleep",
}  # fmt: skip
REFUSED_MODULES = {
    "ctypes", "_ctypes", "_posixsubprocess", "_posixshmem", "_multiprocessing", "_socket", "_ssl", "_sqlite3", "_dbm",
    "_gdbm", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters", "mmap", "resource", "fcntl",
    "readline",
}  # fmt: skip
UNANNOUNCED_FUNCTIONS = {
    "mkfifo", "mknod", "setsid", "setpgid", "setpgrp", "memfd_create", "nice", "dup2", "pipe", "pipe2", "openpty",
}  # fmt: skip

libc: Any = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: object) -> int:
    """The result of a function of libc. Raises: OSError: it failed."""
    result = getattr(libc, function)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function}: {os.strerror(error)}")
    return result


def system_call(number: int, *arguments: object) -> int:
    """The result of a system call; integers are passed in full width. Raises: OSError: it failed."""
    wide = (ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments)
    return call("syscall", ctypes.c_long(number), *wide)


def enter_namespaces(readable: Sequence[str]) -> None:
    """Returns in a child: process 1 of namespaces of its own, whose files are `readable` and nothing else."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_NAMESPACES)
    for name, content in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    call("mount", None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    sources = {path: os.open(path, os.O_PATH) for path in readable}
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV), b"size=1m,mode=755")
    for path, source in sources.items():
        target, is_folder = "/tmp" + path, stat.S_ISDIR(os.fstat(source).st_mode)
        os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
        if not is_folder:
            open(target, "x").close()
        bind = ctypes.c_ulong(MS_BIND | MS_REC)
        call("mount", f"/proc/self/fd/{source}".encode(), target.encode(), None, bind, None)
        os.close(source)
    os.chdir("/tmp")
    system_call(SYS_PIVOT_ROOT, b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY_NOSUID_NODEV, 0, 0, 0)
    system_call(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))
    if child := os.fork():
        os.waitpid(child, 0)
        os._exit(0)


def enter_landlock(readable: Sequence[str]) -> None:
    """From here on this process and its children can only read, and only what is below `readable`."""
    version = system_call(SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < min(LANDLOCK_RIGHTS):
        raise OSError(f"Landlock's version {version} does not know truncation; Linux 6.2 and later do")
    handled = struct.pack("Q", (1 << LANDLOCK_RIGHTS[min(version, max(LANDLOCK_RIGHTS))]) - 1)
    ruleset = system_call(SYS_LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
    for path in readable:
        rights = LANDLOCK_READ_FILE | (LANDLOCK_READ_DIR if os.path.isdir(path) else 0)
        parent = os.open(path, os.O_PATH)
        system_call(SYS_LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, parent), 0)
        os.close(parent)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    system_call(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def become_nobody() -> None:
    """The superuser becomes a user without rights, whom the limit on processes binds."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    library = os.path.dirname(os.__file__)
    if not os.access(library, os.R_OK | os.X_OK):
        raise PermissionError(f"user {os.geteuid()} cannot read {library}, the library of the interpreter")


def drop_capabilities() -> None:
    """Whatever user it is, inside or outside a user namespace, this process has its rights to files only."""
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def refuse_system_calls() -> None:
    """From here on a system call that is not listed fails with EPERM."""
    if os.uname().machine != "x86_64":
        raise OSError(f"the filter of system calls is written for x86_64, this is {os.uname().machine}")
    load, equal, answer = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    number_at, architecture_at = 0, 4
    program = [
        (load, 0, 0, architecture_at), (equal, 1, 0, AUDIT_ARCH_X86_64), (answer, 0, 0, kill), (load, 0, 0, number_at),
    ]  # fmt: skip
    for number in ALLOWED_SYSTEM_CALLS.values():
        program += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    program.append((answer, 0, 0, refuse))
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(text))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, 2, header, 0, 0)


def refuse_events(readable: Sequence[str]) -> None:
    """From here on Python refuses what is not listed. Not a wall: it stops mistakes, and tricks that are known."""
    for name in UNANNOUNCED_FUNCTIONS:
        for module in ("os", "posix"):
            vars(sys.modules[module]).pop(name, None)
    for name in REFUSED_MODULES & sys.modules.keys():
        del sys.modules[name]

    # All it needs is bound as a default: what a program finds in the globals of a frame of this it changes in vain.
    def refuse(
        event, arguments, allowed=frozenset(ALLOWED_EVENTS), modules=frozenset(REFUSED_MODULES), write=OPEN_TO_WRITE,
        below=tuple(f"{path}/" for path in readable), text=str, number=int, kind=type, error=PermissionError,
    ):  # fmt: skip
        if event in {"open", "os.listdir", "os.scandir"}:
            path = arguments[0]
            if kind(path) is number:  # it is open already
                return
            reads = event != "open" or not arguments[2] & write
            if reads and kind(path) is text and path.startswith(below) and ".." not in path:
                return
        elif event in allowed and not (event == "import" and arguments[0] in modules):
            return
        raise error("refused by the sandbox")

    sys.addaudithook(refuse)


def set_limits(limits: dict[str, int]) -> None:
    """One process, one thread, no file written; memory and processor time as given."""
    seconds = limits["cpu_seconds"]
    for name, soft, hard in (
        ("RLIMIT_CPU", seconds, seconds + 1),
        ("RLIMIT_AS", limits["memory_bytes"], limits["memory_bytes"]),
        ("RLIMIT_STACK", 8 << 20, 8 << 20),
        ("RLIMIT_NOFILE", 32, 32),
        *((name, 0, 0) for name in ("RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_CORE", "RLIMIT_MSGQUEUE")),
    ):
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def main() -> None:
    settings, cell = json.loads(sys.argv[1]), sys.argv[2]
    tier, readable = settings["tier"], settings["readable"]
    null = os.open(os.devnull, os.O_RDWR)  # while there is one
    if tier == "namespaces":
        enter_namespaces(readable)
    elif tier == "landlock":
        enter_landlock(readable)
    elif tier == "rlimits":
        become_nobody()
    else:
        assert tier == "bubblewrap", tier  # which has built its walls already
    drop_capabilities()

    def seal(parent: int | None = None) -> None:
        """The inner walls, which each process of the cell puts up for itself, since after them none can be made.

        Args:
            parent: the process with which this one ends.
        """
        if parent is not None:
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it ended before
                os._exit(1)
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        set_limits(settings["limits"])
        if tier == "rlimits":
            refuse_events(readable)
        else:
            refuse_system_calls()
        sys.argv.clear()
        vars(sys.modules["__main__"]).clear()

    namespace: dict[str, Any] = {"__name__": "cell"}
    exec(compile(cell, "<cell>", "exec"), namespace)
    namespace["main"](seal, null)


if __name__ == "__main__":
    main()
