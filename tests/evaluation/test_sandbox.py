"""What generated code tries, and what has become of the host afterwards."""

import math
import os
import shutil
import socket
import stat
import subprocess
from collections import namedtuple
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from evaluation import fences, sandbox
from evaluation.sandbox import available, check_solution, pass_at_k, run_program

MISSING = [name for name, what in available().items() if not what]
needs_kernel = pytest.mark.skipif(
    bool(MISSING) and "CAMBRIAN_REQUIRE_SANDBOX" not in os.environ,
    reason=f"this kernel lacks {', '.join(MISSING)}",
)
SECRET = "a-secret-of-the-host"
# Root gives up its rights; anyone else keeps the user that they are, and so has a fence less.
USERS = [True, False] if os.geteuid() == 0 else [False]
Escape = namedtuple("Escape", "source statuses tests", defaults=(None,))
WRONG = "assert f(1) == 2"
# {words} are those of `Host`.
ESCAPES = """
== fork_bomb: failed
import os
while True:
    os.fork()
== stubborn_fork_bomb: timeout
import contextlib, os
while True:
    with contextlib.suppress(OSError):
        os.fork()
== daemon: failed
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(60)
== daemon_by_clone: failed
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall({clone}, 17, 0, 0, 0, 0) < 0: sys.exit(3)
while True: pass
== vfork_and_spawn: failed
import subprocess
subprocess.run(['/bin/sh', '-c', 'sleep 60 &'])
== thread_bomb: failed
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
== socket_out: failed
import socket
socket.create_connection(('192.0.2.1', 80), 1)
== datagram_out: failed
import socket
socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port}))
== localhost: failed
import socket
socket.create_connection(('127.0.0.1', {port}), 1)
== abstract_socket: failed
import socket
socket.socket(1).connect('\\0{abstract}')
== ptrace: passed
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), 1, {victim}):
    assert libc.ptrace(16, pid, 0, 0) < 0
== peek: failed
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall({readv}, {victim}, 0, 0, 0, 0, 0) < 0
open('/proc/{victim}/mem', 'rb')
== kill: passed
import contextlib, os
for pid in ({victim}, {ours}, os.getppid(), 1):
    with contextlib.suppress(OSError):
        os.kill(pid, 9)
== kill_all: failed killed | assert f(1) == 2
import os
def f(x):
    os.kill(-1, 9)
== environment_of_init: failed
print(open('/proc/1/environ', 'rb').read())
== environment_of_victim: failed
print(open('/proc/{victim}/environ', 'rb').read())
== processes: failed
import os
print(os.listdir('/proc'))
== environment: passed
import os
print(dict(os.environ))
assert not os.environ
== secret: failed
print(open('{secret}').read())
== secret_by_link: failed
import os
os.symlink('{secret}', 'link')
print(open('link').read())
== write_by_link: failed
import os
os.symlink('{secret}', 'link')
open('link', 'w').write('gone')
== hard_link: failed
import os
os.link('{secret}', 'link')
== permissions: failed
import os
os.chmod('{secret}', 0)
== remove: failed
import os
os.remove('{secret}')
== dots: failed
import os
for _ in range(99): os.chdir('..')
print(open('.{secret}').read())
== chroot: failed
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
os.mkdir('d')
os.chroot('d')
== write_home: failed
open('{outside}', 'w').write('here')
== write_tmp: passed
open('/tmp/{unique}', 'w').write('here')
assert open('/tmp/{unique}').read()
== write_python: failed
import os
open(os.__file__, 'a').write('#')
== devices: failed
import os, stat
os.mknod('disk', 0o666 | stat.S_IFBLK, os.makedev(8, 0))
== print_2_gb: output
import sys
for _ in range(2 << 10): sys.stdout.write('x' * (1 << 20))
== complain_2_gb: output
import os
while True: os.write(2, b'x' * 65536)
== allocate_8_gb: memory
x = bytearray(8 << 30)
== allocate_slowly: memory
x = []
while True: x.append(bytearray(1 << 22))
== memory_files: failed
import os
os.memfd_create('x')
== fill_the_disk: failed
import os
written = 0
try:
    for i in range(99):
        with open(str(i), 'wb', 0) as file:
            for _ in range(99): written += file.write(bytes(1 << 20))
finally: print(written >> 20)
== many_files: failed
import os
for i in range(9999): os.close(os.open(str(i), os.O_CREAT))
== infinite_loop: timeout
while True: pass
== deaf_sleep: timeout
import signal, time
for s in (14, 15, 2, 1, 24): signal.signal(s, signal.SIG_IGN)
time.sleep(99)
== open_files: failed
x = [open('/dev/null') for _ in range(4096)]
== raise_limits: failed
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
== recursion: failed killed memory timeout
import sys
sys.setrecursionlimit(10**9)
def f(): f()
f()
== segfault: killed
import ctypes
ctypes.string_at(0)
== unshare: passed
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) < 0 and libc.setns(0, 0) < 0
== mount: passed
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) < 0 and libc.umount2(b'/tmp', 2) < 0
== other_root: failed
import os
os.setuid(0)
== other_program: failed
import os
os.execv('/bin/sh', ['sh', '-c', 'true'])
== descriptors: failed | assert f(1) == 2
import os
os.closerange(3, 4096)
def f(x): return 2
== forged_report: failed | assert f(1) == 2
import contextlib, os
for fd in range(3, 64):
    with contextlib.suppress(OSError):
        os.write(fd, b'{{"status": "passed", "seconds": 0}}\\n')
== exit_0: failed | assert f(1) == 2
import os
os._exit(0)
== exit_0_when_called: failed | assert f(1) == 2
import os
def f(x): os._exit(0)
== polite_exit: failed | assert f(1) == 2
import sys
sys.exit(0)
== exit_when_called: failed | assert f(1) == 2
def f(x): raise SystemExit(0)
== no_tests: failed | assert f(1) == 2
import builtins
builtins.exec = builtins.compile = lambda *a, **k: None
def f(x): return 1
== no_assert: failed | assert all([f(1) == 2])
import builtins
builtins.AssertionError = StopIteration
builtins.all = lambda x: True
def all(x): return True
def f(x): return 1
== equal_to_all: failed | assert f(1) == 2
class A(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return A(1)
== equal_object: failed | assert f(1) == 2
class A:
    def __eq__(self, other): return True
def f(x): return A()
== patched_math: failed | assert math.isclose(f(1), 2)
import math
math.isclose = lambda *a, **k: True
def f(x): return 1
== caller: failed | assert f(1) == 2
import sys
def f(x):
    frame = sys._getframe()
    while frame: frame.f_globals.update(status='passed'); frame = frame.f_back
    sys.settrace(lambda *a: None)
    return 1
== endless_answer: failed | assert f(1) == 2
def f(x):
    a = []
    a.append(a)
    return a
"""
# What each of these does to a host without a sandbox, so that the cases above are of something real.
REAL: tuple[str, ...] = (
    "secret",
    "secret_by_link",
    "write_by_link",
    "permissions",
    "localhost",
    "datagram_out",
)
REAL += ("abstract_socket", "write_home", "write_tmp", "kill", "environment_of_victim")


