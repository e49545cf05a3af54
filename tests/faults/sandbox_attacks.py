"""Programs that try to pass without solving the problem, or to do harm, and the problem that they are given.

The problem is to square a number. Most attacks are attempts: they solve it if and only if they succeed, so that a
failing grade says that the attempt was refused. CANARY, PORT and MARK stand for a file of the host, a port it listens
at, and a name for whatever an attack leaves behind.
"""

import textwrap
from dataclasses import dataclass

from MaxText.evaluation.sandbox import Job

TESTS = "assert square(3) == 9\nassert square(-4) == 16\nassert square(11) == 121\n"
SOLUTION = "def square(x):\n    return x * x\n"


@dataclass(frozen=True)
class Attack:
    """A program; `works_outside` says that a grader without walls, which looks at the exit code, lets it pass."""

    program: str
    works_outside: bool = False


def job(program: str) -> Job:
    return Job(program, TESTS, {"square": "square"})


def attempt(code: str, works_outside: bool = False) -> Attack:
    """A program that squares numbers if `code` raises nothing."""
    body = textwrap.indent(textwrap.dedent(code).strip(), "    ")
    lines = ["done = False", "try:", body, "    done = True", "except BaseException:", "    pass"]
    return Attack("\n".join([*lines, "def square(x):", "    return x * x if done else None", ""]), works_outside)


def through_libc(expression: str, works_outside: bool = False) -> Attack:
    """An attempt that a call of libc does not fail."""
    return attempt(f"import ctypes, os\nlibc = ctypes.CDLL(None)\nassert {expression} >= 0", works_outside)


