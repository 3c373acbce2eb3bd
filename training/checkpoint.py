"""Checkpoints: one atomic Orbax item a step, canonical names, verified when read.

    checkpoints/STEP/{params,opt_state,ema}     flat {name: array}, independent of mesh and schedule
    checkpoints/STEP/guard                      what new updates are compared with (`training.guard`)
    checkpoints/STEP/{momentum,replicas,guards} where replicas step alone (`training.local_sgd`)
    checkpoints/STEP/_CHECKPOINT_METADATA       our record: types and digests of arrays, data position, tokens

A restore recomputes every digest. A checkpoint that fails is moved to `quarantine/STEP` with its reason, and
the newest one that passes is used: never a silent wrong number.

All processes of a job make the same calls in the same order, each reads and writes the parts that its devices
hold, and what one finds damaged, all do; the primary alone moves directories.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from parallel import cluster
from training.config import CheckpointConfig
from training.digest import combined, differing, digests
from training.errors import RunFault
from training.state import TrainState

FORMAT = 1
SAVE_SECONDS = 600  # for a save, waiting for other processes included: what one of them cannot write ends all
ABANDON_SECONDS = 30  # that a save under way gets when the job ends in a fault
Leaves = dict[str, Array]


class CorruptCheckpoint(RunFault):
    """What was read is not what was saved."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: the canonical names of a checkpoint."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


LOCAL = ("momentum", "replicas", "guards")  # of replicas that step alone
OPTIONAL = ("guard", *LOCAL)  # what a run goes on without, or with another number of replicas


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {"params": state.params, "opt_state": state.opt_state}
    if state.ema is not None:
        trees["ema"] = state.ema
    if state.guard is not None:
        trees["guard"] = state.guard
    local = state.local or {}
    assert set(local) <= set(LOCAL), "a state is saved in canonical form"
    return trees | local


def _items(state: TrainState) -> dict[str, Leaves]:
    return {item: named_leaves(tree) for item, tree in _trees(state).items()}


def _flat(items: Mapping[str, Leaves]) -> Leaves:
    return {f"{item}.{name}": leaf for item, leaves in items.items() for name, leaf in leaves.items()}


