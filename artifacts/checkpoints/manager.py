"""Checkpoints: one atomic Orbax item a step, canonical names, verified when read.

    checkpoints/STEP/{params,opt_state,ema}     flat {name: array}, independent of mesh and schedule
    checkpoints/STEP/frozen                     the weights that do not train, where there are any that the
    record does not name a parent for
    checkpoints/STEP/guard                      what new updates are compared with
    (`training.safety.skip_updates`) checkpoints/STEP/{momentum,replicas,guards} where replicas step alone
    (`training.local_sgd`) checkpoints/STEP/_CHECKPOINT_METADATA       our record: types and digests of
    arrays, data position, tokens checkpoints/STEP/FILES.sha256               of every file, made after the
    commit (`checkpoint_files`)

A restore recomputes every array's digest and compares the small files with their sha256. A checkpoint that
fails is moved to `quarantine/STEP` with its reason, and the newest one that passes is used: never a silent
wrong number. With a URL as `checkpoint.directory` each is also sent there, and fetched where it is not here.

All processes of a job make the same calls in the same order, each reads and writes the parts that its devices
hold, and what one finds damaged, all do; the primary alone moves directories.
"""

import functools
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from artifacts.checkpoints.background import Care
from artifacts.checkpoints.digest import begun, differing, digests, numbers
from artifacts.checkpoints.errors import CorruptCheckpoint, corruption, faults, one_verdict
from artifacts.checkpoints.files import check_small_files
from artifacts.checkpoints.record import (
    HOLE,
    LOCAL,
    OPTIONAL,
    Leaves,
    flat,
    in_parts,
    items_of,
    leaf_of,
    like,
    named_leaves,
    seal,
    trees_of,
    types_of,
    unseal,
    without_holes,
)
from artifacts.checkpoints.remote import Remote
from artifacts.config import CheckpointConfig
from common.errors import RunFault
from parallel import processes

FORMAT = 1
SEND_SECONDS = 3600  # that the others wait for the primary to hash and send a checkpoint
SAVE_SECONDS = 600  # for a save, waiting for other processes included: what one of them cannot write ends all
ABANDON_SECONDS = 30  # that a save under way gets when the job ends in a fault, and hashes at a notice


def _context() -> ocp.Context:
    """Orbax's options. Weights shrink by 8 % compressed, and unpacking takes as long as four reads."""
    return ocp.Context(
        async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_SECONDS),
        array_options=ocp.options.ArrayOptions(saving=ocp.options.ArrayOptions.Saving(use_compression=False)),
    )


