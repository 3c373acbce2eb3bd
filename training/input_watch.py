"""What to do where steps wait for data: the stage that takes the time, and a remedy."""

from collections import deque
from collections.abc import Mapping

from data.config import DataConfig

LIMIT = 0.02  # share of step time spent waiting that is worth a line
FIRST = 5  # steps of a start that tell nothing: nothing had been made ahead
WINDOW = 50  # steps looked at together
QUIET = 1000  # steps from one line to the next
KEEPS_UP = 0.9  # of the step time: where making batches takes less, waits come in bursts


class InputWatch:
    """Looks at every step's wait and at the seconds that its batch took, by stage
    (`data.loading.input_timing`).
    """

    def __init__(self, data: DataConfig):
        self.data = data
        self._steps = 0
        self._said: int | None = None
        self._window: deque[tuple[float, float, Mapping[str, float]]] = deque(maxlen=WINDOW)
        self._seconds = self._waited = 0.0
        self._stages: dict[str, float] = {}

    def seen(self, step: int, seconds: float, wait: float, stages: Mapping[str, float]) -> str | None:
        """Take in a step; return the line to say, if it is time for one."""
        self._steps += 1
        if self._steps <= FIRST:
            return None
        self._window.append((seconds, wait, stages))
        self._seconds, self._waited = self._seconds + seconds, self._waited + wait
        _add(self._stages, stages)
        if len(self._window) < WINDOW or (self._said is not None and step < self._said + QUIET):
            return None
        total, waited = sum(s for s, _, _ in self._window), sum(w for _, w, _ in self._window)
        if waited <= LIMIT * total:
            return None
        self._said = step
        summed: dict[str, float] = {}
        for _, _, one in self._window:
            _add(summed, one)
        share = f"{100 * waited / total:.1f} % of the last {WINDOW} steps"
        return f"input: {share} went to waiting for data; {self._reason(summed, total)}"

    def bottleneck(self) -> str | None:
        """Stage and remedy over the whole start, for the summary; None where waiting is not worth a line."""
        if self._waited <= LIMIT * self._seconds:
            return None
        return self._reason(self._stages, self._seconds)

    def _reason(self, stages: Mapping[str, float], seconds: float) -> str:
        making = sum(stages.values())
        if not making:
            return "the batches were not timed"
        stage = max(stages, key=lambda name: stages[name])
        line = f"{stage} takes {100 * stages[stage] / making:.0f} % of making a batch"
        if making < KEEPS_UP * seconds:  # fast enough on average: a longer queue rides out the slow ones
            return f"{line}, in bursts; use data.prefetch={2 * self.data.prefetch}"
        return f"{line}; {self._remedy(stage)}"

    def _remedy(self, stage: str) -> str:
        streaming = self.data.mode == "streaming"
        return {
            "plan": "use data.packing=concat, whose plans are made fastest, or a larger corpus",
            "read": "use data.mode=cached, or put the corpus on a faster disk"
            if streaming
            else f"put data.cache_dir={self.data.cache_dir} on a faster disk, or leave memory for its pages",
            "tokenize": "use data.mode=cached, which tokenizes once and not in every epoch",
            "fill": "leave a core to the input thread, or give each process fewer rows (more processes)",
            "place": "the copy to the devices is the limit: give each process fewer rows (more processes)",
        }[stage]


def _add(total: dict[str, float], one: Mapping[str, float]) -> None:
    for name, seconds in one.items():
        total[name] = total.get(name, 0.0) + seconds