def _types(items: Mapping[str, Leaves]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _flat(items).items()}


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous; `wait` raises what went wrong behind its back."""

    def __init__(
        self, directory: str | os.PathLike[str], config: CheckpointConfig, *, read_only: bool = False
    ):
        """`read_only`: for a run that may be alive; what its writer has under way is left alone."""
        # What goes wrong in Orbax's threads it logs in pages, and raises; we say it once, in a line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = Path(directory).absolute()
        # Orbax reads every step's record when it opens the directory, and one that it cannot parse stops it.
        self._quarantined: list[str] = []
        if not read_only:
            self._quarantined = cluster.from_primary("unreadable checkpoints", self._set_unreadable_apart)
        policies = ocp.training
        with _corruption(f"of {self.directory}"):
            self._checkpointer = policies.Checkpointer(
                str(self.directory),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.preservation_policies.LatestN(
                    max(config.keep, config.average_last)
                ),
                cleanup_tmp_directories=not read_only,
                context=ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=SAVE_SECONDS)),
            )

    def _set_unreadable_apart(self) -> list[str]:
        reasons = []
        for step in self._directories():
            try:
                with _corruption(step):
                    _unseal(ocp.checkpointables_metadata(self.directory / str(step)).custom_metadata)
            except CorruptCheckpoint as error:
                reasons.append(self._set_apart(step, str(error)))
        return reasons

    def _directories(self) -> list[int]:
        # Under their final names, whether Orbax takes them for checkpoints or not.
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, oldest first."""
        return sorted(c.step for c in self._checkpointer.checkpoints)

    def save(self, step: int, state: TrainState, record: Mapping[str, Any]) -> None:
        """Begin to write the state after `step` steps; `record` is JSON (data position, manifest).

        The call returns when the arrays are safe from donation. Raises RunFault where this or the previous
        save failed: a checkpoint that was not written must never pass for one.
        """
        items = _items(state)
        # jax reuses donated buffers, and on CPU the writer would read the very same memory.
        if jax.default_backend() == "cpu":
            items = jax.tree.map(jnp.copy, items)
        facts = {"types": _types(items), "digests": digests(_flat(items))}
        body = {"format": FORMAT, "step": step, **facts, **record}
        with _faults(f"a checkpoint could not be written to {self.directory}"):
            saving = self._checkpointer.save_checkpointables_async(step, items, custom_metadata=_seal(body))
        assert saving is not None

    def wait(self) -> None:
        """Block until the save under way has been committed."""
        with _faults(f"a checkpoint could not be written to {self.directory}"):
            self._checkpointer.wait()

    def newest_committed(self) -> int:
        """The newest step on the disk once the save under way is there, 0 for none; also after an interrupt.

        Orbax strikes a step off its list where the wait for it was interrupted, and commits it all the same.
        """
        self.wait()
        return max(self._directories(), default=0)

    def close(self) -> None:
        """Commit what is under way and stop the writer."""
        with _faults(f"a checkpoint could not be written to {self.directory}"):
            self._checkpointer.close()

    def leave(self, kind: Any, error: Any, trace: Any) -> None:
        """`close`, as the exit of a context.

        After a fault in a job of several processes the others may never come to finish a save: it gets a
        while, and what is not committed by then is what a kill would leave.
        """
        if kind is None or cluster.process_count() == 1:
            self.close()
        elif self._checkpointer.is_saving_in_progress():
            waiting = threading.Thread(target=self._checkpointer.wait, daemon=True)
            waiting.start()
            waiting.join(ABANDON_SECONDS)

    def record(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays. Raises CorruptCheckpoint where it was altered."""
        if cluster.process_count() > 1 and not (self.directory / str(step)).is_dir():
            raise cluster.ClusterFault(
                f"process {cluster.process_index()} does not see {self.directory / str(step)}, which others "
                "do; put run.dir on a file system that all processes share"
            )
        with _corruption(step):
            record = _unseal(self._checkpointer.checkpointables_metadata(step).custom_metadata)
        if record["step"] != step:
            raise CorruptCheckpoint(f"{self.directory}/{step} is the checkpoint of step {record['step']}")
        return record

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The verified state at `step`, placed as `abstract` says, and its record.

        `local` and `guard` have what of them is there in the same shape. Raises ValueError where anything
        else is of another shape or dtype, CorruptCheckpoint where its numbers are not those that were saved.
        """
        wanted = _trees(abstract)
        record, restored = self._load(step, _items(abstract))
        trees = {item: _like(wanted[item], leaves) for item, leaves in restored.items() if item in wanted}
        local = {item: trees[item] for item in LOCAL if item in trees} or None
        guard = trees.get("guard")
        count = jax.make_array_from_callback(
            (), abstract.step.sharding, lambda _: np.asarray(record["step"], np.int32)
        )
        state = TrainState(count, trees["params"], trees["opt_state"], trees.get("ema"), local, guard)
        return state, record

    def restore_weights(self, step: int, abstract_params: Any, *, item: str = "params") -> Any:
        """Only the parameters (or their average, `item="ema"`), verified."""
        _, restored = self._load(step, {item: named_leaves(abstract_params)})
        return _like(abstract_params, restored[item])

    def _load(self, step: int, wanted: dict[str, Leaves]) -> tuple[dict[str, Any], dict[str, Leaves]]:
        """The record and the verified arrays."""
        with _one_verdict(f"the record of checkpoint {step}"):
            record = self.record(step)
            if "params" not in wanted and not any(n.startswith("ema.") for n in record["digests"]):
                raise ValueError(
                    f"{self.directory} has no ema at step {step}; set training.ema_decay to keep one"
                )
            kinds = record["types"].items()
            wanted = {i: w for i, w in wanted.items() if i not in OPTIONAL or _types({i: w}).items() <= kinds}
            self._check_types(step, wanted, record["types"])
        with _one_verdict(f"the arrays of checkpoint {step}"), _corruption(step):
            restored = self._checkpointer.load_checkpointables(step, wanted)
        # The same on every process, since every device takes part in each sum.
        saved = {n: d for n, d in record["digests"].items() if n.split(".")[0] in wanted}
        bad = differing(saved, digests(_flat(restored)))
        if bad:
            raise CorruptCheckpoint(f"{self.directory}/{step}: {len(bad)} arrays are altered, first {bad[0]}")
        return record, restored

    def _check_types(self, step: int, wanted: dict[str, Leaves], kinds: dict[str, str]) -> None:
        """Refuse another shape or dtype, which Orbax would pad, cut or cast in silence.

        What the sealed record says is the config's business, what the files say beside it is damage.
        """
        mine = _types(wanted)
        saved = {name: kind for name, kind in kinds.items() if name.split(".")[0] in wanted}
        for name in differing(saved, mine):
            raise ValueError(
                f"{self.directory}/{step}: {name} is {saved.get(name, 'nothing')} there and "
                f"{mine.get(name, 'nothing')} in this config; use the config that wrote it "
                f"(config.yaml beside checkpoints/)"
            )
        with _corruption(step):
            read = self._checkpointer.checkpointables_metadata(step).metadata
        unread = [item for item in wanted if read.get(item) is None]
        if unread:
            raise CorruptCheckpoint(f"{self.directory}/{step}: {', '.join(unread)} cannot be read")
        files = _types({item: read[item] for item in wanted})
        for name in differing(saved, files):
            raise CorruptCheckpoint(f"{self.directory}/{step}: its files say another shape of {name}")

    def restore_newest(
        self, abstract: TrainState, most: int | None = None
    ) -> tuple[TrainState, dict[str, Any], list[str]] | None:
        """The newest checkpoint that passes, and what was quarantined on the way; None where none is.

        most: the last step that is looked at.
        """
        quarantined = self._quarantined
        there = cluster.from_primary("the checkpoints there are", self.steps)
        for step in reversed([step for step in there if most is None or step <= most]):
            try:
                state, record = self.restore(step, abstract)
                return state, record, quarantined
            except CorruptCheckpoint as error:
                move = functools.partial(self._set_apart, step, str(error))
                quarantined.append(cluster.from_primary("quarantine", move))
                self._checkpointer.reload()
        if quarantined:
            raise RunFault(f"no checkpoint of {self.directory} can be trusted: {'; '.join(quarantined)}")
        return None

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a rollback undid; the primary's to do."""
        for later in self._directories():
            if later > step:
                shutil.rmtree(self.directory / str(later))

    def known_rollbacks(self) -> dict[int, int]:
        """How many rollbacks the run had when each checkpoint was made; of those that can be read."""
        known = {}
        for step in self.steps():
            with suppress(CorruptCheckpoint):
                known[step] = len(self.record(step).get("rollbacks", []))
        return known

    def reload(self) -> None:
        """See the checkpoints that there are now."""
        self._checkpointer.reload()

    def _set_apart(self, step: int, reason: str) -> str:
        target = self.directory.parent / "quarantine" / str(step)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.replace(self.directory / str(step), target)
        (target / "REASON").write_text(reason + "\n")
        return reason

    def mean_weights(self, steps: Sequence[int], abstract_params: Any) -> Any:
        """Arithmetic mean of the parameters at several steps, accumulated in float32."""
        assert steps, "a mean of nothing"
        total = None
        for step in steps:
            params = self.restore_weights(step, abstract_params)
            total = params if total is None else jax.tree.map(jnp.add, total, params)
        return jax.tree.map(lambda x: x / len(steps), total)


@contextmanager
def _one_verdict(name: str) -> Iterator[None]:
    """Where one process finds a checkpoint damaged, all do, and none is left waiting in a collective."""
    try:
        with cluster.together(name):
            yield
    except cluster.Elsewhere as error:
        raise CorruptCheckpoint(str(error)) from error


def _like(tree: Any, leaves: Leaves) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in named_leaves(tree)])


