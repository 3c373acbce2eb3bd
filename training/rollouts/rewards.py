"""Rewards that can be verified: what an answer is worth, as a function of it and of the one in the data."""

import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module

from common.checks import ConfigError, choice

Reward = Callable[[str, str], float]  # (answer, the data's answer) to 0 … 1
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number(answer: str, wanted: str) -> float:
    """1 where the last number of an answer is that of the wanted one; commas between digits say nothing."""
    found, known = (NUMBER.findall(text) for text in (answer, wanted))
    if not found or not known:
        return 0.0
    return float(float(found[-1].replace(",", "")) == float(known[-1].replace(",", "")))


def text(answer: str, wanted: str) -> float:
    """1 where an answer is the wanted one, but for spaces around it."""
    return float(answer.strip() == wanted.strip())


def program(answer: str, wanted: str) -> float:
    """1 where a program passes its tests, which are the data's answer, in the sandbox."""
    from evaluation.sandbox import check_solution

    passed = check_solution(answer, wanted, seconds=10.0, megabytes=512, isolation="full").status == "passed"
    return float(passed)


def reasoning_gym(answer: str, wanted: str) -> float:
    """What reasoning_gym's own scorer says; the data's answer is the JSON of one of its entries."""
    entry = json.loads(wanted)
    try:
        gym = import_module("reasoning_gym")
    except ImportError:
        raise ConfigError(
            "objective.reward=reasoning_gym needs a package that is not here; pip install -e '.[reasoning]'"
        ) from None
    return float(gym.get_score_answer_fn(entry["metadata"]["source_dataset"])(answer, entry))


REWARDS: dict[str, Reward] = {f.__name__: f for f in (number, text, program, reasoning_gym)}


def rewards_of(name: str, answers: Sequence[tuple[str, str]]) -> list[float]:
    """The reward of each (answer, wanted), equal ones judged once. ValueError for a name that is none."""
    choice("objective.reward", name, REWARDS)
    judged = {pair: REWARDS[name](*pair) for pair in dict.fromkeys(answers)}
    return [judged[pair] for pair in answers]