StateT = TypeVar("StateT", bound=Any)  # a state as `training.state.TrainState` is one


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous; `wait` raises what went wrong behind its back."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        remote: Remote | None = None,
    ):
        """`read_only`: for a run that may be alive; what its writer has under way is left alone.

        remote: where else they are, `directory` being the staging of that.
        """
        # What goes wrong in Orbax's threads it logs in pages, and raises; we say it once, in a line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory, self.remote = Path(directory).absolute(), remote
        self._keep = max(config.keep, config.average_last)
        self._care: Care | None = None  # the primary's
        # Orbax reads every step's record when it opens the directory, and one that it cannot parse stops it.
        self._quarantined: list[str] = []
        if not read_only:
            self._quarantined = processes.from_primary("unreadable checkpoints", self._tidy)
            if processes.is_primary():
                self._care = Care(self.directory, self._send if remote is not None else None)
        policies = ocp.training
        with corruption(f"of {self.directory}"):
            self._checkpointer = policies.Checkpointer(
                str(self.directory),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=not read_only,
                context=_context(),
            )

    def _tidy(self) -> list[str]:
        if self.remote is not None:
            self.remote.tidy()
        return self._set_unreadable_apart()

    def _send(self, step: int) -> None:
        assert self.remote is not None
        self.remote.send(step, self.directory / str(step), self.directory.parent)
        self.remote.tidy(self._keep)

    def _set_unreadable_apart(self) -> list[str]:
        reasons = []
        for step in self._directories():
            try:
                with corruption(step):
                    unseal(ocp.checkpointables_metadata(self.directory / str(step)).custom_metadata)
            except CorruptCheckpoint as error:
                reasons.append(self._set_apart(step, str(error)))
        return reasons

    def _directories(self) -> list[int]:
        # Under their final names, whether Orbax takes them for checkpoints or not.
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, here or in the bucket, oldest first."""
        there = self.remote.steps() if self.remote is not None else []
        return sorted({*there, *self.local_steps()})

    def local_steps(self) -> list[int]:
        """Those that are on this machine."""
        return sorted(c.step for c in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Begin to write the state after `step` steps; `record` is JSON (data position, manifest).

        The call returns when the arrays are safe from donation. Raises RunFault where this or the previous
        save failed: a checkpoint that was not written must never pass for one. The one before is waited
        for with all that follows it, since the oldest is removed meanwhile.
        """
        self.wait(sent=True)
        items = items_of(state)
        # jax reuses donated buffers, and on CPU the writer would read the very same memory.
        if jax.default_backend() == "cpu":
            items = jax.tree.map(jnp.copy, items)
        facts = {"types": types_of(items), "digests": digests(flat(items))}
        body = {"format": FORMAT, "step": step, **facts, **record}
        with self._writing():
            saving = self._checkpointer.save_checkpointables_async(step, items, custom_metadata=seal(body))
        assert saving is not None
        if self._care is not None:
            self._care.expect(step)

    def wait(self, *, sent: bool | None = None) -> None:
        """Block until the save under way has been committed, and sent where there is a bucket.

        sent: also until its files are hashed, bucket or not. All processes call it.
        """
        with self._writing():
            self._checkpointer.wait()
            self._decided()
            if sent or self.remote is not None:
                finish = self._care.finish if self._care is not None else bool
                processes.from_primary("the last checkpoint's files", finish, SEND_SECONDS)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with faults(f"a checkpoint could not be written to {self.directory}"):
            try:
                yield
            except Exception:
                self._decided()
                raise

    def _decided(self) -> None:
        if self._care is not None:
            self._care.decided()

    def newest_committed(self) -> int:
        """The newest step on the disk once the save under way is there, 0 for none; also after an interrupt.

        Orbax strikes a step off its list where the wait for it was interrupted, and commits it all the same.
        """
        with self._writing():
            self._checkpointer.wait()
        return max(self._directories(), default=0)

    def close(self, seconds: float | None = None) -> None:
        """Commit what is under way and stop the writer; its files get `seconds` to be hashed and sent."""
        with self._writing():
            self._checkpointer.close()
            self._decided()
            if self._care is not None:
                self._care.finish(seconds)

    def leave(self, kind: Any, error: Any, trace: Any) -> None:
        """`close`, as the exit of a context.

        After a fault in a job of several processes the others may never come to finish a save: it gets a
        while, and what is not committed by then is what a kill would leave.
        """
        if kind is None or processes.process_count() == 1:
            self.close(None if kind is None else ABANDON_SECONDS)
        elif self._checkpointer.is_saving_in_progress():
            waiting = threading.Thread(target=self._checkpointer.wait, daemon=True)
            waiting.start()
            waiting.join(ABANDON_SECONDS)

    def record(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays. Raises CorruptCheckpoint where it was altered."""
        if processes.process_count() > 1 and not (self.directory / str(step)).is_dir():
            raise processes.ClusterFault(
                f"process {processes.process_index()} does not see {self.directory / str(step)}, "
                "which others do; put run.dir on a file system that all processes share"
            )
        with corruption(step):
            record = unseal(self._checkpointer.checkpointables_metadata(step).custom_metadata)
        if record["step"] != step:
            raise CorruptCheckpoint(f"{self.directory}/{step} is the checkpoint of step {record['step']}")
        return record

    def saved_at(self, step: int) -> float:
        """When it was written, in seconds since 1970 by its writer's clock. Raises as `record` does."""
        with corruption(step):
            written = self._checkpointer.checkpointables_metadata(step).commit_timestamp_nsecs
        if written is None:
            raise CorruptCheckpoint(f"{self.directory}/{step} does not say when it was written")
        return written / 1e9

    def restore(self, step: int, abstract: StateT) -> tuple[StateT, dict[str, Any]]:
        """The verified state at `step`, placed as `abstract` says, and its record.

        `local` and `guard` have what of them is there in the same shape. Raises ValueError where anything
        else is of another shape or dtype, CorruptCheckpoint where its numbers are not those that were saved.
        """
        wanted = trees_of(abstract)
        record, found = self._load(step, items_of(abstract))
        trees = {item: like(wanted[item], leaves) for item, leaves in found.items() if item in wanted}
        local = {item: trees[item] for item in LOCAL if item in trees} or None
        guard = trees.get("guard")
        count = jax.make_array_from_callback(
            (), abstract.step.sharding, lambda _: np.asarray(record["step"], np.int32)
        )
        restored = {item: trees.get(item) for item in ("params", "opt_state", "ema", "frozen")}
        return abstract.replace(step=count, **restored, local=local, guard=guard), record

    def restore_weights(self, step: int, abstract_params: Any, *, item: str = "params") -> Any:
        """Only the parameters (or another item of weights: ema, frozen), verified."""
        _, restored = self._load(step, {item: named_leaves(abstract_params)})
        return like(abstract_params, restored[item])

    def read(self, step: int, names: Collection[str]) -> Leaves:
        """Some arrays by their full names, on one device, as they are: nothing is verified.

        For tools that look into a checkpoint without the model that it is of. Raises CorruptCheckpoint where
        they cannot be read.
        """
        types = self.record(step)["types"]
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted: dict[str, dict[str, Any]] = {}
        for full, kind in types.items():
            item, _, name = full.partition(".")
            wanted.setdefault(item, {})[name] = leaf_of(kind, here) if full in names else HOLE
        wanted = {i: w for i, w in wanted.items() if any(leaf is not HOLE for leaf in w.values())}
        with corruption(step):
            return flat(without_holes(wanted, self._checkpointer.load_checkpointables(step, wanted)))

    def _load(self, step: int, wanted: dict[str, Leaves]) -> tuple[dict[str, Any], dict[str, Leaves]]:
        """The record and the verified arrays."""
        self.bring(step)
        with one_verdict(f"the record of checkpoint {step}"):
            record = self.record(step)
            if processes.is_primary():
                with corruption(step):
                    check_small_files(self.directory / str(step))
            if "ema" in wanted and not any(n.startswith("ema.") for n in record["digests"]):
                raise ValueError(
                    f"{self.directory} has no ema at step {step}; set training.ema_decay to keep one"
                )
            kinds = record["types"].items()
            wanted = {
                i: w for i, w in wanted.items() if i not in OPTIONAL or types_of({i: w}).items() <= kinds
            }
            self._check_types(step, wanted, record["types"])
        restored: dict[str, Leaves] = {item: {} for item in wanted}
        found: dict[str, jax.Array] = {}
        for part in in_parts(wanted):
            with one_verdict(f"the arrays of checkpoint {step}"), corruption(step):
                read = self._checkpointer.load_checkpointables(step, part)
            read = without_holes(part, read)
            found |= begun(flat(read))  # while the next part is read
            for item, leaves in read.items():
                restored[item] |= leaves
        # The same on every process, since every device takes part in each sum.
        saved = {n: d for n, d in record["digests"].items() if n.split(".")[0] in wanted}
        bad = differing(saved, numbers(found))
        if bad:
            raise CorruptCheckpoint(f"{self.directory}/{step}: {len(bad)} arrays are altered, first {bad[0]}")
        return record, restored

    def _check_types(self, step: int, wanted: dict[str, Leaves], kinds: dict[str, str]) -> None:
        """Refuse another shape or dtype, which Orbax would pad, cut or cast in silence.

        What the sealed record says is the config's business, what the files say beside it is damage.
        """
        mine = types_of(wanted)
        saved = {name: kind for name, kind in kinds.items() if name.split(".")[0] in wanted}
        for name in differing(saved, mine):
            raise ValueError(
                f"{self.directory}/{step}: {name} is {saved.get(name, 'nothing')} there and "
                f"{mine.get(name, 'nothing')} in this config; use the config and the version that wrote it "
                "(config.yaml and manifest.json beside checkpoints/)"
            )
        with corruption(step):
            read = self._checkpointer.checkpointables_metadata(step).metadata
        unread = [item for item in wanted if read.get(item) is None]
        if unread:
            raise CorruptCheckpoint(f"{self.directory}/{step}: {', '.join(unread)} cannot be read")
        files = types_of({item: read[item] for item in wanted})
        for name in differing(saved, files):
            raise CorruptCheckpoint(f"{self.directory}/{step}: its files say another shape of {name}")

    def bring(self, step: int) -> None:
        """Fetch a checkpoint that only the bucket has. Raises CorruptCheckpoint where it is damaged there."""
        if self.remote is None:
            return
        fetched, reason = processes.from_primary(
            "a checkpoint from the bucket", functools.partial(self._fetch, step), SEND_SECONDS
        )
        if reason is not None:
            raise CorruptCheckpoint(reason)
        if fetched:
            self._checkpointer.reload()

    def _fetch(self, step: int) -> tuple[bool, str | None]:
        directory = self.directory / str(step)
        if directory.is_dir():
            return False, None
        assert self.remote is not None
        try:
            with faults(f"a checkpoint could not be fetched to {self.directory}"):
                self.remote.fetch(step, directory)
        except CorruptCheckpoint as error:
            return False, str(error)
        return True, None

    def restore_newest(
        self, abstract: StateT, most: int | None = None
    ) -> tuple[StateT, dict[str, Any], list[str]] | None:
        """The newest checkpoint that passes, and what was quarantined on the way; None where none is.

        most: the last step that is looked at.
        """
        quarantined = self._quarantined
        for step, remote in processes.from_primary("the checkpoints there are", lambda: self._sources(most)):
            try:
                state, record = self.restore(step, abstract)
            except CorruptCheckpoint as error:
                move = functools.partial(self._set_apart, step, str(error), remote)
                quarantined.append(processes.from_primary("quarantine", move, SEND_SECONDS))
                self._checkpointer.reload()
                continue
            if self._care is not None:  # an earlier start may have ended before its files were hashed or sent
                self._care.expect(step)
            return state, record, quarantined
        if quarantined:
            raise RunFault(f"no checkpoint of {self.directory} can be trusted: {'; '.join(quarantined)}")
        return None

    def _sources(self, most: int | None) -> list[tuple[int, bool]]:
        """What to try in turn, newest first: a step's copy here, then the bucket's."""
        there = self.remote.steps() if self.remote is not None else []
        pairs = [(step, False) for step in self.local_steps()] + [(step, True) for step in there]
        allowed = [pair for pair in pairs if most is None or pair[0] <= most]
        return sorted(allowed, key=lambda pair: (-pair[0], pair[1]))

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a rollback undid; the primary's to do."""
        for later in self._directories():
            if later > step:
                shutil.rmtree(self.directory / str(later))
        if self.remote is not None:
            self.remote.forget_after(step)

    def known_rollbacks(self) -> dict[int, int]:
        """How many rollbacks the run had when each checkpoint was made; of those that can be read."""
        known = {}
        for step in self.local_steps():
            with suppress(CorruptCheckpoint):
                known[step] = len(self.record(step).get("rollbacks", []))
        return known

    def reload(self) -> None:
        """See the checkpoints that there are now."""
        self._checkpointer.reload()

    def _set_apart(self, step: int, reason: str, remote: bool = False) -> str:
        """Move a damaged checkpoint out of the way; `remote`: the bucket's too, from where it came."""
        here = self.directory / str(step)
        if here.is_dir():
            target = self.quarantine / str(step)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            os.replace(here, target)
            (target / "REASON").write_text(reason + "\n", "utf-8")
        if remote and self.remote is not None:
            self.remote.set_apart(step, reason)
        return reason

    @property
    def quarantine(self) -> Path:
        """Where damaged ones go: beside a run's checkpoints/, inside a directory of the user's."""
        own = self.directory.name == "checkpoints"
        return (self.directory.parent if own else self.directory) / "quarantine"

    def mean_weights(self, steps: Sequence[int], abstract_params: Any) -> Any:
        """Arithmetic mean of the parameters at several steps, accumulated in float32."""
        assert steps, "a mean of nothing"
        total = None
        for step in steps:
            params = self.restore_weights(step, abstract_params)
            total = params if total is None else jax.tree.map(jnp.add, total, params)
        return jax.tree.map(lambda x: x / len(steps), total)