def _seal(body: Mapping[str, Any]) -> dict[str, str]:
    text = json.dumps(body, sort_keys=True)
    return {"record": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _unseal(sealed: Mapping[str, str]) -> dict[str, Any]:
    text = sealed["record"]
    if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
        raise CorruptCheckpoint("the record of digests was altered")
    return json.loads(text)


def state_digest(record: Mapping[str, Any]) -> str:
    """The digest by which one run names another's checkpoint."""
    return combined(record["digests"])


@contextmanager
def _faults(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax, tensorstore and the file system each raise their own
        remedy = "free space or mend the disk, then the same command goes on from the last good one"
        raise RunFault(f"{what}: {_disk_says(error) or _first_line(error)}; {remedy}") from error


@functools.cache
def _hush() -> None:
    """Drop what is said of the reads that Orbax gives up beside a failing one: pages, and no word of use.

    The failure itself is raised. Each of them ends in a coroutine that nobody awaits, a task whose error
    nobody asks for, and a callback into an event loop that is closed, at any time afterwards.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def unless_closed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_closed


@contextmanager
def _corruption(step: int | str) -> Iterator[None]:
    _hush()
    try:
        yield
    except CorruptCheckpoint:
        raise
    except Exception as error:  # a truncated file surfaces as any of a dozen types
        raise CorruptCheckpoint(f"checkpoint {step} cannot be read: {_first_line(error)}") from error


def _disk_says(error: Exception) -> str | None:
    """The operating system's words, which tensorstore hides behind a long path."""
    reasons = (
        os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
    )
    return next((reason for reason in reasons if reason in str(error)), None)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
