"""A start on other devices than the last: how many there are, how long the queue is, what `decide` says.

The primary asks and decides, the others take its word. Devices that stay idle are simply not in the mesh;
processes that would have none of it end with status 0, and the others start anew as a smaller job.
"""

import json
import math
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from artifacts.directory import RunDirectory
from common.errors import Requeue
from parallel import processes
from parallel.config import MESH_AXES
from parallel.mesh import slice_attribute
from training.autoscale.policy import ELASTIC, Asked, MeshDecision, TooFew, decide
from training.config import Config, inner_steps
from training.legal.nearest import legal

DEPTH = "CAMBRIAN_QUEUE_DEPTH"
# What was decided before idle processes left, with the run that it is for: the queue may be another by now.
DECIDED = "CAMBRIAN_DECIDED"
SQUEUE_SECONDS = 30


@dataclass(frozen=True)
class Scaled:
    """A config with the mesh and accumulation of this start; without autoscale there is no `decision`."""

    config: Config
    decision: MeshDecision | None = None

    def devices(self) -> list[Any] | None:
        """Those in the mesh; None for all."""
        if self.decision is None:
            return None
        here = jax.devices()
        if self.decision.used == len(here):
            return here
        held = by_process([device.process_index for device in here], self.decision.used)
        taken: list[Any] = []
        for process in range(len(held)):
            taken += [d for d in here if d.process_index == process][: held[process]]
        return taken

    def rows(self) -> list[tuple[str, str, str]]:
        """What the start-up table says of it."""
        if self.decision is None:
            return []
        assert self.config.autoscale is not None  # nothing is decided without it
        policy = self.config.autoscale.policy
        return [("autoscale", "; ".join(self.decision.lines), f"autoscale.policy={policy}")]

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps of it, at every start."""
        return {} if self.decision is None else {"autoscale": asdict(self.decision)}


def scale(config: Config, run: RunDirectory) -> Scaled:
    """The config for the devices at hand; without `autoscale` it is the one that was asked for.

    Raises ValueError where no mesh is legal, Requeue where there are too few devices: there may be more
    later. Where whole processes stay idle this does not return: see `processes.restart_as`.
    """
    if config.autoscale is None:
        return Scaled(config)
    devices = jax.devices()

    def settle() -> dict[str, Any]:
        before = json.loads(os.environ.get(DECIDED, "{}"))
        if before.get("run") == str(run.path):
            return before["decision"]
        try:
            each = slice_size(devices) if crossed(config.mesh) else None
            return asdict(settled(config, len(devices), run.last_mesh, each=each))
        except TooFew as error:
            return {"too_few": str(error)}

    found = processes.from_primary("the mesh for these devices", settle)
    if "too_few" in found:
        raise Requeue(found["too_few"])
    decision = MeshDecision(**{**found, "lines": tuple(found["lines"])})
    needed = len(by_process([device.process_index for device in devices], decision.used))
    if needed < processes.process_count():
        processes.restart_as(needed, {DECIDED: json.dumps({"run": str(run.path), "decision": found})})
    return Scaled(applied(config, decision), decision)


def settled(
    config: Config,
    available: int,
    last: dict[str, int] | None,
    pending: int | None = None,
    each: int | None = None,
) -> MeshDecision:
    """What a start of `config` that finds `available` devices does.

    last: the mesh of the run's last start; pending: instead of what `autoscale.queue` says; each: devices of
    a slice, where mesh.dcn counts slices, by default as at the last start. Raises what `decide` raises, and
    ValueError where the queue's depth cannot be read.
    """
    policy = config.autoscale
    assert policy is not None  # nothing is decided without it
    if policy.policy == "queue" and pending is None:
        pending = queue_depth(policy.queue)
    used = None if last is None else math.prod(last.values())
    asked = asked_by(config, each or last_slice(config.mesh, last))
    return decide(asked, available, rules_of(config), pending=pending, last=used)


def nodes_wanted(
    config: Config,
    per_node: int,
    last: dict[str, int] | None = None,
    pending: int | None = None,
) -> tuple[int, MeshDecision]:
    """Nodes of `per_node` devices to ask a scheduler for, and the mesh that the policy would make of them.

    Raises what `settled` raises, and ValueError where nothing says how many devices the full size has.
    """
    most = asked_by(config, last_slice(config.mesh, last)).most
    if most is None:
        raise ValueError(
            "autoscale.max_devices=null, and a mesh that takes what is left does not say how many devices "
            "the run wants; give autoscale.max_devices, or a size to every mesh axis"
        )
    decision = settled(config, most, last, pending)
    return -(-decision.used // per_node), decision


def asked_by(config: Config, each: int | None = None) -> Asked:
    """What `decide` needs of a config; `each`: devices of a slice, where mesh.dcn counts slices."""
    assert config.autoscale is not None  # nothing is decided without it
    mesh, inner = config.mesh, inner_steps(config.local_sgd)
    fixed = {"replica": f"local_sgd.inner_steps={inner} steps them alone"} if inner > 1 else {}
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    steps: dict[str, int] = {}
    if crossed(mesh):
        sizes, steps = in_slices(mesh, each)
        fixed |= {axis: "it lies inside a slice" for axis in ELASTIC if axis not in steps}
    staged = mesh.pipeline > 1
    return Asked(
        sizes=sizes,
        batch_axes=tuple(mesh.rules.get("batch", ())),
        rows=config.training.global_batch_size,
        turns=config.pipeline.microbatches if staged else config.training.accumulation_steps,
        turns_key="pipeline.microbatches" if staged else "training.accumulation_steps",
        policy=config.autoscale,
        fixed=fixed,
        steps=steps,
    )


def crossed(mesh: Any) -> dict[str, int]:
    """Slices that axes cross, by axis."""
    return {axis: factor for axis, factor in mesh.dcn.items() if factor > 1}


def in_slices(mesh: Any, each: int | None) -> tuple[dict[str, int], dict[str, int]]:
    """(sizes with none of them -1, the size in one slice of the axis that crosses them): slices are whole.

    each: devices of a slice. ValueError where the mesh is not one of whole slices along one elastic axis.
    """
    sizes, factors = {axis: getattr(mesh, axis) for axis in MESH_AXES}, crossed(mesh)
    named = ", ".join(f"mesh.dcn.{axis}={factor}" for axis, factor in factors.items())
    if len(factors) > 1 or not {*factors} <= {"replica", "data"}:
        raise ValueError(f"{named}: autoscale counts slices along one of mesh.replica and mesh.data")
    if each is None:
        raise ValueError(f"{named}: how many devices a slice has shows at a first start; start the run once")
    ((axis, factor),) = factors.items()
    step = sizes[axis] // factor
    rest = math.prod(n for a, n in sizes.items() if a != axis and n != -1)
    inside = {a: each // (step * rest) if n == -1 else n for a, n in sizes.items() if a != axis}
    if step < 1 or step * math.prod(inside.values()) != each:
        raise ValueError(
            f"{named} with mesh.{axis}={sizes[axis]}: under autoscale a slice is used whole, and {each} "
            f"devices are not mesh.{axis}={max(step, 1)} times the other axes; give sizes whose product is "
            f"{each}"
        )
    return {a: sizes[axis] if a == axis else inside[a] for a in MESH_AXES}, {axis: step}


def last_slice(mesh: Any, last: dict[str, int] | None) -> int | None:
    """Devices of a slice at the last start, of which `last` was the mesh."""
    if last is None or not crossed(mesh):
        return None
    axis, factor = next(iter(crossed(mesh).items()))
    return math.prod(last.values()) // last[axis] * max(1, getattr(mesh, axis) // factor)


def slice_size(devices: list[Any]) -> int:
    """Devices of each slice here. ValueError where they have different numbers."""
    attribute = slice_attribute(devices)
    counts = sorted({*Counter(getattr(device, attribute) for device in devices).values()})
    if len(counts) > 1:
        said = " and ".join(map(str, counts))
        raise ValueError(f"slices of {said} devices: autoscale needs whole ones; leave the broken one out")
    return counts[0]


def rules_of(config: Config) -> Callable[..., str | None]:
    """`legal` of this config with another mesh and other turns."""

    def ask(sizes: Any, turns: int) -> str | None:
        key = "pipeline.microbatches" if sizes["pipeline"] > 1 else "training.accumulation_steps"
        return legal(with_mesh(config, sizes, turns, key), math.prod(sizes.values()))

    return ask


def applied(config: Config, decision: MeshDecision) -> Config:
    """The config with what was decided."""
    return with_mesh(config, decision.sizes, decision.turns, decision.turns_key)


def with_mesh(config: Config, sizes: Mapping[str, Any], turns: int, turns_key: str) -> Config:
    """The config with these sizes, and so many turns under their key."""
    room, _, key = turns_key.partition(".")
    changed = replace(getattr(config, room), **{key: turns})
    mesh = config.mesh
    slices = {axis: sizes[axis] // (getattr(mesh, axis) // n) for axis, n in crossed(mesh).items()}
    dcn = {axis: n for axis, n in slices.items() if n > 1} if slices else mesh.dcn
    return replace(config, mesh=replace(mesh, **sizes, dcn=dcn), **{room: changed})


def by_process(here: list[int], used: int) -> list[int]:
    """Devices that each of the first processes puts into a mesh of `used`: as few processes as hold them.

    here: each device's process. Equal numbers where the devices divide, else the last has what is left.
    """
    counts = [here.count(process) for process in range(max(here) + 1)]
    needed = next(n for n in range(1, len(counts) + 1) if sum(counts[:n]) >= used)
    each, left = divmod(used, needed)
    if not left and min(counts[:needed]) >= each:
        return [each] * needed
    held: list[int] = []
    for count in counts[:needed]:
        held.append(min(count, used - sum(held)))
    return held


def queue_depth(source: str) -> int:
    """Jobs that wait. ValueError where the source does not say a whole number of 0 or more."""
    if source == "env":
        return _count(os.environ.get(DEPTH), f"{DEPTH} (autoscale.queue=env)")
    if source == "squeue":
        return _squeue()
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(
            f"autoscale.queue={source} cannot be read ({reason}); use env, squeue or the path of a file "
            "that holds the number of waiting jobs"
        ) from error
    return _count(text, f"the file autoscale.queue={source}")


def _count(text: str | None, where: str) -> int:
    if text is None:
        raise ValueError(f"{where} is not set; set it to the number of waiting jobs, or use autoscale=nodes")
    if not text.strip().isdecimal():
        raise ValueError(
            f"{where} holds {text.strip()[:40]!r}, which is no number of waiting jobs; write 0 or more"
        )
    return int(text)


def _squeue() -> int:
    """Pending jobs of this job's partition, or of all: each task of an array, but not this job itself."""
    program = shutil.which("squeue")
    if program is None:
        raise ValueError("autoscale.queue=squeue, but there is no squeue here; use env or the path of a file")
    command = [program, "--noheader", "--array", "--states=PENDING", "--format=%A"]
    if partition := os.environ.get("SLURM_JOB_PARTITION"):
        command.append(f"--partition={partition}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"squeue did not answer within {SQUEUE_SECONDS} s; try again") from error
    if done.returncode:
        reason = " ".join(done.stderr.split())[:200]
        raise ValueError(f"squeue failed ({reason}); mend it, or use another autoscale.queue")
    own = os.environ.get("SLURM_JOB_ID")
    return sum(line.strip() != own for line in done.stdout.splitlines() if line.strip())
