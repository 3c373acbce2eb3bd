"""The steps by name and their parameters, with what each value may be; `data.curation.config` reads them.

Nothing heavy is imported here: a typo in a step is answered before anything is read.
"""

import math
import os
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from common.checks import choice, did_you_mean, require, within

# Features of a document that `filter_quality` may bound; `data.steps.quality` computes and explains them.
FEATURES = (
    "words",
    "mean_word_length",
    "symbols_per_word",
    "alphabetic_words",
    "stop_words",
    "unique_words",
    "lines",
    "sentences",
    "bullet_lines",
    "ellipsis_lines",
    "punctuated_lines",
    "short_lines",
    "duplicate_lines",
    "duplicate_line_characters",
    "duplicate_paragraphs",
    "top_bigram",
    "duplicate_5grams",
    "digits",
    "uppercase",
    "braces",
)
PII_KINDS = ("email", "phone", "ip", "card", "iban", "credentials", "secret")
Number = int | float  # a checker at run time takes no int for a float
CODECS = ("zstd", "brotli", "snappy", "none")
UNITS = ("word", "character")

# Feature → (least, most). What the papers filter by document; thresholds on shares are of 1.
PRESETS: dict[str, dict[str, tuple[Number | None, Number | None]]] = {
    "none": {},
    "gopher": {  # Rae et al. 2021, table A1 and appendix A.1.1
        "words": (50, 100_000),
        "mean_word_length": (3, 10),
        "symbols_per_word": (None, 0.1),
        "bullet_lines": (None, 0.9),
        "ellipsis_lines": (None, 0.3),
        "alphabetic_words": (0.8, None),
        "stop_words": (2, None),
        "duplicate_lines": (None, 0.3),
        "duplicate_line_characters": (None, 0.2),
        "duplicate_paragraphs": (None, 0.3),
        "top_bigram": (None, 0.2),
        "duplicate_5grams": (None, 0.15),
    },
    "c4": {  # Raffel et al. 2020, section 2.2; its rule on lines as a share of a document's lines
        "punctuated_lines": (0.5, None),
        "sentences": (3, None),
        "braces": (None, 0),
    },
    "fineweb": {  # Penedo et al. 2024, section 3.6
        "punctuated_lines": (0.12, None),
        "duplicate_line_characters": (None, 0.1),
        "short_lines": (None, 0.67),
    },
}


def _share(key: str, value: Number) -> None:
    require(0.0 < value <= 1.0, key, value, "above 0 and at most 1, as 0.5 is")


def _ordered(low: str, least: Number | None, high: str, most: Number | None) -> None:
    if least is not None and most is not None and least > most:
        raise ValueError(f"{low}={least} is more than {high}={most}; no document could pass")


@dataclass(frozen=True)
class StratifiedSample:
    """Keep a share of the train documents, chosen by content, of every stratum alike."""

    step: ClassVar[str] = "sample"
    fraction: float  # of the train documents that are kept
    seed: int = 0  # another seed chooses others
    by: str | None = None  # a field of the records whose values are strata; path: its first `depth` parts
    depth: int = 1  # by=path: parts of the path that name a stratum

    def __post_init__(self) -> None:
        _share("fraction", self.fraction)
        within("seed", self.seed, 0)
        within("depth", self.depth, 1)


@dataclass(frozen=True)
class DedupExact:
    """Keep the first of documents whose text is the same."""

    step: ClassVar[str] = "dedup_exact"
    normalize: bool = True  # compare NFC with runs of white space as one blank; false: every byte counts


@dataclass(frozen=True)
class DedupMinhash:
    """Keep the first of documents that share most of their shingles."""

    step: ClassVar[str] = "dedup_minhash"
    threshold: float = 0.8  # Jaccard similarity of the sets of shingles from which on two are duplicates
    ngram: int = 5  # units in a shingle
    unit: str = "word"  # word | character: what a shingle is made of; character where words have no blanks
    permutations: int = 256  # hashes of a signature, shared out over bands
    recall: float = 0.99  # of pairs right at the threshold, the share that bands must find
    seed: int = 0  # of the hashes

    def __post_init__(self) -> None:
        _share("threshold", self.threshold)
        within("ngram", self.ngram, 1, 100)
        choice("unit", self.unit, UNITS)
        within("permutations", self.permutations, 16, 4096)
        within("recall", self.recall, 0.5, 0.9999)
        within("seed", self.seed, 0)


