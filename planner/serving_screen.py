"""An engine's plan on one screen, in the rows of `planner.screen`."""

from collections.abc import Iterator

from common.text import GIB, aligned, human
from planner.screen import BAR, LABEL
from planner.serving import ServingPlan

HOW = {
    "compiled": "the engine's decode and prefill, compiled in {seconds:.1f} s by {compiler}; nothing ran",
    "here": "the engine's decode and prefill, compiled in {seconds:.1f} s for this machine's CPU instead",
    "computed": "computed: bytes that must be read, products that must be made; nothing was compiled",
}


def serving_screen(plan: ServingPlan) -> str:
    """The whole plan."""
    parts = (heading, memory_rows, time_rows, promise_rows)
    return "\n".join(f"{name:{LABEL}} {text}".rstrip() for part in parts for name, text in part(plan))


def heading(plan: ServingPlan) -> Iterator[tuple[str, str]]:
    """What was planned, and how much of it a compiler has seen."""
    q = plan.question
    yield "plan", f"{plan.name}, {human(plan.parameters)} parameters, served in {plan.dtype}"
    yield "device", f"1 x {plan.hardware}, an engine's own; more devices are more engines"
    yield "texts", f"up to {q.max_len:,} tokens, pages of {q.page}, chunks of {q.chunk}"
    yield "how", HOW[plan.how].format(seconds=plan.compile_seconds or 0.0, compiler=plan.compiler)
    for note in plan.notes:
        yield "note", note


def memory_rows(plan: ServingPlan) -> Iterator[tuple[str, str]]:
    """Bytes by class against what a device has, and the slots that they leave room for."""
    guess = "" if plan.how == "compiled" else " (a guess)"
    cache = plan.slots * plan.cache_slot
    rows = {"weights": plan.weights, "cache": cache, "slots": plan.state - cache, "temporaries": plan.beside}
    for place, (name, size) in enumerate(rows.items()):
        bar = "#" * round(BAR * min(1.0, size / plan.capacity)) + (guess if name == "temporaries" else "")
        yield "" if place else "memory", f"{name:12}{size / GIB:>9.2f} GiB  {bar}"
    verdict = f"DOES NOT FIT, {plan.missing:,} bytes too much" if plan.missing else "fits"
    share = 100 * plan.total / plan.capacity
    yield (
        "",
        f"{'total':12}{plan.total / GIB:>9.2f} GiB  {share:.0f} % of {plan.capacity / GIB:.1f}: {verdict}",
    )
    yield "", f"{'at start':12}{plan.start / GIB:>9.2f} GiB  float32 masters and weights, before any cache"
    bits = ", int8 levels and scales" if plan.question.cache_bits else ""
    yield "cache", f"{plan.cache_token:,} bytes a token, {plan.cache_slot:,} a slot{bits}"
    about = "about " if plan.question.slots else ""
    yield "slots", f"{about}{plan.fit:,} fit; planned are {plan.slots:,}"


def time_rows(plan: ServingPlan) -> Iterator[tuple[str, str]]:
    """Of a token, a chunk and a prompt."""
    q = plan.question
    table = [
        (f"{t.slots:,} slots", f"{1e3 * t.seconds:.3g} ms", f"{human(t.tokens_per_second)} tokens/s", t.bound)
        for t in plan.decode
    ]
    for place, line in enumerate(aligned(table, {0, 1, 2})):
        yield "" if place else "decode", f"{line}, texts of {q.context:,} tokens"
    chunk = f"{1e3 * plan.chunk_seconds:.3g} ms a chunk behind {q.prompt:,} tokens"
    yield "prefill", f"{chunk}; {plan.chunks:,} chunks"
    yield "gap", f"{1e3 * plan.gap:.3g} ms at most between two tokens: a decode and a chunk"
    busy = f"{1e3 * plan.first_busy:.4g} ms with every other slot writing"
    yield "first token", f"{1e3 * plan.first:.4g} ms alone, {busy}; no wait for a slot is in it"
    yield "assumed", "the datasheet's whole bandwidth and `reached` of its peak: real steps take longer"


def promise_rows(plan: ServingPlan) -> Iterator[tuple[str, str]]:
    """Whether what was asked for holds."""
    for key, (limit, seconds, holds) in plan.promises.items():
        yield key, f"{limit:g} s {'holds' if holds else 'DOES NOT HOLD'}: {seconds:.4g} s predicted"