def parsed(text: str) -> dict[str, Escape]:
    """Each `== name: statuses | tests` and the source below it."""
    found = {}
    for block in text.split("\n== ")[1:]:
        head, source = block.split("\n", 1)
        name, rest = head.split(": ", 1)
        statuses, _, tests = rest.partition(" | ")
        found[name] = Escape(source, set(statuses.split()), tests or None)
    return found


CASES = parsed(ESCAPES)


class Host:
    """What a program may not see, change or end: a file, a process, sockets, folders."""

    def __init__(self, path: Path, drop: bool):
        # The user that the program is, so that it is not the user who keeps it away.
        user = fences.NOBODY if drop else None
        self.secret, self.outside, self.unique = path / "secret", path / "outside", f"written-{path.name}"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o666)
        self.victim = subprocess.Popen(
            ["sleep", "99"], user=user, env={"TOKEN": SECRET, "PATH": os.environ["PATH"]}
        )
        self.abstract = f"cambrian-{os.getpid()}-{path.name}"
        self.listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        port = self.listeners[0].getsockname()[1]
        self.listeners[1].bind("\0" + self.abstract)
        self.listeners[1].listen()
        self.listeners.append(socket.socket(type=socket.SOCK_DGRAM))
        self.listeners[2].bind(("127.0.0.1", port))
        self.words = {
            "secret": self.secret, "outside": self.outside, "unique": self.unique, "abstract": self.abstract,
            "port": port, "victim": self.victim.pid, "ours": os.getpid(), "clone": fences.CLONE,
            "readv": fences.CALLS["process_vm_readv"][fences.COLUMN],
        }  # fmt: skip

    def harm(self, printed: str) -> set[str]:
        """What has happened to it."""
        harm = {"read"} if SECRET in printed else set()
        if not self.secret.exists() or self.secret.read_text() != SECRET:
            harm.add("written")
        elif stat.S_IMODE(self.secret.stat().st_mode) != 0o666:
            harm.add("permissions")
        if self.outside.exists() or Path("/tmp", self.unique).exists():
            harm.add("outside")
        if self.victim.poll() is not None:
            harm.add("killed")
        for listener in self.listeners:
            listener.settimeout(0)
            try:
                listener.accept()[0].close() if listener.type == socket.SOCK_STREAM else listener.recv(1)
                harm.add("reached")
            except BlockingIOError:
                pass
        return harm

    def close(self) -> None:
        """End what it started."""
        self.victim.kill()
        self.victim.wait()
        for listener in self.listeners:
            listener.close()
        Path("/tmp", self.unique).unlink(missing_ok=True)


