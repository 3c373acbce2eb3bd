"""Answers that a run draws for its own training, on its mesh and with the weights where they lie.

A batch of them is a function of (seed, step, weights): prompts by a permutation, keys by their numbers,
rewards by what was written. So a run that was killed goes on with the same bits.

B rows of a batch, G answers of a group, T positions.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from artifacts.directory import RunDirectory
from common.checks import ConfigError, choice
from common.errors import RunFault
from common.files import write_text
from data.loading.packing import empty_batch, permutation
from data.prepared import Prepared
from data.tokens.store import TokenStore
from data.tokens.tokenizer import Tokenizer
from parallel import processes
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys
from training.config import Config
from training.objectives.grpo import GRPO
from training.objectives.sft import SFT
from training.program import Program
from training.rollouts.rewards import REWARDS, rewards_of

PROMPTS, ANSWERS = 2, 3  # what a permutation or a key is for (`data.loading.loader` has 0 and 1)
EQUAL = 1e-9  # rewards nearer than that are equal
EVALUATED = 256  # held-out prompts, at the most


@dataclass(frozen=True)
class Prompt:
    """What is asked, as tokens, and the data's own answer, as text and in tokens."""

    ids: tuple[int, ...]
    wanted: str


def prompts_of(store: TokenStore, tokenizer: Tokenizer, most: int | None = None) -> list[Prompt]:
    """The store's documents as questions: what comes before the first token that counts, and what counts."""
    weights = store.framed_weights()
    assert weights is not None  # data.format has been checked
    found = []
    for ids, own in zip(store.framed(), weights, strict=True):
        first = int(np.argmax(own > 0))
        answer = [int(i) for i in ids[first:][own[first:] > 0] if int(i) not in tokenizer.specials_by_id]
        found.append(Prompt(tuple(int(i) for i in ids[:first]), tokenizer.decode(answer)))
        if len(found) == most:
            break
    return found


class Drawing:
    """A generator over weights that change, and what ends an answer."""

    def __init__(self, program: Program, tokenizer: Tokenizer, max_new_tokens: int) -> None:
        self.program, self.tokenizer, self.max_new_tokens = program, tokenizer, max_new_tokens
        self.stop_id = tokenizer.eos_id if tokenizer.chat is None else tokenizer.chat.stop_id
        self._generator: Generator | None = None

    def answers(
        self, params: Any, prompts: list[Prompt], temperature: float, seed: int, numbers: list[int]
    ) -> list[list[int]]:
        """One answer a prompt, the end's token behind it where it has come to one."""
        whole = self.program.to_canonical(params)
        if self._generator is None:
            self._generator = Generator(self.program.model, whole, self.program.ops, self.program.layout)
        else:
            self._generator.update(whole)
        sampling = Sampling(temperature=temperature, vocab_size=self.tokenizer.vocab_size)
        keys = sample_keys(seed, numbers)
        texts = [prompt.ids for prompt in prompts]
        most = self.max_new_tokens
        try:
            written = self._generator.complete(
                texts, sampling, keys, max_new_tokens=most, stop_id=self.stop_id
            )
        finally:
            self._generator.forget()  # the step wants their memory
        return [[*ids, self.stop_id] if len(ids) < most else ids for ids in written]

    def text(self, answer: list[int]) -> str:
        """An answer without the token that ends it."""
        return self.tokenizer.decode([i for i in answer if i != self.stop_id])


