"""Arrays that several devices hold alike, compared: a flipped bit in one is found, and its device named.

Parameters that are not split over every mesh axis lie on several devices, which make the same update of the
same gradient. Memory or arithmetic that errs makes one of them another, for good and without a word: each
gives its wrong gradients to all others from then on. Every device digests what it holds (no array moves), the
hosts exchange the digests, and of devices that should agree the few that do not are named.

What it does not see: a wrong gradient, since it is summed over all devices and wrong on all alike; and arrays
that are split over all devices.
"""

import hashlib
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from artifacts.checkpoints.digest import leaf_digest
from artifacts.checkpoints.manager import named_leaves
from common.errors import RunFault
from parallel import processes

SHOWN = 4  # arrays and devices of a message


class ReplicaCheck:
    """Compares what the devices of a mesh hold of a state. Every process calls `look` after the same step.

    state: abstract, with shardings. Of its leaves those count that lie on several devices.
    """

    def __init__(self, state: Any, mesh: jax.sharding.Mesh):
        self.mesh = mesh
        named = named_leaves(state)
        self.kept = [n for n, leaf in enumerate(named.values()) if _copies(leaf) > 1]
        self.names = [list(named)[n] for n in self.kept]
        shardings = [list(named.values())[n].sharding for n in self.kept]
        self.groups = [_groups(leaf, mesh) for n, leaf in enumerate(named.values()) if n in set(self.kept)]
        self.kinds = sorted({tuple(map(tuple, groups)) for groups in self.groups})
        each = PartitionSpec(mesh.axis_names)
        local = jax.shard_map(
            _digests,
            mesh=mesh,
            in_specs=([s.spec for s in shardings],),
            out_specs=each,
            check_vma=False,
        )
        self._digests = jax.jit(local, in_shardings=(shardings,), out_shardings=NamedSharding(mesh, each))

    def look(self, step: int, leaves: Sequence[Array]) -> None:
        """Raise RunFault, on every process, where devices that should hold the same do not."""
        if not self.kept:
            return
        found = self._digests([leaves[n] for n in self.kept])
        mine = {shard.index[0].start or 0: np.asarray(shard.data)[0] for shard in found.addressable_shards}
        said = processes.exchange("digests of replicas", [self._short(mine), socket.gethostname()])
        short = {int(d): kinds for kinds, _ in said for d, kinds in kinds.items()}
        if all(_agree({d: k[n] for d, k in short.items()}, kind) for n, kind in enumerate(self.kinds)):
            return
        # Something differs: only now all that was seen is sent, to name it.
        told = processes.exchange("digests that differ", {str(d): row.tolist() for d, row in mine.items()})
        rows = {int(d): row for part in told for d, row in part.items()}
        hosts = [host for _, host in said]
        raise RunFault(self._complaint(step, rows, hosts))

    def _short(self, mine: Mapping[int, np.ndarray]) -> dict[str, list[str]]:
        """Of each device one digest for all arrays that lie alike."""

        def joined(row: np.ndarray, kind: Any) -> str:
            alike = [tuple(map(tuple, groups)) == kind for groups in self.groups]
            return hashlib.sha256(row[np.array(alike)].tobytes()).hexdigest()[:16]

        return {str(d): [joined(row, kind) for kind in self.kinds] for d, row in mine.items()}

    def _complaint(self, step: int, rows: Mapping[int, Sequence[int]], hosts: Sequence[str]) -> str:
        wrong: dict[int, list[str]] = {}
        certain = True
        for n, (name, groups) in enumerate(zip(self.names, self.groups, strict=True)):
            for group in groups:
                odd, known = odd_ones({d: rows[d][n] for d in group})
                certain = certain and (known or not odd)
                for device in odd:
                    wrong.setdefault(device, []).append(name)
        devices = list(self.mesh.devices.flat)
        parts = []
        for number, names in list(wrong.items())[:SHOWN]:
            device = devices[number]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            place = f"device {device.id} of process {device.process_index} on {hosts[device.process_index]}"
            parts.append(f"{place} ({', '.join(names[:SHOWN])}{more})")
        if len(wrong) > SHOWN:
            parts.append(f"{len(wrong) - SHOWN} more devices")
        verdict = "hold other numbers than the rest" if certain else "differ, and which is right is not known"
        return (
            f"replica check at step {step}: {'; '.join(parts)} {verdict}; keep that host out of the job, "
            "then the same command goes on from the last checkpoint"
        )


def odd_ones(values: Mapping[int, int]) -> tuple[list[int], bool]:
    """Of devices that should agree those outside of the majority, and whether there is one.

    Without a majority all of them are odd.
    """
    counts = Counter(values.values())
    if len(counts) <= 1:
        return [], True
    value, number = counts.most_common(1)[0]
    known = 2 * number > len(values)
    return [d for d, v in values.items() if not known or v != value], known


def _agree(values: Mapping[int, Any], groups: Sequence[Sequence[int]]) -> bool:
    return all(len({values[d] for d in group}) == 1 for group in groups)


def _copies(leaf: Any) -> int:
    return len(leaf.sharding.device_set) // len(_blocks(leaf))


def _blocks(leaf: Any) -> dict[Any, list[Any]]:
    """Devices by the part of the array that they hold."""
    blocks: dict[Any, list[Any]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        blocks.setdefault(key, []).append(device)
    return blocks


def _groups(leaf: Any, mesh: jax.sharding.Mesh) -> list[list[int]]:
    """Positions in the mesh of devices that hold the same part."""
    number = {device: n for n, device in enumerate(mesh.devices.flat)}
    return sorted(sorted(number[d] for d in devices) for devices in _blocks(leaf).values())


def _digests(blocks: list[Array]) -> Array:
    return jnp.stack([leaf_digest(block) for block in blocks])[None]