FORGERIES = {
    "exit when loaded": Attack("import sys\nsys.exit(0)\n", True),
    "exit at once when loaded": Attack("import os\nos._exit(0)\n", True),
    "exit when called": Attack("def square(x):\n    raise SystemExit(0)\n", True),
    "exit at once when called": Attack("import os\ndef square(x):\n    os._exit(0)\n", True),
    "exit from a hook": Attack(
        "import os, sys\nsys.excepthook = lambda *error: os._exit(0)\ndef square(x):\n    return None\n", True
    ),
    "exit from atexit": Attack(
        "import atexit, os\natexit.register(os._exit, 0)\ndef square(x):\n    return None\n", True
    ),
    "equal to everything": Attack(
        "class Same:\n    __eq__ = lambda *_: True\ndef square(x):\n    return Same()\n", True
    ),
    "a number equal to everything": Attack(
        "class Same(int):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = int.__hash__\n"
        "def square(x):\n    return Same(0)\n",
        True,
    ),
    "answers read from the caller": Attack(
        "import sys\ndef square(x):\n    numbers = [c for c in sys._getframe(1).f_code.co_consts if type(c) is int]\n"
        "    return numbers[numbers.index(x) + 1]\n",
        True,
    ),
    "itself replaced in the caller": Attack(
        "import sys\nclass Same:\n    __eq__ = lambda *_: True\n"
        "def square(x):\n    sys._getframe(1).f_globals['square'] = lambda x: Same()\n    return Same()\n",
        True,
    ),
    "builtins replaced": Attack(
        "import builtins\nfor name in dir(builtins):\n    if name not in ('print', '__import__'):\n"
        "        setattr(builtins, name, lambda *a, **k: True)\ndef square(x):\n    return None\n"
    ),
    "assertions that raise nothing": Attack(
        "import builtins\nclass Silent(BaseException):\n    def __new__(cls, *a):\n        raise SystemExit(0)\n"
        "builtins.AssertionError = Silent\ndef square(x):\n    return None\n"
    ),
    "json replaced": Attack(
        "import json, os\njson.dumps = lambda *a, **k: '{\"failure\": null}'\n"
        "json.loads = lambda *a, **k: ['square', [3], {}]\ndef square(x):\n    return None\n"
    ),
    "verdicts to every file descriptor": Attack(
        "import os\nfor line in (b'{\"nonce\": \"' + b'0' * 32 + b'\"}\\n', b'{\"passed\": true}\\n', b'ok\\n'):\n"
        "    for fd in range(64):\n        try:\n            os.write(fd, line)\n        except OSError:\n"
        "            pass\ndef square(x):\n    return None\n"
    ),
    "every nonce there is in memory, to every file descriptor": Attack(
        "import gc, json, os, re, sys\nfound = set()\ndef look(value):\n"
        "    if isinstance(value, (str, bytes)) and re.search('[0-9a-f]{32}', str(value)):\n"
        "        found.update(re.findall('[0-9a-f]{32}', str(value)))\n"
        "frame = sys._getframe()\nwhile frame:\n    for names in (frame.f_locals, frame.f_globals):\n"
        "        for value in list(names.values()):\n            look(value)\n    frame = frame.f_back\n"
        "try:\n    for thing in gc.get_objects():\n        for value in gc.get_referents(thing):\n"
        "            look(value)\nexcept Exception:\n    pass\n"
        "for nonce in found | {'0' * 32}:\n    for fd in range(64):\n        try:\n"
        "            os.write(fd, json.dumps({'nonce': nonce}).encode() + b'\\n')\n        except OSError:\n"
        "            pass\nos._exit(0)\n"
    ),
    "the job read from a file descriptor": attempt("""
        import os
        text = b""
        for fd in range(64):
            try:
                os.lseek(fd, 0, 0)
                text += os.read(fd, 1 << 16)
            except OSError:
                pass
        assert b"nonce" in text
    """),
    "answers sent before they are asked for": Attack(
        "import os, struct\nfor fd in range(3, 64):\n    try:\n"
        "        for text in (b'{\"failure\": null}', b'{\"value\": true}', b'{\"nonce\": null}') * 9:\n"
        "            os.write(fd, struct.pack('Q', len(text)) + text)\n    except OSError:\n        pass\n"
        "def square(x):\n    return None\n"
    ),
    "the walls found in the main module": attempt("""
        import __main__, sys
        frame, found = sys._getframe(), dict(vars(__main__))
        while frame:
            found.update(frame.f_globals)
            frame = frame.f_back
        assert {"libc", "settings", "job", "seal"} & found.keys()
    """),
    "a program that is nested too deep": Attack("(" * 100_000),
    "a program that is no text": Attack("\x00\udc80"),
    "a result that is nested too deep": Attack(
        "def square(x):\n    deep = []\n    for _ in range(10**5):\n        deep = [deep]\n    return deep\n"
    ),
    "a result that holds itself": Attack("def square(x):\n    me = []\n    me.append(me)\n    return me\n"),
    "a result too large to send": Attack("def square(x):\n    return 'x' * (1 << 25)\n"),
    "a number too large to read": Attack("def square(x):\n    return 1 << (1 << 26)\n"),
}