@pytest.fixture
def host(request, tmp_path, monkeypatch):
    drop = getattr(request, "param", USERS[0])
    monkeypatch.setattr(sandbox, "_is_root", lambda: drop)
    monkeypatch.setenv("TOKEN", SECRET)
    # A path of this test's own on the command line, by which its processes are found.
    inside = tmp_path / "inside" / "evaluation"
    inside.mkdir(parents=True)
    for name in ("__init__", "confine", "fences", "exchange"):
        shutil.copy(Path(fences.__file__).with_name(f"{name}.py"), inside)
    monkeypatch.setattr(sandbox, "ROOT", inside.parent)
    made = Host(tmp_path, drop)
    yield made
    made.close()


def left(path: Path) -> list[str]:
    """The processes that run the copy of the room in a directory."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            pass
    return found


def attempt(escape: Escape, host: Host, isolation: str = "full"):
    source = escape.source.format_map(host.words)
    limits: dict[str, Any] = {
        "seconds": 1.0 if "timeout" in escape.statuses else 20.0,
        "megabytes": 96,
        "isolation": isolation,
    }
    if escape.tests is None:
        return run_program(source, **limits)
    return check_solution(source, escape.tests, **limits)


@needs_kernel
@pytest.mark.parametrize("host", USERS, ids=lambda drop: "nobody" if drop else "caller", indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_escapes_are_contained(name, host, tmp_path):
    found = attempt(CASES[name], host)
    assert found.status in CASES[name].statuses, found
    assert not host.harm(found.stdout + found.stderr), found
    assert len(found.stdout) <= sandbox.OUTPUT and len(found.stderr) <= sandbox.OUTPUT
    assert not left(tmp_path)
    if name == "fill_the_disk":
        assert int(found.stdout) <= sandbox.DISK


@needs_kernel
@pytest.mark.parametrize("fence", ["restrict_calls", "restrict_files", "restrict_calls restrict_files"])
@pytest.mark.parametrize("name", [*REAL, "daemon", "stubborn_fork_bomb", "other_program", "mount"])
def test_a_fence_less_is_still_one(name, fence, host, tmp_path):
    """Seccomp and Landlock taken away: namespaces alone keep the host."""
    copy = sandbox.ROOT / "evaluation/fences.py"
    text = copy.read_text()
    for function in fence.split():
        text = text.replace(f"        {function}()\n", "        pass\n")
    copy.write_text(text)
    found = attempt(CASES[name]._replace(statuses={"timeout"}), host)
    assert not host.harm(found.stdout + found.stderr), found
    assert not left(tmp_path)


@pytest.mark.parametrize("host", [False], indirect=True)
@pytest.mark.parametrize("name", REAL)
def test_they_harm_a_host_without_the_sandbox(name, host, capsys):
    if name == "kill":  # not us
        host.words |= {"ours": host.victim.pid}
        escape = Escape(CASES[name].source.replace("os.getppid(), 1", "{victim}"), {"passed"})
    else:
        escape = CASES[name]
    found = attempt(escape, host, "none")
    if name == "kill":
        host.victim.wait(5)
    assert host.harm(found.stdout + found.stderr), found


@needs_kernel
def test_a_program_ends_and_prints_as_anywhere(host, tmp_path):
    source = """
import decimal, json, random, sys, tempfile, threading
from dataclasses import dataclass
@dataclass
class Point:
    x: int
with tempfile.TemporaryFile("w+") as file:
    json.dump({"x": Point(3).x}, file)
    file.seek(0)
    print(file.read(), __name__, sys.argv[1:])
