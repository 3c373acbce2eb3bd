"""Several processes as one job: how they find each other, agree, and end together.

`initialize` joins a job when the environment says that there is one: `scripts/launch_local.py` on one
machine, or Slurm, Open MPI and Cloud TPU through JAX's own detection. Alone, every function is a no-op.

Three rules keep a job from hanging or from half-happening:

* Work that can fail before the first step stands in `all_or_none` or `from_primary`: all processes go on past
  it, or all raise, with one status. Such blocks follow each other and are never nested: a process that fails
  skips what is inside, where others would wait for it.
* Every wait has a name and a limit, and says both when it is over.
* In mid-run nobody is asked: a process that fails says so and ends, and the others end by their launcher, by
  a broken connection, or after HEARTBEAT seconds.

Importing this module does not import JAX: a command line is refused before JAX takes its seconds.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from common.text import first_line

COORDINATOR, PROCESSES, PROCESS = "CAMBRIAN_COORDINATOR", "CAMBRIAN_PROCESSES", "CAMBRIAN_PROCESS"
VERDICT = "CAMBRIAN_VERDICT"  # a file, see `write_verdict`
JOIN = "CAMBRIAN_JOIN_SECONDS"  # how long a start waits for the others

JOIN_SECONDS = 300
WAIT_SECONDS = 600  # for what takes all processes about as long
HEARTBEAT = 60  # seconds of silence after which a process counts as dead, and the job ends
PARTING_SECONDS = 5  # for the others to come to the same end


class ClusterFault(RuntimeError):
    """Another process is gone, late, or met a fault: nothing that this command line can mend."""


class PeerFault(ClusterFault):
    """A fault that another process met in a block that all go through together."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in a job that `launch_local` (or the user) describes."""

    coordinator: str
    count: int
    index: int


