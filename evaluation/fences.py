"""What a process of the sandbox does to itself: namespaces, a root directory, Landlock, seccomp, limits.

With the standard library alone: `evaluation.confine`, which calls it, sees nothing else.
"""

import ctypes
import math
import os
import platform
import resource
import struct
from typing import Any

NOBODY = 65534
THREADS = FILES = 64
# Of <linux/sched.h>: mount, cgroup, UTS, IPC, PID and network namespaces; users apart.
NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
NEW_USER, THREAD = 0x10000000, 0x00010000
NOSUID, NODEV, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 4096, 16384, 1 << 18, 2
# What the program may read: shared libraries and the standard library. `/tmp` is its own and may be written.
STANDARD = os.path.dirname(os.__file__)
READABLE = [
    path
    for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
    if os.path.exists(path)
] + [os.path.dirname(STANDARD), STANDARD]
# Landlock's rights, by bit: 1 write, 2 read, 3 list, 4–12 remove and make, 13 move, 14 truncate, 15 ioctl.
READ, WRITE_NULL = 1 << 2 | 1 << 3, 1 << 1 | 1 << 2 | 1 << 14
MAKE_DEVICE_OR_RUN = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 11
# System calls that are refused, by their numbers on (x86_64, aarch64); -1: not there.
CALLS = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "socket": (41, 198), "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "personality": (135, 92), "modify_ldt": (154, -1),
    "memfd_create": (319, 279), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "init_module": (175, 105),
    "finit_module": (313, 273), "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    **{f"io_uring {n}": (n, n) for n in (425, 426, 427)},
    **{f"mount by descriptors {n}": (n, n) for n in (428, 429, 430, 431, 432, 433, 442, 467)},
    **{f"pidfd or secret memory {n}": (n, n) for n in (434, 438, 447)},
}  # fmt: skip
# AUDIT_ARCH, and the numbers of clone, capset and pivot_root.
MACHINES = {"x86_64": (0xC000003E, 56, 126, 155), "aarch64": (0xC00000B7, 220, 91, 41)}
COLUMN = 1 if platform.machine() == "aarch64" else 0
ARCH, CLONE, CAPSET, PIVOT_ROOT = MACHINES.get(platform.machine(), (0, 0, 0, 0))
LIBC = ctypes.CDLL(None, use_errno=True)


def called(what: str, name: str, *arguments: Any) -> int:
    """The result of a function of libc. Raises OSError that begins with `what`, which then is not there."""
    wide = [ctypes.c_long(x) if isinstance(x, int) else x for x in arguments]
    result = getattr(LIBC, name)(*wide)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {name}: {os.strerror(number)}")
    return int(result)


def enter_namespaces(disk: int, drop: bool) -> None:
    """Leave the host's processes, network and files; what this process starts next is PID 1 in there.

    drop: of root's rights. They make the directory, since Python may lie where only root reads, and go.
    """
    what, me = "namespaces", os.open("/proc/self", os.O_PATH)
    ids = (os.getuid(), os.getgid())
    if drop:
        called(what, "unshare", NAMESPACES)
        own_root(disk)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        called(what, "prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: who changed its user may not write its maps
        ids = (NOBODY, NOBODY)
    called(what, "unshare", NEW_USER | (0 if drop else NAMESPACES))
    maps = ("deny", f"{NOBODY} {ids[0]} 1", f"{NOBODY} {ids[1]} 1")
    for name, value in zip(("setgroups", "uid_map", "gid_map"), maps, strict=True):
        file = os.open(name, os.O_WRONLY, dir_fd=me)
        os.write(file, value.encode())
        os.close(file)
    os.close(me)
    if not drop:
        own_root(disk)


def own_root(disk: int) -> None:
    """Go into a root with `READABLE`, which is read-only, and an empty /tmp of so many megabytes."""
    what, top = "namespaces", b"/proc"  # is everywhere, and no Python lies in it

    def mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None) -> None:
        called(what, "mount", source, target, kind, flags, data)

    def set_read_only(path: bytes, flags: int) -> None:
        attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)  # read-only, nosuid
        called(what, "syscall", 442, -100, path, flags, attributes, len(attributes))  # mount_setattr

    mount(b"none", b"/", None, RECURSIVE | PRIVATE, None)
    mount(b"tmpfs", top, b"tmpfs", NOSUID | NODEV, b"size=1m,mode=755")
    for path in map(os.fsencode, [*READABLE, "/dev/null"]):
        inside = top + path
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        elif not os.path.exists(inside):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.close(os.open(inside, os.O_CREAT))
        mount(path, inside, None, BIND | RECURSIVE, None)
        set_read_only(inside, 0x8000)  # and all below it
    os.mkdir(top + b"/tmp")
    size = f"size={disk}m,nr_inodes=1024,mode=1777".encode()
    mount(b"tmpfs", top + b"/tmp", b"tmpfs", NOSUID | NODEV, size)
    os.chdir(top)
    called(what, "syscall", PIVOT_ROOT, b".", b".")
    called(what, "umount2", b".", DETACH)
    os.chdir("/tmp")
    set_read_only(b"/", 0)


