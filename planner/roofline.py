"""From a step's work to its time: the roofline of compute, memory and every level of the network.

    T_compute = Σ_p flops_p / (reached · peak_p)                  products, in the precision they run in
    T_memory  = moved bytes / bandwidth
    T_device  = max(T_compute, T_memory) / (1 − bubble)
    T_step    = max(T_device, T_hidden) + T_exposed

(Williams et al. 2009, doi:10.1145/1498765.1498785; the network's part as in Austin et al., "How to Scale Your
Model", 2025). Collectives of `replica`, `data` and `fsdp` alone carry parameters and gradients, which a
scheduler can move beside other layers' work: they are taken as hidden. All others stand between a layer's own
operations (`tensor`, `context`, `expert`, `pipeline`): they are taken as exposed. Both are assumptions, and
both sums are reported.

A group of n devices of which m are within one level moves S bytes so (b_i, a_i: bandwidth and latency of a
level):

    all-gather, reduce-scatter   max(S (m−1)/m / b_0, S (1 − m/n) / (m b_1)) + (m−1) a_0 + (n/m − 1) a_1
    all-reduce                   twice that
    all-to-all                   max(S (m−1)/n / b_0, S (n−m)/n / b_1) + the same latencies
    collective-permute           S / b + a of the farthest level

where the second level is entered by all m devices at once, each with a link of its own (Thakur et al. 2005,
doi:10.1177/1094342005051521, for the rings). On a torus b_0 is that of a ring's both directions, times the
dims that the group spans; an all-to-all takes a quarter of its operand times the members along one dim over
one ring, all dims at once (Austin et al., section 3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from parallel.hardware import Link, Machine, strides
from planner.work import Axes, StepCost, Traffic

HIDDEN = frozenset({"replica", "data", "fsdp"})


@dataclass(frozen=True)
class Cost:
    """Collectives of one kind and axes: their seconds in a step, and the slowest link that they cross."""

    traffic: Traffic
    link: str
    seconds: float
    hidden: bool


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step and what follows from them; nothing here was measured.

    links: of all collectives by the slowest link that they cross. mfu: of the model's FLOPs, full attention,
    as `training.flops` has it, against the datasheet's bfloat16 peak.
    """

    compute_seconds: float
    memory_seconds: float
    bubble: float
    hidden_seconds: float
    exposed_seconds: float
    step_seconds: float
    links: Mapping[str, float]
    costs: tuple[Cost, ...]
    tokens_per_second: float
    mfu_full: float
    mfu_causal: float
    bound: str  # what the step's time is mostly: compute, memory, or a link's name


def predict(
    work: StepCost,
    machine: Machine,
    mesh: Mapping[str, int],
    *,
    tokens: int,
    flops_full: float,
    flops_causal: float,
) -> Prediction:
    """Of one step.

    mesh: axes and sizes in order. tokens: of a step on all devices. flops_full, flops_causal: that the model
    needs a token, forward and backward.
    """
    costs = tuple(cost_of(t, machine, mesh) for t in work.traffic)
    compute = sum(count / (machine.reached * machine.flops[kind]) for kind, count in work.flops.items())
    memory = work.moved_bytes / machine.bandwidth
    device = max(compute, memory) / (1 - work.bubble)
    hidden = sum(cost.seconds for cost in costs if cost.hidden)
    exposed = sum(cost.seconds for cost in costs if not cost.hidden)
    step = max(device, hidden) + exposed
    links: dict[str, float] = {link.name: 0.0 for link in machine.links}
    for cost in costs:
        links[cost.link] = links.get(cost.link, 0.0) + cost.seconds
    rate, peak = tokens / step, machine.flops["bfloat16"] * machine.devices
    shares = {"compute": compute, "memory": memory, **links}
    return Prediction(
        compute_seconds=compute,
        memory_seconds=memory,
        bubble=work.bubble,
        hidden_seconds=hidden,
        exposed_seconds=exposed,
        step_seconds=step,
        links=links,
        costs=costs,
        tokens_per_second=rate,
        mfu_full=rate * flops_full / peak,
        mfu_causal=rate * flops_causal / peak,
        bound=max(shares, key=lambda name: shares[name]),
    )


def cost_of(traffic: Traffic, machine: Machine, mesh: Mapping[str, int]) -> Cost:
    """Seconds of these collectives, all executions of a step."""
    hidden = set(traffic.axes) <= HIDDEN
    size = math.prod(mesh[axis] for axis in traffic.axes)
    if size == 1 or not machine.links:
        return Cost(traffic, machine.links[0].name if machine.links else "none", 0.0, hidden)
    near, far = machine.links[0], machine.links[-1]
    inside = members_within(traffic.axes, mesh, reach(machine))
    crosses = inside < size
    near_rate, rings = near.bytes_per_second, 1
    if machine.torus:
        rings = max(1, torus_dims(traffic.axes, mesh, machine.torus))
        near_rate *= rings
    once, latency = traffic.bytes, _latency(inside, size, near, far) * traffic.times
    if traffic.kind == "collective-permute":
        link = far if crosses else near
        # To one neighbour a ring of a torus offers one of its two directions.
        rate = link.bytes_per_second / (2 if machine.torus and not crosses else 1)
        return Cost(traffic, link.name, once / rate + traffic.times * link.latency, hidden)
    if traffic.kind in ("all-to-all", "ragged-all-to-all"):
        if machine.torus:
            inner = once * inside ** (1 / rings) / 4 / near.bytes_per_second if inside > 1 else 0.0
        else:
            inner = once * (inside - 1) / size / near_rate
        outer = once * (size - inside) / size / far.bytes_per_second
    else:
        inner = once * (inside - 1) / inside / near_rate
        outer = once * (1 - inside / size) / (inside * far.bytes_per_second)
    seconds = max(inner, outer if crosses else 0.0)
    both_ways = 2 if traffic.kind == "all-reduce" else 1
    slowest = far if crosses and outer >= inner else near
    return Cost(traffic, slowest.name, both_ways * (seconds + latency), hidden)


def _latency(inside: int, size: int, near: Link, far: Link) -> float:
    """Of one ring's hops, the near one's and the far one's."""
    return (inside - 1) * near.latency + (-(-size // inside) - 1) * far.latency


def reach(machine: Machine) -> int:
    """Devices that the nearest link joins."""
    if machine.torus:
        return math.prod(machine.torus)
    return machine.links[0].devices or machine.devices


def members_within(axes: Axes, mesh: Mapping[str, int], block: int) -> int:
    """Members of a group along these axes that lie within one block of devices, in the mesh's order."""
    inside = 1
    for (name, size), stride in zip(mesh.items(), strides(list(mesh.values())), strict=True):
        if name in axes:
            inside *= min(size, max(1, block // stride))
    return inside


def torus_dims(axes: Axes, mesh: Mapping[str, int], torus: tuple[int, ...]) -> int:
    """Dims of the torus along which a group lies, mesh axes laid out from the last dim on."""
    left, found, dim = list(torus), 0, len(torus) - 1
    for name, size in reversed(list(mesh.items())):
        spans = 0
        while size > 1 and dim >= 0:
            taken = math.gcd(size, left[dim])
            spans += taken > 1
            size //= taken
            left[dim] //= taken
            if left[dim] > 1 and taken == 1:
                break
            dim -= left[dim] == 1
        found += spans if name in axes else 0
    return found