def place_in(environment: Mapping[str, str]) -> Place | None:
    """What our own three variables say; None where none of them is set. ValueError on nonsense."""
    # All or none of the three: a job with one missing would start as several runs of one process each, which
    # write into one directory.
    names = (COORDINATOR, PROCESSES, PROCESS)
    missing = [name for name in names if not environment.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise ValueError(f"{missing[0]} is not set, but others of {', '.join(names)} are; set all or none")
    coordinator = environment[COORDINATOR]
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{COORDINATOR}={coordinator} is no address; give HOST:PORT of process 0")
    count, index = (_whole(environment, name) for name in (PROCESSES, PROCESS))
    if count < 1:
        raise ValueError(f"{PROCESSES}={count} must be 1 or more")
    if not 0 <= index < count:
        raise ValueError(f"{PROCESS}={index} must be from 0 to {count - 1}: {PROCESSES}={count}")
    return Place(coordinator, count, index)


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{name}={text} is not a whole number") from None


def launcher(environment: Mapping[str, str]) -> str | None:
    """Who else started several tasks, by the name that JAX's detection has for it; None for one task.

    A batch script that was never given to srun, and a single task, have a part of these variables: they run
    alone, where JAX by itself would wait for others or break.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and _whole(environment, "SLURM_NTASKS", 1) > 1:
        return "slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and _whole(environment, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return "ompi"
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or _whole(environment, "MEGASCALE_NUM_SLICES", 1) > 1:
        return "gketpu" if hosts else "gcetpu"
    return None


def initialize(environment: Mapping[str, str] | None = None) -> None:
    """Join the job that the environment describes; nothing where it describes none. Before any device query.

    A second call does nothing. Raises ValueError where the environment makes no sense, ClusterFault where the
    others do not come within CAMBRIAN_JOIN_SECONDS (300).
    """
    environment = os.environ if environment is None else environment
    place, method = place_in(environment), launcher(environment)
    if (place is None or place.count == 1) and (place is not None or method is None):
        return
    limit = _whole(environment, JOIN, JOIN_SECONDS)
    import jax

    if jax.distributed.is_initialized():
        return
    # For CPUs alone: GPUs and TPUs have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM away from the process for a notice that nobody here reads.
    jax.config.update("jax_enable_preemption_service", False)
    common: dict[str, Any] = {"initialization_timeout": limit, "heartbeat_timeout_seconds": HEARTBEAT}
    try:
        if place is not None:
            _muster(place, limit)
        with _no_proxy():
            if place is not None:
                at = (place.coordinator, place.count, place.index)
                jax.distributed.initialize(*at, cluster_detection_method="deactivate", **common)
            else:
                jax.distributed.initialize(cluster_detection_method=method, **common)
    # One line, since gRPC's errors are pages: the place and the first line say what to look at.
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, ClusterFault):
            raise
        where = place.coordinator if place else f"the {method} job"
        raise ClusterFault(f"joining {where} failed: {first_line(error)}") from error


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """The environment without http_proxy and its like, while a job is joined.

    gRPC reads them when it opens its one connection, to the coordinator, and would ask a proxy for a host
    inside the job: no_proxy need not have it, and JAX warns of that variable as well.
    """
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(proxies)


def _muster(place: Place, limit: float) -> None:
    """Return when all processes are there, so that JAX does not have to wait: it aborts with a stack dump."""
    end = time.monotonic() + limit
    if place.index:
        _report_to(place, end, limit)
    else:
        _gather(place, end, limit)


def _report_to(place: Place, end: float, limit: float) -> None:
    host, _, port = place.coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=1) as line:
                line.sendall(f"{place.index}\n".encode())
                line.settimeout(max(0.1, end - time.monotonic()))
                if line.recv(1):
                    return
        except OSError:
            pass
        if time.monotonic() >= end:
            raise ClusterFault(
                f"process {place.index}: the coordinator {place.coordinator} did not answer within {limit:g} "
                f"s; see whether process 0 runs there and the port is open, or raise {JOIN}"
            )
        time.sleep(0.1)


def _gather(place: Place, end: float, limit: float) -> None:
    port = int(place.coordinator.rpartition(":")[2])
    try:
        # The coordinator's own port: JAX takes it a moment later, so what blocks it is found here, with a
        # remedy.
        server = socket.create_server(("", port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ClusterFault(f"{COORDINATOR}={place.coordinator}: {reason}; choose another port") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        there: dict[int, socket.socket] = {}
        while len(there) < place.count - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                line, _ = server.accept()
                stack.enter_context(line)
                line.settimeout(1)
                there[int(line.recv(16))] = line
            except (TimeoutError, ValueError):  # nobody, or a stranger on our port
                pass
            if time.monotonic() >= end:
                late = ", ".join(str(i) for i in range(1, place.count) if i not in there)
                raise ClusterFault(
                    f"of {place.count} processes these did not join {place.coordinator} within {limit:g} s: "
                    f"{late}; see why they did not start, or raise {JOIN}"
                )
        # Only now: nobody goes on to JAX until all are there.
        for line in there.values():
            line.sendall(b"!")


def _client() -> Any:
    """The coordination service's client; None for a process alone."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed  # the service has no public name

    return distributed.global_state.client


def process_count() -> int:
    """How many processes the job has: 1 without a cluster."""
    if _client() is None:
        return 1
    import jax

    return jax.process_count()


def process_index() -> int:
    """The number of this process, from 0."""
    if _client() is None:
        return 0
    import jax

    return jax.process_index()


def is_primary() -> bool:
    """Whether this is the process that writes and prints."""
    return process_index() == 0


_uses: Counter[str] = Counter()
_agreed: set[str] = set()
_alone = False  # this process has come to an end of its own: nobody will meet it again


def barrier(name: str, seconds: float = WAIT_SECONDS) -> None:
    """Wait until every process is here. Raises ClusterFault after `seconds`, or when one is gone."""
    exchange(name, None, seconds)


def exchange(name: str, value: Any, seconds: float = WAIT_SECONDS) -> list[Any]:
    """Every process's JSON-able value, by process. All call it in one order, `name` being for the error.

    Raises ClusterFault where not all have come within `seconds`, or one is gone.
    """
    client = _client()
    if client is None:
        return [value]
    if _alone:
        raise ClusterFault(f"process {process_index()} has left the job; start the command again")
    # JAX's barriers and keys are used once: a counter makes each use another, and since all come in one
    # order, it is the same on every process.
    _uses[name] += 1
    key = f"cambrian/{name}/{_uses[name]}"
    try:
        client.key_value_set(f"{key}/{process_index()}", json.dumps(value))
        # Set, wait, read: behind the barrier every value is there, and no one reads before.
        client.wait_at_barrier(key, int(seconds * 1000))
        found = {int(k.rsplit("/", 1)[1]): json.loads(v) for k, v in client.key_value_dir_get(key)}
    except RuntimeError as error:
        raise ClusterFault(
            f"process {process_index()} waited {seconds:g} s at most for the others at {name!r}: "
            f"{first_line(error)}"
        ) from error
    return [found[i] for i in range(len(found))]


@contextlib.contextmanager
def all_or_none(name: str, seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """All processes go on past this block, or none: what the first one met, all raise.

    ValueError and OSError count as bad input, everything else as a fault; the others raise ValueError and
    ClusterFault for them, with the same line.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        if process_count() == 1:
            raise
        mine = error
    if process_count() > 1:
        _compare(exchange(name, _said(mine), seconds), mine)


def _said(error: Exception | None) -> list[str] | None:
    if error is None:
        return None
    kind = "input" if isinstance(error, ValueError | OSError) else "fault"
    if isinstance(error, ClusterFault) and not isinstance(error, PeerFault):
        kind = "cluster"
    # An error of ours, not of the input: its message alone (`KeyError: 'x'`) says nothing without its type.
    defect = isinstance(error, AssertionError | TypeError | LookupError | AttributeError)
    return [kind, f"{type(error).__name__}: {error}" if defect else str(error)]


def _compare(said: list[Any], mine: Exception | None) -> None:
    # The lowest number's, so that all say the same line and one of them prints it.
    first = next((i for i, what in enumerate(said) if what), None)
    if first is None:
        return
    kind, line = said[first]
    _agreed.add(line)
    if mine is not None and first == process_index():
        raise mine
    # The class decides the exit status, so it has to be the same on every process as on the one that failed.
    raise {"input": ValueError, "fault": PeerFault, "cluster": ClusterFault}[kind](line) from mine


def from_primary(name: str, make: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """What `make()` returns on the primary, JSON-able, on every process; what it raises, all raise."""
    mine: Exception | None = None
    value = None
    try:
        value = make() if is_primary() else None
    except Exception as error:
        if process_count() == 1:
            raise
        mine = error
    if process_count() == 1:
        return value
    said = exchange(name, [_said(mine), value], seconds)
    _compare([error for error, _ in said], mine)
    return said[0][1]


def same(name: str, value: Any, remedy: str) -> None:
    """ValueError on every process, naming the first that differs, unless all have the primary's value."""
    said = exchange(name, value)
    other = next((i for i, what in enumerate(said) if what != said[0]), None)
    if other is not None:
        line = f"process {other} has another {name} than process 0; {remedy}"
        _agreed.add(line)
        raise ValueError(line)


def prints_error(line: str) -> bool:
    """Whether this process is the one that prints `line`, the last of a job that ends badly.

    An error that all have agreed on is the primary's to say. Of others, those who come to the same end within
    a few seconds compare, and the first of them speaks; one that ends alone speaks for itself.
    """
    if process_count() == 1:
        return True
    if line in _agreed:
        return is_primary()
    global _alone
    try:
        return exchange("the end", line, PARTING_SECONDS).index(line) == process_index()
    except ClusterFault:
        _alone = True
        return True


def write_verdict(status: int) -> None:
    """Write a status that a person should see, 1 or 2, to the file that $CAMBRIAN_VERDICT names, if it does.

    Others of the job may be killed or abort for want of this process, and a launcher that hears of the
    highest status alone would take that for the reason. A file that cannot be written is left out.
    """
    path = os.environ.get(VERDICT)
    if path and status in (1, 2):
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{status}\n")


def leave(status: int) -> NoReturn:
    """End this process with `status`; with a bad one, without waiting for processes that will not come.

    An ordinary exit meets the others in JAX's shutdown. After a failure they may never get there, and the
    process that holds the coordinator goes last, since the others abort when it is gone.
    """
    client = _client()
    if status == 0 or client is None:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    # The service may be gone already, with the process that held it: then there is nobody to tell.
    with contextlib.suppress(RuntimeError):
        client.key_value_set(f"cambrian/left/{process_index()}", "")
        end = time.monotonic() + PARTING_SECONDS
        while is_primary() and time.monotonic() < end:
            if len(client.key_value_dir_get("cambrian/left")) == process_count():
                time.sleep(0.2)  # for them to be gone
                break
            time.sleep(0.05)
    os._exit(status)


def restart_as(count: int, variables: Mapping[str, str]) -> NoReturn:
    """The first `count` processes start their command again as a job of their own; the others end, status 0.

    All call it together, before the first step. A process that has no device in a mesh cannot follow the
    others' programs, and JAX does not let one leave a job that is under way, so the job is made anew; what
    was done until here is done again. `variables` are added to the environment of those who go on.
    """
    import jax
    from jax._src import distributed  # the address has no public name

    host = str(distributed.global_state.coordinator_address).rpartition(":")[0]
    port = from_primary("a port for the smaller job", free_port)
    index = process_index()
    sys.stdout.flush()
    sys.stderr.flush()
    jax.distributed.shutdown()  # waits for all
    if index >= count:
        os._exit(0)
    own = {COORDINATOR: f"{host}:{port}", PROCESSES: str(count), PROCESS: str(index)}
    # The same process id: a launcher that waits for it sees no end, and the new job needs no launcher.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **own, **variables})


def free_port() -> int:
    """A port that was free a moment ago, on every address of this machine."""
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])
