"""The next token of answers: supervised fine-tuning, by a name that says what it is for."""

from dataclasses import dataclass
from typing import ClassVar

from training.objectives.next_token import NextToken


@dataclass
class SFT(NextToken):
    """Mean cross-entropy over the answers' tokens, which needs data that know what an answer is."""

    name: str = "sft"
    reward: str | None = (
        None  # what held-out answers are held against (`training.rollouts.rewards`); null: nothing
    )
    max_new_tokens: int = 64  # of such an answer

    formats: ClassVar[tuple[str, ...]] = ("chat", "completion")