class Rollouts:
    """Batches of groups of answers to one prompt each, those of equal reward left out and drawn anew."""

    def __init__(
        self,
        program: Program,
        config: Config,
        store: TokenStore,
        tokenizer: Tokenizer,
        directory: RunDirectory,
        place: Callable[[Any], Any],
        reference: Any = None,
    ) -> None:
        """place: from a whole batch to what the step takes; reference: weights of the divergence's reference.

        Raises ConfigError where answers do not fit into a row, or groups into a batch.
        """
        objective = program.objective
        assert isinstance(objective, GRPO)
        self.program, self.objective, self.config = program, objective, config
        self.prompts = prompts_of(store, tokenizer)
        self.drawing = Drawing(program, tokenizer, objective.max_new_tokens)
        self.folder, self._place, self._reference = directory.path / "rollouts", place, reference
        self.stages: dict[str, float] = {}
        rows, group = config.training.global_batch_size, objective.group
        if rows % group:
            raise ConfigError(
                f"training.global_batch_size={rows} is no whole number of groups of objective.group={group}; "
                f"use {-(-rows // group) * group}"
            )
        longest = max(len(prompt.ids) for prompt in self.prompts) + objective.max_new_tokens - 1
        if longest > config.data.seq_len:
            raise ConfigError(
                f"data.seq_len={config.data.seq_len}: the longest prompt and objective.max_new_tokens="
                f"{objective.max_new_tokens} take {longest}; use data.seq_len={longest}"
            )
        self._score = jax.jit(
            lambda params, batch: jax.lax.with_sharding_constraint(
                program.strategy.score(program.model, params, batch, program.ops)["logprobs"],
                program.layout.replicated(),
            ),
            compiler_options=program.layout.compiler_options,
        )
        self._drawn: tuple[int, dict[str, np.ndarray]] | None = None

    def batch(self, step: int, params: Any) -> Any:
        """The placed batch of a step (from 1), drawn by these weights unless the last has updates left."""
        draw, used = divmod(step - 1, self.objective.updates)
        if self._drawn is None or self._drawn[0] != draw:
            # In the middle of a draw's updates the weights that drew it are gone: the file has its batch.
            made = self._made(draw, params) if not used else self._read(draw)
            self._drawn = draw, made
        return self._place(self._drawn[1])

    def _made(self, draw: int, params: Any) -> dict[str, np.ndarray]:
        objective, config = self.objective, self.config
        count = config.training.global_batch_size // objective.group
        kept: list[tuple[Prompt, list[list[int]], Float[np.ndarray, " G"]]] = []
        drawn: list[float] = []
        for attempt in range(objective.attempts):
            number = draw * objective.attempts + attempt
            prompts = list(self._chosen(number, count))
            rows = [prompt for prompt in prompts for _ in range(objective.group)]
            numbers = [(number * len(rows) + row) % 2**31 for row in range(len(rows))]
            answers = self.drawing.answers(
                params, rows, objective.temperature, config.seed + ANSWERS, numbers
            )
            texts = [(self.drawing.text(a), prompt.wanted) for a, prompt in zip(answers, rows, strict=True)]
            rewards = np.array(rewards_of(objective.reward, texts)).reshape(count, -1)
            drawn += rewards.ravel().tolist()
            for index, prompt in enumerate(prompts):
                if np.ptp(rewards[index]) > EQUAL:
                    own = slice(index * objective.group, (index + 1) * objective.group)
                    kept.append((prompt, answers[own], rewards[index]))
            if len(kept) >= count:
                break
        batch = self._rows(kept[:count], float(np.mean(drawn)))
        if objective.updates > 1 or objective.kl_weight:
            placed = self._place(batch)
            if objective.updates > 1:
                batch["behaviour_logprobs"] = np.asarray(self._score(params, placed))
            if objective.kl_weight:
                batch["reference_logprobs"] = np.asarray(self._score(self._reference, placed))
        processes.from_primary("the rollouts' file", lambda: self._write(draw, kept[:count], batch))
        return batch

    def _chosen(self, number: int, count: int) -> Iterator[Prompt]:
        """Prompts of a draw's attempt: each epoch has all of them in another order."""
        epoch, order = -1, np.zeros(0, int)
        for place in range(number * count, (number + 1) * count):
            if place // len(self.prompts) != epoch:
                epoch = place // len(self.prompts)
                order = permutation(len(self.prompts), self.config.seed, epoch, PROMPTS)
            yield self.prompts[order[place % len(self.prompts)]]

    def _rows(self, groups: list[Any], drawn: float) -> dict[str, np.ndarray]:
        """A batch [B, T] of these groups; rows without one count nothing."""
        config, objective = self.config, self.objective
        batch = empty_batch(config.training.global_batch_size, config.data.seq_len)
        for name in set(objective.fields) - set(batch):
            batch[name] = np.zeros_like(batch["loss_weights"])
        batch["drawn_reward"][:] = drawn
        for number, (prompt, answers, rewards) in enumerate(groups):
            advantages = rewards - rewards.mean()
            if objective.scale:
                advantages = advantages / (rewards.std() + 1e-4)  # as DeepSeek's and TRL's
            for row, (answer, advantage) in enumerate(zip(answers, advantages, strict=True)):
                row += number * objective.group
                ids = np.array([*prompt.ids, *answer], np.int32)
                size, first = len(ids) - 1, len(prompt.ids) - 1
                batch["tokens"][row, :size], batch["targets"][row, :size] = ids[:-1], ids[1:]
                batch["positions"][row, :size] = np.arange(size)
                batch["segment_ids"][row, :size] = 1
                batch["loss_weights"][row, first:size] = 1
                batch["advantages"][row, first:size] = advantage
        return batch

    def _write(self, draw: int, groups: list[Any], batch: dict[str, np.ndarray]) -> None:
        self.folder.mkdir(exist_ok=True)
        step = draw * self.objective.updates + 1
        if self.objective.updates > 1:
            arrays: dict[str, Any] = dict(batch)
            np.savez(self.folder / f"{step}.npz", **arrays)
        lines = (
            json.dumps(
                {
                    "prompt": self.drawing.tokenizer.decode(list(prompt.ids)),
                    "wanted": prompt.wanted,
                    "answers": [self.drawing.text(answer) for answer in answers],
                    "rewards": rewards.tolist(),
                },
                ensure_ascii=False,
            )
            for prompt, answers, rewards in groups
        )
        write_text(self.folder / f"{step}.jsonl", "".join(f"{line}\n" for line in lines))

    def _read(self, draw: int) -> dict[str, np.ndarray]:
        path = self.folder / f"{draw * self.objective.updates + 1}.npz"
        try:
            with np.load(path) as file:
                return {name: file[name] for name in file.files}
        except OSError as error:
            raise RunFault(
                f"{path} has what this run drew before it stopped, and cannot be read ({error.strerror}); "
                "remove the checkpoints behind it to go on from an earlier one"
            ) from None


def held_out_rewards(
    config: Config, program: Program, prepared: Prepared
) -> Callable[[Any], dict[str, float]] | None:
    """What measures `eval/reward`, where the objective has a reward: the mean over held-out prompts.

    Of each, one answer is judged, with the likeliest token at every place: what is called pass@1.
    """
    objective = program.objective
    if not isinstance(objective, GRPO | SFT) or objective.reward is None or prepared.validation is None:
        return None
    choice("objective.reward", objective.reward, REWARDS)
    reward, drawing = objective.reward, Drawing(program, prepared.tokenizer, objective.max_new_tokens)
    prompts = prompts_of(prepared.validation, prepared.tokenizer, EVALUATED)

    def measure(params: Any) -> dict[str, float]:
        answers = drawing.answers(params, prompts, 0.0, 0, list(range(len(prompts))))
        pairs = [(drawing.text(a), prompt.wanted) for a, prompt in zip(answers, prompts, strict=True)]
        return {"eval/reward": float(np.mean(rewards_of(reward, pairs)))}

    return measure