thread = threading.Thread(target=lambda: print("from a thread", file=sys.stderr))
thread.start()
sys.exit({status})
"""
    found = run_program(source.replace("{status}", "0"))
    assert (found.status, found.stdout) == ("passed", '{"x": 3} __main__ []\n')
    assert found.stderr == "from a thread\n" and 0 < found.seconds < 10
    assert run_program(source.replace("{status}", "4")).status == "failed"
    assert run_program("def f(:").stderr.endswith("SyntaxError: invalid syntax\n")
    assert run_program("input()").stderr.endswith("EOFError: EOF when reading a line\n")
    assert 'File "main.py", line 2, in <module>' in run_program("\n1 / 0").stderr


RIGHT = """
import collections, math
class Node:
    def __init__(self, value): self.value, self.left = value, None
def depth(node): return 0 if node is None else 1 + depth(node.left)
def sort(x): x.sort()
def squares(n): return (i * i for i in range(n))
def same(*x, **y): return (x, y)
def count(x): return collections.Counter(x)
def refuse(x): raise KeyError(x)
def endless():
    while True: yield 7
"""


@needs_kernel
@pytest.mark.parametrize(
    "tests",
    [
        "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2 and root.left.value == 2",
        "x = [3, 1]\nassert sort(x) is None and x == [1, 3]",
        "assert list(squares(3)) == [0, 1, 4] and next(iter(endless())) == 7",
        "x = (2.5, {3})\ny = {(4,): [None, True, b'5', 6j, 'é', 10**5000, frozenset('a')]}\n"
        "assert same(1, x, z=y) == ((1, x), {'z': y})",
        "x = same(1.0, 1e999, True)[0]\nassert x[1] > 1e300 and list(map(type, x)) == [float, float, bool]",
        "assert count('aab') == {'a': 2, 'b': 1} and math.floor(2.5) == 2",
        "try:\n    refuse(1)\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "def check(candidate):\n    assert candidate(None) == 0\ncheck(depth)",
    ],
)
def test_right_programs_pass(tests, host):
    found = check_solution(RIGHT, tests)
    assert found.status == "passed", found
    assert check_solution(RIGHT, tests + "\nassert False").status == "failed"


@needs_kernel
def test_a_function_may_have_the_name_of_a_builtin(host):
    assert check_solution("def sum(a, b): return a + b", "assert sum(1, 2) == 3").status == "passed"


@needs_kernel
def test_exhausted_memory_of_a_call_is_memory(host):
    assert check_solution("def f(x): return [0] * 10**12", WRONG).status == "memory"


def test_what_is_missing_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sandbox, "available", lambda: {"namespaces": "yes", "landlock": "", "seccomp": "yes"})
    with pytest.raises(ValueError, match="^isolation=full needs landlock, .* isolation=none, [^\n]*$"):
        run_program("")
    for words in ({"isolation": "some"}, {"seconds": 0}, {"megabytes": 1}):
        with pytest.raises(ValueError, match=next(iter(words))):
            run_program("", **words)


@needs_kernel
def test_a_namespace_that_is_refused_is_named(host):
    """As a container does, by a limit of the kernel's that this process's children have."""
    copy = sandbox.ROOT / "evaluation/fences.py"
    copy.write_text(copy.read_text().replace('called(what, "unshare",', 'called(what, "unshare", -1,'))
    with pytest.raises(ValueError, match="isolation=full needs .*namespaces: unshare: Invalid argument"):
        run_program("")


def test_no_isolation_is_said_aloud(host, capsys):
    sandbox._say_none.cache_clear()
    found = run_program("print(1)", isolation="none")
    assert (found.status, found.stdout) == ("passed", "1\n") and "isolation=none" in capsys.readouterr().err
    assert check_solution("def f(x): return 2", WRONG, isolation="none").status == "passed"
    assert run_program("while True: pass", seconds=0.5, isolation="none").status == "timeout"


@pytest.mark.parametrize(("samples", "correct"), [(5, 0), (5, 1), (6, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(samples, correct):
    for k in range(1, samples + 1):
        draws = list(combinations(range(samples), k))
        share = sum(min(draw) < correct for draw in draws) / len(draws)
        assert math.isclose(pass_at_k(samples, correct, k), share)
    assert math.isclose(pass_at_k(200, 10, 1), 0.05)
    with pytest.raises(ValueError, match="k=7 must be from 1 to 4"):
        pass_at_k(4, 2, 7)
