"""Notices to leave: SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 mean "save now, then exit 75, start me again".

Schedulers send one before they take the machine away: Slurm SIGTERM at preemption and cancellation and what
`--signal` names before the time limit, Kubernetes SIGTERM, submitit SIGUSR2, a person Ctrl-C. A second one
ends the process at once, in whatever it is stuck.

All processes of a job have to stop behind the same step, or the others wait for ever in a collective, and the
notice may reach one of them alone. So a step of several processes carries a vote: one element a device, zeros
until the process has had its notice, and their maximum comes back among the step's metrics. Those are the
same on every process and every process reads them at the same place in its loop: they agree without waiting
for one another. Where replicas step alone (`training.local_sgd`) steps have nothing in common but the outer
one, and hosts ask each other there.
"""

import os
import signal
import socket
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from common.errors import Ended, Requeue
from common.terminal import write_at_once
from parallel import processes

VOTE = "stop"  # beside the batch where several processes must stop together: see `training.safety.signals`
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Notices:
    """Listens for notices while it is entered; `name` is the first signal's, None before.

    Outside of `steps()` there is no step to finish, and a notice raises where the main thread stands: Ctrl-C
    KeyboardInterrupt, the others `Ended`. The signals are read from a pipe by a thread: Python's own
    handlers wait until the main thread leaves the call it is in, which in a hung collective is never.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._stepping = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Notices":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may listen
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def steps(self) -> "_Steps":
        """Around the loop: a notice is only noted, and acted upon behind a step."""
        return _Steps(self)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stepping:
            return  # the thread has it
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Ended(f"{signal.Signals(number).name} outside of the steps; the same command goes on")

    def _listen(self) -> None:
        while received := self._reader.recv(64):
            for number in received:
                if number in SIGNALS and self._stepping:
                    self._note(signal.Signals(number).name)

    def _note(self, name: str) -> None:
        if self.name is not None:
            write_at_once(2, f"{name} after {self.name}: leaving at once\n")
            os._exit(Requeue.status)
        self.name = name
        write_at_once(1, f"{name}: saving after this step, then leaving; once more leaves at once\n")


class _Steps:
    def __init__(self, notices: Notices):
        self.notices = notices

    def __enter__(self) -> Notices:
        self.notices._stepping = True
        return self.notices

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self.notices._stepping = False


class Stopping:
    """Whether this is the step to stop behind: the same answer on every process of the job.

    mesh: of the step that votes, None where steps carry none. inner_steps: of replicas that step alone.
    """

    def __init__(self, notices: Notices, mesh: Mesh | None, inner_steps: int):
        self.notices, self.inner_steps = notices, inner_steps
        self.votes = None if mesh is None else [_vote(mesh, value) for value in (0, 1)]

    def ballot(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch, with this process's vote beside it where steps carry one."""
        if self.votes is None:
            return batch
        return batch | {VOTE: self.votes[self.notices.name is not None]}

    def agreed(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Whether all stop behind `step`; metrics: of the last step whose metrics were read."""
        if self.votes is not None:
            return bool(metrics.get(VOTE, 0))
        if step % self.inner_steps:
            return False  # replicas differ in between
        if self.inner_steps > 1 and processes.process_count() > 1:
            return any(processes.exchange("notices to leave", self.notices.name))
        return self.notices.name is not None

    def said(self, step: int) -> Requeue:
        """What ends the job, in the same words on every process."""
        names = processes.exchange("who was told to leave", self.notices.name)
        name = next(name for name in names if name is not None)
        return Requeue(f"{name}; saved at step {step}, from where the same command goes on")


def _vote(mesh: Mesh, value: int) -> Int32[Array, " N"]:
    abstract = abstract_vote(mesh)
    all_of_them = np.full(abstract.shape, value, np.int32)
    place: Any = abstract.sharding
    return jax.make_array_from_callback(abstract.shape, place, lambda index: all_of_them[index])


def abstract_vote(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape and sharding of a vote: int32 [devices], each device its own element."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=sharding)