def landlock_version() -> int:
    """Landlock's version in this kernel; 0 where it has none, or it is not switched on."""
    return max(0, LIBC.syscall(*map(ctypes.c_long, (444, 0, 0, 1))))


def has_seccomp() -> bool:
    """Whether this kernel filters system calls and we know their numbers: a null filter is a bad address."""
    return bool(ARCH) and LIBC.prctl(22, 2, None) < 0 and ctypes.get_errno() == 14


def restrict_files() -> None:
    """Landlock: read `READABLE`, write /tmp and /dev/null, no TCP, no signal to anybody outside."""
    what, version = "landlock", landlock_version()
    everything = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    handled = struct.pack("QQQ", everything, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = called(what, "syscall", 444, handled, len(handled), 0)
    rights = {path: READ if os.path.isdir(path) else READ & ~(1 << 3) for path in READABLE}
    rights |= {"/tmp": everything & ~MAKE_DEVICE_OR_RUN, "/dev/null": WRITE_NULL}
    for path, allowed in rights.items():
        opened = os.open(path, os.O_PATH)
        called(what, "syscall", 445, rules, 1, struct.pack("=Qi", allowed & everything, opened), 0)
        os.close(opened)
    called(what, "syscall", 446, rules, 0)
    os.close(rules)


def restrict_calls() -> None:
    """Seccomp: no process, no socket, no program of another file, none of `CALLS`; threads may be started."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    load, equal, above, mask, end = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow, kill = 0x00050000, 0x7FFF0000, 0x80000000
    program = [step(load, 4), step(equal, ARCH, yes=1), step(end, kill), step(load, 0)]
    if not COLUMN:  # calls of x32, which have other numbers
        program += [step(above, 0x40000000, no=1), step(end, kill)]
    for number in (pair[COLUMN] for pair in CALLS.values()):
        if number >= 0:
            program += [step(equal, number, no=1), step(end, refuse | 1)]
    program += [step(equal, 435, no=1), step(end, refuse | 38)]  # clone3: not there, so that libc takes clone
    program += [step(equal, CLONE, no=3), step(load, 16), step(mask, THREAD, yes=1), step(end, refuse | 1)]
    code = b"".join([*program, step(end, allow)])
    buffer = ctypes.create_string_buffer(code)
    filters = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    called("seccomp", "prctl", 22, 2, filters, 0, 0)


def limit(seconds: float, megabytes: int, disk: int, isolated: bool) -> None:
    """Limits of this process alone, which it cannot raise; there is no other one of the program's."""
    cpu = math.ceil(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    limits = {"AS": megabytes << 20, "FSIZE": disk << 20, "NOFILE": FILES, "CORE": 0}
    if isolated:  # elsewhere all processes of the user count, whoever started them
        limits |= {"NPROC": THREADS, "MEMLOCK": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def confine(spec: dict[str, Any]) -> None:
    """All that a process does to itself before it runs anything. OSError names what is missing."""
    if spec["isolated"]:
        called("capabilities", "syscall", CAPSET, struct.pack("Ii", 0x20080522, 0), bytes(24))  # none
        called("no_new_privs", "prctl", 38, 1, 0, 0, 0)
        called("privacy", "prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody may look into it
        restrict_files()
    limit(spec["seconds"], spec["megabytes"], spec["disk"], spec["isolated"])
    if spec["isolated"]:
        restrict_calls()
