"""A model of ours under lm-evaluation-harness: `simple_evaluate(harness_model(generator, tokenizer))`.

Only `harness_model` imports the harness (the extra `lm-eval`). Its requests carry `args`: (context,
continuation), (text,) or (context, settings); answers come in the order of the requests.
"""

import math
from collections.abc import Sequence
from typing import Any

from common.checks import require
from data.tokens.tokenizer import Tokenizer
from evaluation.score import windows
from serving.generator import Generator
from serving.sampling import Sampling, sample_keys

FIRST_TOKENS = 32  # written before a text is looked at for its end; then twice as many each time
ROWS = 64  # texts written at a time
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS)


class HarnessMethods:
    """What the harness asks of a model: log-likelihoods of continuations and of whole texts, and texts."""

    max_gen_toks = 256  # where a task does not say
    eot_token_id = prefix_token_id = -1  # of each model; the harness's class has abstract ones

    def __init__(self, generator: Generator, tokenizer: Tokenizer, *, add_bos: bool, seed: int = 0) -> None:
        super().__init__()
        config = generator.model.config
        self.generator, self._tokens, self._seed = generator, tokenizer, seed
        self.add_bos = add_bos
        # The generator counts the last token of a text too, where positions are a table.
        self.max_length = config.max_seq_len - (config.position == "learned")
        self.eot_token_id = tokenizer.eos_id
        self.prefix_token_id = tokenizer.bos_id
        bos = f"bos {tokenizer.specials_by_id[tokenizer.bos_id]!r} ({tokenizer.bos_id})"
        print(
            f"lm-eval: {bos} begins {'every' if add_bos else 'an empty'} context and each rolling text; "
            f"at most {self.max_length} tokens are read, cut at the left"
        )

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its cache of requests under."""
        return f"{self._tokens.digest}{'+bos' * self.add_bos}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The text's ids, behind bos where that is asked for. None: as the model was made (`add_bos`).

        A special token's spelling in a text is text, here as in training.
        """
        bos = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id] * bos + self._tokens.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list:
        """(sum of log-probabilities, whether each token is the likeliest) of each continuation."""
        texts = [(context + rest)[-(self.max_length + 1) :] for _, context, rest in requests]
        sizes = [min(len(rest), len(text) - 1) for (*_, rest), text in zip(requests, texts, strict=True)]
        starts = [len(text) - size for text, size in zip(texts, sizes, strict=True)]
        found = self.generator.score_greedy(texts, starts)
        return [(math.fsum(scores.tolist()), greedy) for scores, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text: every token once, by as many before it as one window holds."""
        texts, starts, owners = [], [], []
        for number, request in enumerate(requests):
            tokens = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            for text, start in windows(tokens, 1, self.max_length, keep_first=False):
                texts.append(text)
                starts.append(start)
                owners.append(number)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, scores in zip(owners, self.generator.score(texts, starts), strict=True):
            parts[owner] += scores.tolist()
        return [math.fsum(part) for part in parts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the settings' `until`, or eos.

        A text drawn depends on its own number among the requests, not on those around it. Raises ValueError
        for a setting that we do not have.
        """
        texts = [""] * len(requests)
        groups: dict[tuple[Sampling, int], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(i)
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        for (sampling, count), members in groups.items():
            heads = {i: contexts[i][count - self.max_length :] for i in members}
            for rows in _some(members, contexts):
                ends = {i: _ends(requests[i].args[1]) for i in rows}
                for i, text in self._until({i: heads[i] for i in rows}, sampling, count, ends).items():
                    texts[i] = text[: min((text.index(end) for end in ends[i] if end in text), default=None)]
        return texts

    def _settings(self, given: dict[str, Any]) -> tuple[Sampling, int]:
        """How tokens are drawn, and how many at most. ValueError for a setting that is not known."""
        known = f"left out; known are {', '.join(SETTINGS)}"
        for key, value in given.items():
            require(key in SETTINGS, f"generation_kwargs.{key}", value, known)
        count = next((int(given[key]) for key in LENGTHS if given.get(key) is not None), self.max_gen_toks)
        limit = f"1 to {self.max_length - 1}, so that some context fits into max_length={self.max_length}"
        require(1 <= count < self.max_length, "generation_kwargs.max_gen_toks", count, limit)
        temperature = given.get("temperature")
        if temperature is None:
            temperature = 1.0 if given.get("do_sample") else 0.0
        if given.get("do_sample") is False or temperature == 0:
            return Sampling(0.0, vocab_size=self._tokens.vocab_size), count
        cut = int(given.get("top_k") or 0), float(given.get("top_p") or 1.0)
        return Sampling(float(temperature), *cut, vocab_size=self._tokens.vocab_size), count

    def _until(
        self, heads: dict[int, list[int]], sampling: Sampling, count: int, ends: dict[int, list[str]]
    ) -> dict[int, str]:
        """The text after each head, at least up to an end of it. Tokens hang on positions, not on steps."""
        tails: dict[int, list[int]] = {i: [] for i in heads}
        going, size, written = list(heads), FIRST_TOKENS, 0
        while going:
            size = min(size, count - written)
            longer = [heads[i] + tails[i] for i in going]
            more = dict(
                zip(going, self._write(longer, sampling, going, size, self.eot_token_id), strict=True)
            )
            for i in going:
                tails[i] += more[i]
            written, size = written + size, 2 * size
            going = [i for i in going if written < count and len(tails[i]) == written]
            decoded = {i: self._tokens.decode(tails[i]) for i in going}
            going = [i for i in going if not any(end in decoded[i] for end in ends[i])]
        return {i: self._tokens.decode(tail) for i, tail in tails.items()}

    def _write(
        self,
        heads: list[list[int]],
        sampling: Sampling,
        numbers: list[int],
        count: int,
        stop: int | None = None,
    ) -> list[list[int]]:
        keys = sample_keys(self._seed, numbers)
        return self.generator.complete(heads, sampling, keys, max_new_tokens=count, stop_id=stop)


def _some(members: list[int], texts: list[list[int]]) -> list[list[int]]:
    """The members by the lengths of their texts, in rows of one call."""
    ordered = sorted(members, key=lambda i: len(texts[i]))
    return [ordered[at : at + ROWS] for at in range(0, len(ordered), ROWS)]


def _ends(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [end for end in ([until] if isinstance(until, str) else until) if end]


def harness_model(generator: Generator, tokenizer: Tokenizer, *, add_bos: bool = True, seed: int = 0) -> Any:
    """The model as an instance of the harness's `TemplateLM`. ValueError where lm-eval is not installed.

    add_bos: contexts begin with bos, as documents do in training.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ValueError(f"lm-eval is not installed ({error}); pip install '.[lm-eval]'") from None
    kind = type("Cambrian", (HarnessMethods, TemplateLM), {"__doc__": HarnessMethods.__doc__})
    return kind(generator, tokenizer, add_bos=add_bos, seed=seed)
