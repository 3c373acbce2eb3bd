"""A plan on one screen: plain lines, the same on a terminal and in a log."""

from collections.abc import Iterator

from common.text import GIB, MIB, counted, duration, human
from planner.report import Plan
from training.preflight import classes

LABEL = 13  # columns of a row's name
BAR = 24


def screen(plan: Plan) -> str:
    """The whole plan."""
    return "\n".join(
        line
        for part in (heading, memory_lines, work_lines, traffic_lines, time_lines, budget_lines)
        for line in part(plan)
    )


def heading(plan: Plan) -> Iterator[str]:
    """What was planned, and how much of it the compiler has seen."""
    axes = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    yield _row(
        "plan", f"{plan.name}, {human(plan.parameters)} parameters, {plan.optimizer}, {plan.precision}"
    )
    hosts = counted(plan.nodes, "host")
    yield _row(
        "devices",
        f"{plan.devices:,} x {plan.hardware}, {hosts}, topology {plan.topology}; mesh {axes}",
    )
    yield _row("batch", f"{plan.rows:,} x {plan.seq_len:,} = {plan.rows * plan.seq_len:,} tokens a step")
    if plan.compile_seconds is not None:
        how = (
            f"the step of train.py, compiled in {plan.compile_seconds:.1f} s by {plan.compiler}; nothing ran"
        )
    else:
        how = "computed by the analytic model (docs/planner-model.md); nothing was compiled"
    yield _row("how", how)
    for note in plan.notes:
        yield _row("note", note)


def memory_lines(plan: Plan) -> Iterator[str]:
    """Bytes by class against what a device has."""
    memory = plan.work.memory
    for name, size in classes(memory):
        bar = "#" * round(BAR * min(1.0, size / plan.capacity))
        yield _row("memory" if name == "parameters" else "", f"{name:12}{size / GIB:>9.2f} GiB  {bar}")
    share = 100 * memory.total / plan.capacity
    left = (plan.capacity - memory.total) / GIB
    verdict = f"fits, {left:.1f} GiB left" if plan.fits else f"DOES NOT FIT, {-left:.1f} GiB too much"
    if plan.refused is not None:
        verdict = "DOES NOT FIT, by the compiler"
    total = (
        f"{'total':12}{memory.total / GIB:>9.2f} GiB  {share:.0f} % of {plan.capacity / GIB:.1f}: {verdict}"
    )
    yield _row("", total)
    if plan.beside is not None:
        ratio = plan.beside.memory.total / memory.total
        yield _row("", f"{'analytic':12}{plan.beside.memory.total / GIB:>9.2f} GiB  {ratio:.2f} of it")


def work_lines(plan: Plan) -> Iterator[str]:
    """FLOPs, and the kernels that do them."""
    tokens = plan.rows * plan.seq_len
    full = plan.model_flops_per_token["full"] * tokens / plan.devices
    causal = plan.model_flops_per_token["causal"] * tokens / plan.devices
    parts = ", ".join(f"{kind} {count:.3e}" for kind, count in plan.work.flops.items())
    yield _row("FLOPs", f"a device and step: the model needs {causal:.3e} causal, {full:.3e} full attention")
    yield _row("", f"executed {parts}: {sum(plan.work.flops.values()) / causal:.2f} of the causal ones")
    yield _row("attention", f"{plan.attention} ({plan.attention_why})")
    if plan.work.kernels:
        kernels = (f"{name} {count:,}" for name, count in plan.work.kernels.items())
        yield _row("kernels", ", ".join(kernels))


def traffic_lines(plan: Plan) -> Iterator[str]:
    """Collectives, largest first."""
    costs = sorted(plan.prediction.costs, key=lambda cost: (-cost.seconds, -cost.traffic.bytes))
    costs = [cost for cost in costs if cost.traffic.bytes >= MIB] or costs[:1]
    if not costs:
        yield _row("collectives", "none")
    for place, cost in enumerate(costs):
        traffic = cost.traffic
        what = (
            f"{traffic.kind:18} {'+'.join(traffic.axes):22} {traffic.times:>6,} x  {_size(traffic.bytes):>9}"
        )
        when = "hidden" if cost.hidden else "exposed"
        yield _row("" if place else "collectives", f"{what}  {cost.seconds:>8.3f} s on {cost.link}, {when}")


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def time_lines(plan: Plan) -> Iterator[str]:
    """The roofline, and what was assumed."""
    p = plan.prediction
    bubble = f", {100 * p.bubble:.0f} % of it a bubble" if p.bubble else ""
    moved = f"{p.memory_seconds:.3f} s" if p.memory_seconds else "not counted"
    yield _row("time", f"compute {p.compute_seconds:.3f} s, memory {moved}{bubble}")
    yield _row("", f"network {p.hidden_seconds:.3f} s beside it (assumed), {p.exposed_seconds:.3f} s on top")
    yield _row(
        "step",
        f"{p.step_seconds:.3f} s predicted, mostly {p.bound}; {human(p.tokens_per_second)} tokens/s, "
        f"MFU {100 * p.mfu_causal:.1f} % causal, {100 * p.mfu_full:.1f} % full attention",
    )


def budget_lines(plan: Plan) -> Iterator[str]:
    """The whole run."""
    money = "" if plan.money is None else f", {plan.money:,.0f} at {plan.price:g} an hour"
    yield _row(
        "run",
        f"{human(plan.budget_tokens)} tokens, {plan.steps:,} steps: {duration(plan.run_seconds)}, "
        f"{plan.device_hours:,.0f} device-hours{money}",
    )


def _row(name: str, text: str) -> str:
    return f"{name:{LABEL}} {text}".rstrip()