PROCESSES = {
    "kill the parent": attempt("import os\nos.kill(os.getppid(), 9)"),
    "kill everyone": attempt("import os\nos.kill(-1, 9)"),
    "kill the group": attempt("import os\nos.killpg(0, 9)"),
    "fork": attempt("import os\nos.fork() or os._exit(0)", True),
    "fork bomb": Attack("import os\nwhile True:\n    os.fork()\n"),
    "fork bomb that forgives": Attack(
        "import os\nwhile True:\n    try:\n        os.fork()\n    except BaseException:\n        pass\n"
    ),
    "daemon, forked twice": attempt("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(60)
            os._exit(0)
        os.wait()
    """),
    "subprocess": attempt("import subprocess\nsubprocess.run(['/bin/true'], check=True)", True),
    "spawn": attempt("import os\nos.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)", True),
    "fork through a private module": attempt("""
        import _posixsubprocess
        _posixsubprocess.fork_exec(
            [b"true"], [b"/bin/true"], True, (), None, None, -1, -1, -1, -1, -1, -1, 3, 4, False, False, 0, None,
            None, None, -1, None, False)
    """),
    "become another program": Attack("import os\nos.execv('/bin/true', ['true'])\n", True),
    "multiprocessing": attempt("""
        import multiprocessing
        process = multiprocessing.get_context("fork").Process(target=int)
        process.start()
        process.join()
    """, True),
    "thread left behind": attempt("""
        import threading, time
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """, True),
    "thread bomb": Attack(
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()\n"
    ),
    "every signal ignored": Attack(
        "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass\n"
    ),
    "stop": Attack("import signal\nsignal.raise_signal(signal.SIGSTOP)\ndef square(x):\n    return None\n"),
    "abort": Attack("import os\nos.abort()\n"),
    "file descriptors closed": Attack("import os\nos.closerange(0, 64)\ndef square(x):\n    return None\n"),
    "exit left to a finalizer": Attack(
        "import os\nclass Last:\n    def __del__(self):\n        os._exit(0)\n"
        "def square(x):\n    Last()\n", True
    ),
    "trace the parent": through_libc("libc.ptrace(16, os.getppid(), 0, 0)"),
    "read the parent's memory": attempt("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')"),
    "open the parent by pidfd": through_libc("libc.syscall(434, os.getppid(), 0)"),
    "new namespaces": through_libc("libc.unshare(0x10000000)"),
    "new root": through_libc("libc.chroot(b'/')"),
    "mount": through_libc("libc.mount(b'x', b'/', b'tmpfs', 0, None)"),
    "another user": through_libc("libc.setresuid(1, 1, 1)"),
    "outlive the parent": through_libc("libc.prctl(1, 0)"),
    "system call of 32 bits": attempt("""
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, getpid; int 0x80; ret
        assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() > 0
    """),
    "more processes allowed": attempt("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (99, 99))"),
}  # fmt: skip

RESOURCES = {
    "endless loop when loaded": Attack("while True:\n    pass\n"),
    "endless loop when called": Attack("def square(x):\n    while True:\n        pass\n"),
    "endless sleep": Attack("import time\ndef square(x):\n    time.sleep(1e6)\n"),
    "endless power": Attack("def square(x):\n    return 3 ** (1 << 40)\n"),
    "endless pattern": Attack("import re\ndef square(x):\n    return re.match('(a+)+b', 'a' * 64)\n"),
    "endless recursion": Attack(
        "import sys\nsys.setrecursionlimit(1 << 30)\ndef square(x):\n    return square(x) + 1\n"
    ),
    "much memory at once": attempt("block = bytearray(600 << 20)"),
    "much memory, bit by bit": Attack("hoard = []\nwhile True:\n    hoard.append(' ' * (1 << 20) + str(len(hoard)))\n"),
    "much memory in a file of memory": attempt(
        """
        import os
        file = os.memfd_create("MARK")
        for _ in range(64):
            assert os.write(file, bytes(1 << 20)) == 1 << 20
    """,
        True,
    ),
    "much output": Attack("while True:\n    print('x' * 100_000)\n"),
    "crash": Attack("import ctypes\nctypes.string_at(0)\n"),
    "memory shared beyond its end": through_libc("libc.shmget(0x4d41, 4096, 0o1600)"),
    "message queue": through_libc("libc.syscall(68, 0x4d41, 0o1600)"),
}

WRITABLE = "('/tmp', '/var/tmp', '/dev/shm', '.', '/', '/run')"
FILES = {
    "read the password file": attempt("assert open('/etc/passwd').read()", True),
    "read a host file": attempt("assert open('CANARY').read() == 'canary'", True),
    "read a host file by a path with dots": attempt(
        "import os\nassert open(os.path.dirname(os.__file__) + '/../../../../../../../../..' + 'CANARY').read()", True
    ),
    "read a host file by system calls": through_libc("libc.open(b'CANARY', 0)", True),
    "read a host file through /proc": attempt("""
        for root in ("/proc/1/root", "/proc/self/root", "/proc/self/cwd"):
            try:
                assert open(root + "CANARY").read()
                break
            except OSError:
                pass
        else:
            raise OSError
    """),
    "list the host": attempt("import os\nassert 'passwd' in os.listdir('/etc')", True),
    "read the environment": attempt("import os\nassert 'SECRET_TOKEN' in os.environ", True),
    "read an environment through /proc": attempt("""
        for process in ("self", "1"):
            assert open(f"/proc/{process}/environ").read()
    """),
    "read what another process was started with": attempt("assert open('/proc/1/cmdline').read()", True),
    "delete a host file": attempt("import os\nos.remove('CANARY')", True),
    "overwrite a host file": attempt("open('CANARY', 'w').write('gone')", True),
    "truncate a host file": attempt("import os\nos.truncate('CANARY', 0)", True),
    "truncate a host file that is opened to be read": attempt(
        "import os\nos.open('CANARY', os.O_RDONLY | os.O_TRUNC)", True
    ),
    "rename a host file": attempt("import os\nos.rename('CANARY', 'CANARY.MARK')", True),
    "change the mode of a host file": attempt("import os\nos.chmod('CANARY', 0o777)", True),
    "change the time of a host file": attempt("import os\nos.utime('CANARY', (0, 0))", True),
    "link to a host file": attempt(f"""
        import os
        for folder in {WRITABLE}:
            try:
                os.link("CANARY", folder + "/MARK")
                break
            except OSError:
                pass
        else:
            raise OSError
    """),
    **{
        f"leave {what} behind": attempt(
            f"""
            import os, tempfile
            for folder in {WRITABLE}:
                try:
                    {code}
                    break
                except (OSError, AttributeError):
                    pass
            else:
                raise OSError
        """,
            True,
        )
        for what, code in {
            "a file": "open(folder + '/MARK', 'w').write('x')",
            "an empty file": "os.close(os.open(folder + '/MARK', os.O_CREAT | os.O_WRONLY))",
            "a folder": "os.mkdir(folder + '/MARK')",
            "a symbolic link": "os.symlink('/etc/passwd', folder + '/MARK')",
            "a named pipe": "os.mkfifo(folder + '/MARK')",
            "a node": "os.mknod(folder + '/MARK')",
            "a file without a name": "os.open(folder, os.O_RDWR | os.O_TMPFILE)",
            "a temporary file": "tempfile.NamedTemporaryFile(prefix='MARK', dir=folder, delete=False)",
        }.items()
    },
    "change the standard library": attempt("import os\nopen(os.__file__, 'a').write('')"),
    "empty a file of the standard library, which is empty": attempt(
        "import os, urllib\nos.open(urllib.__file__, os.O_RDONLY | os.O_TRUNC)"
    ),
}

NETWORK = {
    "connect to the host": attempt("import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)", True),
    "send a datagram": attempt("""
        import socket
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT))
    """, True),
    "look up a name": attempt("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", True),
    "listen": attempt("import socket\nsocket.create_server(('127.0.0.1', 0))", True),
    "abstract unix socket": attempt("import socket\nsocket.socket(socket.AF_UNIX).bind('\\0MARK')", True),
    "netlink": attempt("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)", True),
    "socket by system call": through_libc("libc.socket(2, 1, 0)"),
}  # fmt: skip

REFLECTION = {
    "audit hooks found and cleared": attempt("""
        import gc
        for thing in gc.get_objects():
            if type(thing) is list and thing and all(getattr(f, "__name__", "") == "refuse" for f in thing):
                thing.clear()
        open("/etc/passwd")
    """),
    "audit hook changed through its frame": attempt("""
        import builtins
        try:
            open("/etc/passwd")
        except OSError as error:
            frame = error.__traceback__.tb_next
            if frame:
                names = frame.tb_frame.f_globals
                names.update(ALLOWED_EVENTS={"open"}, frozenset=lambda *a: {"open"}, type=lambda value: int)
        builtins.type, builtins.isinstance = lambda value: int, lambda *a: True
        open("/etc/passwd")
    """),
    "C functions found among subclasses": attempt("""
        for kind in object.__subclasses__():
            names = getattr(getattr(kind, "__init__", None), "__globals__", {})
            if "_dlopen" in names or "CDLL" in names:
                names["CDLL"](None).getpid()
                open("/etc/passwd")
                break
        else:
            raise OSError
    """),
    "code made by hand": attempt("""
        def f():
            pass
        f.__code__ = f.__code__.replace(co_consts=(None,), co_code=b"\\x64\\x7f\\x53\\x00" * 64)
        f()
        open("/etc/passwd")
    """),
}

ATTACKS = FORGERIES | PROCESSES | RESOURCES | FILES | NETWORK | REFLECTION
