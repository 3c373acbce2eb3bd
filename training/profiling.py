"""A trace of a few steps, for XProf and TensorBoard, and one page of text about what takes the time.

Operations are named by the parts of the model that they come from (`jax.named_scope`): embed, layer_P (P the
place in its period), attention, mlp, head, optimizer.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

PARTS = re.compile(r"\b(?:embed|layer_\d+|attention|mlp|head|optimizer)\b")
CONTROL = ("while", "conditional", "call")  # what runs inside of them has events of its own
OPERATIONS = 25  # lines of the page


@dataclass(frozen=True)
class Operation:
    """An operation of the compiled step: its scope in the program, and its kind in HLO."""

    scope: str
    kind: str

    @property
    def part(self) -> str:
        """Such as `layer_0/attention, backward`; `other` where no part of the model is named."""
        names = list(dict.fromkeys(PARTS.findall(self.scope)))
        if not names:
            return "other"
        again = "rematted" in self.scope
        way = ", again" if again else ", backward" if "transpose(" in self.scope else ""
        return "/".join(names) + way


class Profile:
    """The trace of steps `steps` (1-based) into a directory; no steps, no trace."""

    def __init__(self, directory: Path, steps: range):
        self.directory, self.steps = directory, steps
        self._running = False

    def begins(self, step: int) -> bool:
        """Whether the trace starts before this step."""
        return bool(self.steps) and step == self.steps[0]

    def ends(self, step: int) -> bool:
        """Whether the trace stops after this step."""
        return bool(self.steps) and step == self.steps[-1]

    def start(self) -> None:
        """Begin to record; the steps before have ended."""
        self.directory.mkdir(parents=True, exist_ok=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would be an event, and slow what is measured
        jax.profiler.start_trace(str(self.directory), profiler_options=options)
        self._running = True

    def stop(self, hlo: str) -> Path:
        """Write the trace and the page, whose path is returned; hlo: the compiled step's text."""
        before = set(self.directory.rglob("*.trace.json.gz"))
        self.close()
        (trace,) = set(self.directory.rglob("*.trace.json.gz")) - before
        page = self.directory / "summary.txt"
        events = device_events(trace, module_name(hlo))
        page.write_text(summary_page(events, operations(hlo), self.steps), encoding="utf-8")
        return page

    def close(self) -> None:
        """Stop recording, if it goes on; for a run that ends within the traced steps."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def plan(asked: Iterable[int], first: int, last: int) -> tuple[range, str | None]:
    """Which of the steps [begin, end) come after `first` and up to `last`; a line where that is not all."""
    begin, end = asked
    left = range(max(begin, first + 1), min(end, last + 1))
    if left == range(begin, end):
        return left, None
    what = f"profile: of logging.profile_steps=[{begin}, {end}) this start makes"
    makes = f"steps {left[0]} to {left[-1]}" if left else "none"
    return left, f"{what} {makes}: it goes from step {first + 1} to {last}"


def device_events(trace: Path, module: str) -> list[tuple[str, float]]:
    """(operation, seconds) of what ran on devices for one compiled program, from a `.trace.json.gz`.

    Not from the `.xplane.pb` beside it: jaxlib 0.12 crashes while `ProfileData` reads its statistics.
    """
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    lines = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] == "thread_name"
    }
    found = []
    for event in events:
        if event.get("ph") == "X":
            name = event_operation(lines.get((event["pid"], event["tid"]), ""), event, module)
            if name is not None:
                found.append((name, event["dur"] / 1e6))
    return found


def event_operation(line: str, event: Mapping[str, Any], module: str) -> str | None:
    """The operation of an event: CPUs and GPUs say it beside its name, TPUs by the name itself."""
    beside = event.get("args", {})
    if "hlo_op" in beside:
        return str(beside["hlo_op"]) if beside.get("hlo_module", module) == module else None
    return event["name"].split(" ")[0].lstrip("%") if line == "XLA Ops" else None


def module_name(hlo: str) -> str:
    """What a compiled program is called, such as jit_train_step."""
    return hlo.removeprefix("HloModule ").split(",")[0].split(" ")[0]


_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = .*?[\])}] (?P<kind>[\w-]+)\(")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.-]+)")


def operations(hlo: str) -> dict[str, Operation]:
    """Every instruction of a compiled program by name; a fusion without a scope has that of its root."""
    found: dict[str, Operation] = {}
    calls: dict[str, str] = {}
    roots: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            computation = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
        elif instruction := _INSTRUCTION.match(line):
            name, named, called = instruction["name"], _SCOPE.search(line), _CALLS.search(line)
            found[name] = Operation(named[1] if named else "", instruction["kind"])
            if called:
                calls[name] = called[1]
            if named and (instruction["root"] or computation not in roots):
                roots[computation] = named[1]
    for name, computation in calls.items():
        if not found[name].scope:
            found[name] = Operation(roots.get(computation, ""), found[name].kind)
    return found


def summary_page(events: Iterable[tuple[str, float]], known: Mapping[str, Operation], steps: range) -> str:
    """One page: what share of the time each part of the model has, then the longest operations."""
    seconds: dict[str, float] = defaultdict(float)
    parts: dict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for name, duration in events:
        if name in known and known[name].kind not in CONTROL:
            seconds[name] += duration
            parts[known[name].part] += duration
            count[name] += 1
    what = f"Steps {steps[0]} to {steps[-1]}"
    if not (total := sum(seconds.values())):
        return f"{what}: the trace holds no operation of the compiled step.\n"

    def row(spent: float) -> str:
        return f"{100 * spent / total:6.1f}% {1e3 * spent / len(steps):10.3f}"

    lines = [f"{what}: {1e3 * total / len(steps):.2f} ms of operations a step, over all threads and devices."]
    lines += ["", f"{'share':>7} {'ms a step':>10}  part"]
    lines += [f"{row(spent)}  {part}" for part, spent in longest(parts)]
    lines += ["", f"{'share':>7} {'ms a step':>10} {'a step':>7}  operation ({len(seconds)} in all)"]
    for name, spent in longest(seconds)[:OPERATIONS]:
        which = f"{name} ({known[name].part}; {known[name].scope.rsplit('/', 1)[-1]})"
        lines.append(f"{row(spent)} {count[name] / len(steps):7.1f}  {which}")
    return "\n".join(lines) + "\n"


def longest(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """The largest first."""
    return sorted(seconds.items(), key=lambda item: -item[1])