@dataclass(frozen=True)
class FilterLength:
    """Drop documents that are too short or too long; a bound of null does not bind."""

    step: ClassVar[str] = "filter_length"
    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None  # runs of what is no white space
    max_words: int | None = None
    min_tokens: int | None = None  # estimated as UTF-8 bytes / 4, since no tokenizer is there yet
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for unit in ("characters", "words", "tokens"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            within(f"min_{unit}", least, 0)
            within(f"max_{unit}", most, 1)
            _ordered(f"min_{unit}", least, f"max_{unit}", most)
        if all(getattr(self, field.name) is None for field in fields(self)):
            raise ValueError("filter_length has no bound; give one, such as min_words: 20")


@dataclass(frozen=True)
class FilterQuality:
    """Drop documents that a feature shows to be no prose: thresholds of a paper, of your own, or both."""

    step: ClassVar[str] = "filter_quality"
    preset: str = "none"  # none | gopher | c4 | fineweb: a paper's thresholds
    min: tuple[tuple[str, float | None], ...] = ()  # feature: least value; null takes a preset's away
    max: tuple[tuple[str, float | None], ...] = ()  # feature: greatest value

    def __post_init__(self) -> None:
        choice("preset", self.preset, tuple(PRESETS))
        for bound in ("min", "max"):
            for name, _ in getattr(self, bound):
                if name not in FEATURES:
                    raise ValueError(f"{bound}.{name} is no feature; {did_you_mean(name, FEATURES)}")
        limits = self.limits()
        if not limits:
            raise ValueError("filter_quality has no threshold; give a preset, or min or max of a feature")
        for name, (least, most) in limits.items():
            _ordered(f"min.{name}", least, f"max.{name}", most)

    def limits(self) -> dict[str, tuple[Number | None, Number | None]]:
        """Return feature → (least, most), the preset's where no own one is given."""
        least, most = dict(self.min), dict(self.max)
        preset = PRESETS[self.preset]
        found = {}
        for name in FEATURES:
            low, high = preset.get(name, (None, None))
            pair = (least.get(name, low), most.get(name, high))
            if pair != (None, None):
                found[name] = pair
        return found


@dataclass(frozen=True)
class FilterLanguage:
    """Keep documents in some languages, as py3langid tells them."""

    step: ClassVar[str] = "filter_language"
    keep: tuple[str, ...]  # ISO 639-1 codes
    min_probability: float = 0.5  # that py3langid must give its answer

    def __post_init__(self) -> None:
        if not self.keep:
            raise ValueError("keep is empty; name a language, such as keep: [en]")
        within("min_probability", self.min_probability, 0.0, 1.0)


@dataclass(frozen=True)
class FilterLearned:
    """Keep what a linear classifier, trained on examples of good and bad documents, scores best."""

    step: ClassVar[str] = "filter_learned"
    good: tuple[str, ...]  # .jsonl(.gz|.zst) files of documents to keep
    bad: tuple[str, ...]  # the same of documents to drop
    keep: float | None = (
        None  # share of the train documents that is kept; its lowest score holds for both splits
    )
    min_score: float | None = None  # instead of `keep`: the least probability of being good
    text_key: str = "text"  # the field of the example files
    features: int = 20_000  # n-grams that chi-squared selects
    inverse_penalty: float = 1.0  # C of the logistic regression
    held_out: float = 0.2  # share of the examples that precision, recall and AUC are measured on
    seed: int = 0  # another seed holds out others

    def __post_init__(self) -> None:
        for name in ("good", "bad"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name a .jsonl file of example documents")
            paths = tuple(os.path.expanduser(path) for path in getattr(self, name))
            object.__setattr__(self, name, paths)
        if (self.keep is None) == (self.min_score is None):
            raise ValueError("give either keep, a share such as 0.5, or min_score, a probability such as 0.5")
        if self.keep is not None:
            _share("keep", self.keep)
        within("min_score", self.min_score, 0.0, 1.0)
        within("features", self.features, 10, 1 << 20)
        within("inverse_penalty", self.inverse_penalty, 1e-6, 1e6)
        within("held_out", self.held_out, 0.05, 0.5)
        within("seed", self.seed, 0)


@dataclass(frozen=True)
class MaskPII:
    """Put a placeholder where a document gives somebody away."""

    step: ClassVar[str] = "mask_pii"
    kinds: tuple[str, ...] = ("email", "phone", "ip", "card", "iban")  # credentials and secret as well

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError(f"kinds is empty; use some of {', '.join(PII_KINDS)}")
        for kind in self.kinds:
            choice("kinds", kind, PII_KINDS)


@dataclass(frozen=True)
class Compress:
    """How ArrayRecord compresses what the steps leave."""

    step: ClassVar[str] = "compress"
    codec: str = "zstd"  # zstd | brotli | snappy | none
    level: int | None = None  # zstd: 1 to 22, 3 if null; brotli: 0 to 11, 6 if null
    group: int = 1  # documents compressed together: smaller files, but one read unpacks them all

    def __post_init__(self) -> None:
        choice("codec", self.codec, CODECS)
        limits = {"zstd": (1, 22), "brotli": (0, 11)}
        if self.codec in limits:
            within("level", self.level, *limits[self.codec])
        elif self.level is not None:
            raise ValueError(f"level={self.level} has no effect on codec={self.codec}; leave it out")
        within("group", self.group, 1, 65_536)


@dataclass(frozen=True)
class Shard:
    """Into how many files the result is divided: a file is full with either bound."""

    step: ClassVar[str] = "shard"
    documents: int | None = None  # documents in a file
    megabytes: float | None = None  # 10^6 bytes of records in a file, before compression

    def __post_init__(self) -> None:
        if self.documents is None and self.megabytes is None:
            raise ValueError("shard has no bound; give documents or megabytes")
        within("documents", self.documents, 1)
        within("megabytes", self.megabytes, 0.001)


Step = (
    StratifiedSample
    | DedupExact
    | DedupMinhash
    | FilterLength
    | FilterQuality
    | FilterLanguage
    | FilterLearned
    | MaskPII
    | Compress
    | Shard
)
STEPS: dict[str, type] = {kind.step: kind for kind in get_args(Step)}


def parse_steps(entries: Iterable[Any]) -> tuple[Step, ...]:
    """Turn `data.steps` into dataclasses, in its order.

    Raises ValueError, one line that names the entry, for an unknown step or parameter and a value of the
    wrong type or out of range.
    """
    steps = tuple(_parse(f"data.steps[{number}]", entry) for number, entry in enumerate(entries))
    for kind in (Compress, Shard):
        if sum(isinstance(step, kind) for step in steps) > 1:
            raise ValueError(f"data.steps has two steps {kind.step}, but is written once; leave one out")
    return steps


def as_dict(step: Step) -> dict[str, Any]:
    """Return a step with all its parameters, json-able: what a digest and a report hold."""
    values = {field.name: getattr(step, field.name) for field in fields(step)}
    named = {name: dict(value) for name, value in values.items() if _is_mapping(step, name)}
    return {"step": step.step, **values, **named}


def _is_mapping(step: Step, name: str) -> bool:
    return isinstance(step, FilterQuality) and name in ("min", "max")


def _parse(where: str, entry: Any) -> Step:
    if not isinstance(entry, Mapping) or "step" not in entry:
        raise ValueError(f"{where}={entry} names no step; write it as {{step: dedup_exact}}")
    name = str(entry["step"])
    try:
        choice("step", name, STEPS)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    kind = STEPS[name]
    hints = {key: hint for key, hint in get_type_hints(kind).items() if key != "step"}
    given = {str(key): value for key, value in entry.items() if key != "step"}
    for key in given:
        if key not in hints:
            raise ValueError(f"{where}.{key} is no parameter of {name}; {did_you_mean(key, hints)}")
    missing = [f.name for f in fields(kind) if f.name not in given and f.default is MISSING]
    if missing:
        raise ValueError(f"{where} ({name}) needs {' and '.join(missing)}; add it")
    try:
        made = kind(**{key: _typed(key, value, hints[key]) for key, value in given.items()})
    except ValueError as error:
        raise ValueError(f"{where} ({name}): {error}") from None
    return made


WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text, in quotes where it looks like a number",
}


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return the value as the dataclass holds it. Raises ValueError where it is of another type."""
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _typed(key, value, get_args(hint)[0])
    if get_origin(hint) is tuple:
        inner = get_args(hint)[0]
        return _pairs(key, value) if get_origin(inner) is tuple else _words(key, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{key}={value} must be {WANTED[hint]}")
    return value


def _words(key: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(word, str) for word in listed):
        raise ValueError(f"{key}={value} must be a list of words, such as [en]")
    return tuple(listed)


def _pairs(key: str, value: Any) -> tuple[tuple[str, float | None], ...]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={value} must map features to numbers, as {{digits: 0.2}} does")
    return tuple(
        (str(name), _typed(f"{key}.{name}", number, float | None)) for name, number in sorted(value.items())
    )
