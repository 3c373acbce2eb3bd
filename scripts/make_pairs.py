"""Pairs of a model's own answers: `python scripts/make_pairs.py MODEL asked.jsonl pairs.jsonl`.

    MODEL               a run, or a directory or FILE.gguf of published weights
    asked.jsonl         records {"prompt": "...", "completion": "..."} or {"messages": [...]}: of these the
                        first user's turn is asked, and the first answer is what "right" is held against
    pairs.jsonl         where {"prompt", "chosen", "rejected"} go, for data.format=pairs
    prefer=short        short: the answer of fewer tokens, an empty one last; long: of more; right: that has
                        the number of the data's own
    samples=4           answers to each prompt; the best and the worst become a pair, where they differ
    prompts=200         of the file, from its begin; skip=N leaves out the first N
    skip=0
    max_new_tokens=64   of an answer
    temperature=1.0     they are drawn at
    chat=auto           true: the prompt is a user's turn; auto: where a chat template taught a run, or
                        lies beside published weights
    seed=0              the same seed draws the same answers
    rival=MODEL         no pairs: whose answers the rule prefers, MODEL's or the rival's, one for each prompt
                        and key, with the error of the share; ties count half

Exit status: 0 done, 1 a damaged checkpoint, 2 bad input.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    import command

from common.checks import choice, within
from common.files import write_text
from data.tokens.turns import CHAT, give_chat
from scripts.command import parse, run

ROWS = 32  # answers that are written at a time


@dataclass(frozen=True)
class Answer:
    """What a model wrote: its text, and how many tokens that is."""

    text: str
    tokens: int


def short(answer: Answer, wanted: str) -> float:
    """Fewer tokens are better, and none are worst."""
    return -answer.tokens if answer.text.strip() else -math.inf


def right(answer: Answer, wanted: str) -> float:
    """1 where the last number is the wanted one's."""
    from training.rollouts.rewards import number

    return number(answer.text, wanted)


RULES: dict[str, Callable[[Answer, str], float]] = {
    "short": short,
    "long": lambda answer, wanted: answer.tokens,
    "right": right,
}


@dataclass(frozen=True)
class PairsOptions:
    """The command line; see the module's docstring."""

    model: str
    asked: Path
    pairs: Path | None = None
    prefer: str = "short"
    samples: int = 4
    prompts: int = 200
    skip: int = 0
    max_new_tokens: int = 64
    temperature: float = 1.0
    chat: str = "auto"
    seed: int = 0
    rival: str | None = None


def asked(path: Path, skip: int, most: int) -> list[tuple[str, str]]:
    """(prompt, the data's own answer) of some records. ValueError, with its line, for one that has none."""
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(itertools.islice(lines, skip, skip + most), skip + 1):
            try:
                record = json.loads(line)
                turns = {m["role"]: m["content"] for m in reversed(record.get("messages", []))}
                pair = (
                    record.get("prompt", turns.get("user")),
                    record.get("completion", turns.get("assistant", "")),
                )
                if not isinstance(pair[0], str):
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}:{number} is no record with a prompt that is a text") from None
            found.append(pair)
    if not found:
        raise ValueError(f"{path} has no record behind the first {skip}")
    return found


def answers_of(
    model: str, prompts: Sequence[str], numbers: Sequence[int], options: PairsOptions
) -> list[Answer]:
    """One answer to each prompt, by the key of its number."""
    from configs.groups import mesh_rules
    from serving.generator import Generator
    from serving.sampling import Sampling, sample_keys
    from serving.text import encode_prompt, stop_id
    from training.opening.opened import open_model

    opened = open_model(model, mesh_rules())
    data = opened.config.data if opened.config else None
    give_chat(opened.tokenizer, opened.tokenizer_path, data, options.chat)
    tokenizer, found = opened.tokenizer, list[Answer]()
    generator = Generator(*opened.trained)
    sampling = Sampling(options.temperature, vocab_size=tokenizer.vocab_size)
    for first in range(0, len(prompts), ROWS):
        rows = slice(first, first + ROWS)
        tails = generator.complete(
            [encode_prompt(tokenizer, prompt) for prompt in prompts[rows]],
            sampling,
            sample_keys(options.seed, numbers[rows]),
            max_new_tokens=options.max_new_tokens,
            stop_id=stop_id(tokenizer),
        )
        found += [Answer(tokenizer.decode(tail), len(tail)) for tail in tails]
    return found


def make_pairs(arguments: Sequence[str]) -> int:
    """Write the pairs, or say whose answers are preferred."""
    options = parse(arguments, PairsOptions, ("model", "asked", "pairs"))
    choice("prefer", options.prefer, RULES)
    choice("chat", options.chat, CHAT)
    for key in ("samples", "prompts", "max_new_tokens"):
        within(key, getattr(options, key), 1)
    questions = asked(options.asked, options.skip, options.prompts)
    if options.rival is not None:
        return compare(options, questions)
    if options.pairs is None:
        raise ValueError("give the file to write, as in: make_pairs.py MODEL asked.jsonl pairs.jsonl")
    rows = [(prompt, wanted) for prompt, wanted in questions for _ in range(options.samples)]
    numbers = [options.skip * options.samples + row for row in range(len(rows))]
    answers = answers_of(options.model, [prompt for prompt, _ in rows], numbers, options)
    lines = []
    for number, (prompt, wanted) in enumerate(questions):
        own = answers[number * options.samples : (number + 1) * options.samples]
        ranked = sorted((a for a in own if a.text.strip()), key=lambda a: RULES[options.prefer](a, wanted))
        values = [RULES[options.prefer](answer, wanted) for answer in ranked]
        if ranked and values[0] < values[-1]:
            pair = {"prompt": prompt, "chosen": ranked[-1].text, "rejected": ranked[0].text}
            lines.append(json.dumps(pair, ensure_ascii=False))
    write_text(options.pairs, "".join(f"{line}\n" for line in lines))
    print(f"{options.pairs}: {len(lines)} pairs of {len(questions)} prompts, {options.prefer} preferred")
    return 0


def compare(options: PairsOptions, questions: list[tuple[str, str]]) -> int:
    """Print the share of prompts where the model's answer is preferred to its rival's."""
    prompts, numbers = (
        [prompt for prompt, _ in questions],
        list(range(options.skip, options.skip + len(questions))),
    )
    sides = [answers_of(str(model), prompts, numbers, options) for model in (options.model, options.rival)]
    won = []
    for (_, wanted), ours, theirs in zip(questions, *sides, strict=True):
        a, b = (RULES[options.prefer](answer, wanted) for answer in (ours, theirs))
        won.append(0.5 if a == b else float(a > b))
    share = sum(won) / len(won)
    error = math.sqrt(sum((w - share) ** 2 for w in won) / len(won) / max(len(won) - 1, 1))
    means = [sum(answer.tokens for answer in side) / len(side) for side in sides]
    print(
        f"{options.prefer}: {share:.1%} (± {error:.1%}) of {len(won)} prompts; {means[0]:.1f} tokens an "
        f"answer, the rival's {means[1]:.1f}"
    )
    return 0


def main(arguments: Sequence[str]) -> int:
    """The command; its exit status."""
    return run(make_pairs, arguments, __doc__)


if __name__ == "__main__":
    command.start(main)
