"""What a load test asks of a server: when, how long the texts are, and what counts as a good answer.

Rates are multiples of the server's saturation, measured at the beginning, so that one preset is a peak for a
laptop and for a GPU alike.
"""

from dataclasses import dataclass, field

from common.checks import choice, require, within

ARRIVALS = ("poisson", "constant", "burst")


@dataclass
class LoadStage:
    """A time with one mean rate; several in a row are a step, a peak or a ladder."""

    seconds: float = 30.0
    load: float = 0.5  # mean rate, in multiples of saturation
    arrivals: str = "poisson"  # poisson | constant | burst: groups at once, at Poisson's times
    burst: int = 10  # requests of a group

    def __post_init__(self) -> None:
        """Each value by itself."""
        choice("stages.arrivals", self.arrivals, ARRIVALS)
        require(self.seconds > 0, "stages.seconds", self.seconds, "above 0")
        require(self.load >= 0, "stages.load", self.load, "0 or more")
        within("stages.burst", self.burst, 1)


@dataclass
class LengthConfig:
    """Tokens of a text: log-normal around a median, cut off at both ends; spread 0 is always the median."""

    median: int = 32
    spread: float = 0.6  # standard deviation of the logarithm
    least: int = 1
    most: int = 128

    def __post_init__(self) -> None:
        """Each value, and the ends against the median."""
        within("least", self.least, 1)
        within("median", self.median, self.least, self.most)
        within("spread", self.spread, 0, 3)


@dataclass
class SharedPrefix:
    """Beginnings that prompts share, as a system prompt is: of so many groups, so many tokens each."""

    groups: int = 0  # 0: nothing is shared
    tokens: int = 64

    def __post_init__(self) -> None:
        """Each value by itself."""
        within("prefix.groups", self.groups, 0)
        within("prefix.tokens", self.tokens, 1)


@dataclass
class LoadProbe:
    """Requests of one token beside the load: what somebody feels who has nothing to do with it."""

    per_second: float = 2.0  # 0: none
    idle: int = 20  # of them before the load, one after the other
    tokens: int = 8  # of their prompts

    def __post_init__(self) -> None:
        """Each value by itself."""
        within("probe.per_second", self.per_second, 0, 100)
        within("probe.idle", self.idle, 1)
        within("probe.tokens", self.tokens, 1)


@dataclass
class ServiceLevel:
    """A good answer, in seconds: until its first token, between tokens on average, and as a whole."""

    first: float = 2.0
    token: float = 0.2
    whole: float = 30.0


@dataclass
class LoadConfig:
    """A load test. Token ids of prompts are drawn from `vocabulary`, which any tokenizer of bytes has."""

    stages: list[LoadStage] = field(default_factory=list)
    trace: str | None = None  # CSV with TIMESTAMP,ContextTokens,GeneratedTokens instead of stages
    trace_load: float = 0.5  # a trace's mean rate, in multiples of saturation: its time is stretched to it
    prompt: LengthConfig = field(default_factory=LengthConfig)
    answer: LengthConfig = field(default_factory=lambda: LengthConfig(median=16, most=64))
    prefix: SharedPrefix = field(default_factory=SharedPrefix)
    probe: LoadProbe = field(default_factory=LoadProbe)
    slo: ServiceLevel = field(default_factory=ServiceLevel)
    saturation: float | None = None  # requests/s; null: measured by `users` who ask without a pause
    users: int = 16
    users_requests: int = 96  # until saturation is known
    duration: float = 1.0  # a factor on all seconds of the stages
    seed: int = 0
    vocabulary: list[int] = field(
        default_factory=lambda: [16, 256]
    )  # the first id and the one behind the last
    request_seconds: float = 120.0  # an answer that takes longer has failed
    most_requests: int = 20_000  # a plan with more is refused
    most_seconds: float = 1200.0

    def __post_init__(self) -> None:
        """Each value, and that there is something to ask."""
        require(bool(self.stages) != bool(self.trace), "stages", len(self.stages), "given, or else a trace")
        least = {"users": 1, "users_requests": 10, "seed": 0, "most_requests": 1}
        for key, limit in least.items():
            within(key, getattr(self, key), limit)
        for key in ("duration", "trace_load", "request_seconds", "most_seconds"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        require(self.saturation is None or self.saturation > 0, "saturation", self.saturation, "above 0")
        ok = len(self.vocabulary) == 2 and 0 <= self.vocabulary[0] < self.vocabulary[1]
        require(ok, "vocabulary", self.vocabulary, "two ids, the first and the one behind the last")
        ok = not self.prefix.groups or self.prefix.tokens < self.prompt.most
        require(ok, "prefix.tokens", self.prefix.tokens, f"below prompt.most={self.prompt.most}")
