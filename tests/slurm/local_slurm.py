"""A Slurm of two nodes on this machine, for one command: `python tests/slurm/local_slurm.py -- COMMAND...`.

    --nodes N     nodes n1 to nN, two by default; all of them are this machine
    --logs DIR    where the daemons' logs are left; by default they go with the rest

The daemons are those of Debian's packages (`apt-get install slurm-wlm munge`), the real ones, with a
configuration, a key and ports of their own: a Slurm that this machine belongs to is not touched. The command
finds them by SLURM_CONF and the clients by PATH. When it ends everything is gone: daemons, jobs, and whatever
jobs have started. The exit status is the command's, or 2 where no Slurm could be started.

Partitions: `normal`, whose jobs `urgent` preempts (PreemptMode=REQUEUE, 60 s of grace). Each node claims 16
cores, whatever the machine has. No GPUs, no accounting, no cgroups.
"""

import argparse
import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    # Found from a clone that was never installed, too.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.local import DIE_WITH_PARENT

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "srun")
INSTALL = "apt-get install slurm-wlm munge"
START_SECONDS = 60
NOTICES = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
# Without systemd, cgroups and a database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
# A silent node is down after five seconds, and up again as soon as it answers.
SlurmdTimeout=5
ReturnToService=2
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60
"""


def missing() -> list[str]:
    """Programs of Slurm's that are not installed here."""
    return [name for name in NEEDED if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    """PATH, with the directories where daemons are and which a user's lacks."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def environment(root: Path) -> dict[str, str]:
    """What makes clients and daemons talk to the Slurm in `root`; of a job that we are part of, nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH_"))}
    return {**kept, "PATH": search_path(), "SLURM_CONF": str(root / "slurm.conf")}


@contextlib.contextmanager
def local_slurm(root: Path, nodes: Sequence[str]) -> Iterator[dict[str, str]]:
    """Daemons that are up inside of the block, and gone behind it; gives the environment of their clients.

    root: an empty directory with a path short enough for a socket's (107 characters). Raises RuntimeError
    where one does not come up. All that was started inside of the block and is still there is killed.
    """
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: an orphan below us becomes our child
    configure(root, nodes)
    clients = environment(root)
    daemons: dict[str, subprocess.Popen] = {}
    try:
        daemons["munged"] = daemon(root, "munged", munged(root))
        wait_for(lambda: (root / "munge.socket").exists(), root, daemons)
        daemons["slurmctld"] = daemon(root, "slurmctld", ["slurmctld", "-D"])
        for node in nodes:
            daemons[node] = daemon(root, node, ["slurmd", "-D", "-N", node])
        wait_for(lambda: idle(clients) == len(nodes), root, daemons)
        yield clients
    finally:
        # The controller first: it must not requeue what ends now, nor hand it to another node.
        for name in ("slurmctld", *nodes, "munged"):
            if name in daemons:
                end(daemons[name])
        end_descendants()


def configure(root: Path, nodes: Sequence[str]) -> None:
    """Write configuration and key."""
    ports = free_ports(1 + len(nodes))
    host = socket.gethostname()
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16"
        for node, port in zip(nodes, ports[1:], strict=True)
    ]
    text = CONF.format(host=host, ports=ports, user=getpass.getuser(), root=root, nodes="\n".join(lines))
    root.chmod(0o755)  # others must be able to enter, and not to write, or munged refuses its socket's place
    (root / "slurm.conf").write_text(text)
    (root / "state").mkdir()
    (root / "munge.key").touch(mode=0o600)
    (root / "munge.key").write_bytes(os.urandom(128))


def munged(root: Path) -> list[str]:
    """Its command line."""
    files = [f"--{kind}-file={root}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    return ["munged", "--foreground", f"--socket={root}/munge.socket", *files]


def free_ports(count: int) -> list[int]:
    """Different ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def daemon(root: Path, name: str, command: Sequence[str]) -> subprocess.Popen:
    """Start one; it ends with us at the latest."""
    with (root / f"{name}.out").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, *command],
            env=environment(root),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the command; the daemons end in order
        )


def idle(clients: dict[str, str]) -> int:
    """Nodes that have registered and wait for work."""
    command = ["sinfo", "--noheader", "--Node", "--partition=normal", "--states=idle", "--format=%T"]
    said = subprocess.run(command, env=clients, capture_output=True, text=True, timeout=60, check=False)
    return said.stdout.split().count("idle")


def wait_for(there: Callable[[], bool], root: Path, daemons: dict[str, subprocess.Popen]) -> None:
    """Return when it is there; RuntimeError with a daemon's last words where that takes too long."""
    last = time.monotonic() + START_SECONDS
    while not there():
        dead = next((name for name, process in daemons.items() if process.poll() is not None), None)
        if dead or time.monotonic() > last:
            name = dead or list(daemons)[-1]
            lines = (root / f"{name}.out").read_text(errors="replace").strip().splitlines()
            state = "ended" if dead else f"was not ready within {START_SECONDS} s"
            raise RuntimeError(f"{name} {state}: {lines[-1] if lines else 'it said nothing'}")
        time.sleep(0.1)


def end(process: subprocess.Popen) -> None:
    """Ask, wait, kill."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_descendants() -> None:
    """Kill whoever we or ours have started, until there is nobody: every orphan comes to us."""
    last = time.monotonic() + 20
    while (left := children(os.getpid())) and time.monotonic() < last:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def run(command: Sequence[str], clients: dict[str, str]) -> int:
    """Run the command to its end; a signal to end us is handed on to it."""
    process = subprocess.Popen(list(command), env=clients)

    def hand_on(number: int, frame: object) -> None:
        # Of Ctrl-C on a terminal the command has had its own.
        if number != signal.SIGINT or not sys.stdin.isatty():
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in NOTICES}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str]) -> int:
    """Exit status: the command's, or 2 for bad input and where Slurm is missing or does not start."""
    parser = argparse.ArgumentParser(
        prog="python tests/slurm/local_slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--nodes N] [--logs DIR] -- COMMAND...",
        add_help=True,
    )
    parser.add_argument("--nodes", type=int, default=2, choices=range(1, 9), metavar="N", help="1 to 8")
    parser.add_argument("--logs", type=Path, default=None, metavar="DIR", help="where the daemons' logs go")
    parser.add_argument("command", nargs="+", help="what to run, behind --")
    asked = parser.parse_args(arguments)
    if absent := missing():
        return refuse(f"Slurm is not installed here ({', '.join(absent)}); as root: {INSTALL}")
    nodes = [f"n{i + 1}" for i in range(asked.nodes)]
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with local_slurm(root, nodes) as clients:
            return run(asked.command, clients)
    except (RuntimeError, OSError) as error:
        return refuse(str(error))
    finally:
        if asked.logs is not None:
            asked.logs.mkdir(parents=True, exist_ok=True)
            for log in root.glob("*.out"):
                shutil.copy(log, asked.logs / f"{log.stem}.log")
        shutil.rmtree(root, ignore_errors=True)


def refuse(line: str) -> int:
    """Say why not, in a line."""
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
