"""A result as one HTML page: the figures with their errors, a plot of them, and documents to look at."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.figure import hide_frame, literal, new_figure
from common.page import render
from evaluation.metrics import LOWER_IS_BETTER
from evaluation.results import TaskResult, table
from evaluation.score import Scored

SAMPLES = 3  # documents of each task
SHOWN = 700  # characters of a context, from its end
COLOR = "#1f4e8c"
BODY = """
<p class="note">
{% for name, value in about.items() %}{{ name }} {{ value }}{{ "; " if not loop.last }}{% endfor %}
</p>
{{ table(head, rows) }}
{% if versus %}<h2>Against {{ about.versus }}</h2>
{{ table(["task", "metric", "difference", "95 % of resampled documents", "documents"], versus) }}{% endif %}
{{ picture(plot, "each task's metric with its standard error") }}
<h2>Every metric</h2>
{{ table(["task", "metric", "value", "error", "documents"], every) }}
{% for name, documents in samples.items() %}
<h2>{{ name }}</h2>
{% for one in documents %}
<details><summary>document {{ one.doc }}: {{ one.verdict }}</summary><pre>{{ one.context }}</pre>
{{ table(one.head, one.answers) }}</details>
{% endfor %}{% endfor %}
"""


def page(
    about: Mapping[str, Any], results: Sequence[TaskResult], versus: Sequence[Sequence[str]] = ()
) -> str:
    """The page of a suite's results. about: what they are of, by name; versus: rows of `results.compared`."""
    head, rows = table(results)
    every = [
        [result.task.name, name, f"{one.value:.5g}", f"{one.error or 0:.2g}", one.documents]
        for result in results
        for name, one in result.figures.items()
    ]
    samples = {result.task.name: [_sample(x) for x in result.scored[:SAMPLES]] for result in results}
    shown = {"head": head, "rows": rows, "every": every, "samples": samples, "plot": _plot(results)}
    return render(f"{about['model']}: {about['suite']}", BODY, about=about, versus=versus, **shown)


def _plot(results: Sequence[TaskResult]) -> Any:
    lower = [result for result in results if result.task.metric in LOWER_IS_BETTER]
    higher = [result for result in results if result not in lower]
    groups = [(name, group) for name, group in (("higher", higher), ("lower", lower)) if group]
    heights = [len(group) for _, group in groups]
    figure = new_figure(8.5, 1.2 + 0.34 * sum(heights) + 0.5 * len(groups))
    rows = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
    style: dict[str, Any] = {"fmt": "o", "color": COLOR, "markersize": 4.5, "capsize": 3}
    for (name, group), axes in zip(groups, rows[:, 0], strict=True):
        found = [result.figures[result.task.metric] for result in group]
        axes.errorbar(
            [x.value for x in found], range(len(group)), xerr=[x.error or 0 for x in found], **style
        )
        labels = [literal(f"{result.task.name}  {result.task.metric}") for result in group]
        axes.set_yticks(range(len(group)), labels, fontsize=8)
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.set_xlabel(f"{name} is better; bars are one standard error", fontsize=8)
        axes.grid(True, axis="x", color="#e5e7eb", linewidth=0.7)
        hide_frame(axes)
    return figure


def _sample(scored: Scored) -> dict[str, Any]:
    request = scored.request
    shown: dict[str, Any] = {"doc": request.doc, "context": request.contexts[0][-SHOWN:]}
    if request.kind == "generate":
        answers = [[answer] for answer in request.answers]
        return shown | {"verdict": scored.text[:SHOWN], "head": ["answers"], "answers": answers}
    if request.kind == "program":
        right = sum(one.status == "passed" for one in scored.samples)
        answers = [[one.status, one.text[:SHOWN]] for one in scored.samples]
        verdict = f"{right} of {len(answers)} pass"
        return shown | {"verdict": verdict, "head": ["tests", "program"], "answers": answers}
    gold, best = scored.logprobs[request.gold], max(scored.logprobs)
    verdict = f"{gold:.2f} nats"
    if request.kind == "choice":
        verdict += ", the likeliest" if best == gold else f", behind {best:.2f}"
    marks = ["right" if i == request.gold else "" for i in range(len(scored.logprobs))]
    parts = zip(request.continuations, marks, scored.logprobs, scored.tokens, strict=True)
    answers = [[text[:SHOWN], mark, f"{nats:.3f}", str(count)] for text, mark, nats, count in parts]
    return shown | {"verdict": verdict, "head": ["continuation", "", "nats", "tokens"], "answers": answers}
