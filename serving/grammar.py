"""What may be written under a JSON schema, a regular expression or a Lark grammar: `serving.request.Grammar`.

llguidance (the extra `serve`) says for each state which bytes may follow, and so which tokens.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool

from data.tokens.tokenizer import Tokenizer

ANY_OBJECT = {"type": "object"}  # of response_format json_object
# One space between parts at most: a model that writes spaces for ever would never come to an end.
JSON_OPTIONS: Any = {"whitespace_pattern": "[ ]?"}


class TokenGrammar:
    """One text under a grammar; `fresh` gives another at the beginning."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._size = matcher, vocab_size

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """Whether each token may come next; those that end a text, where it may end here."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)
        return np.pad(mask, (0, self._size - len(mask)))

    def accept(self, token: int) -> None:
        """Go on behind a token that was allowed. ValueError behind one that was not."""
        if not self._matcher.consume_token(token):
            raise ValueError(
                f"token {token} does not follow by the grammar: {_line(self._matcher.get_error())}"
            )

    def fresh(self) -> "TokenGrammar":
        """The same grammar, and nothing written yet. To be asked of one that has accepted nothing."""
        return TokenGrammar(self._matcher.deep_copy(), self._size)


class GrammarCompiler:
    """Grammars over a tokenizer's bytes for a model of `vocab_size` rows; any of stop_ids ends a text.

    Each method raises ValueError, in one line, for what cannot be compiled, met, or spelt by the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Iterable[int], vocab_size: int) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        ends = sorted(stop_ids)
        self._size = vocab_size
        self._tokens = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, ends)), eos_token=ends)

    def json_schema(self, schema: Any) -> TokenGrammar:
        """JSON that a schema describes."""
        from llguidance import LLMatcher

        text = json.dumps(schema)
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
        except ValueError as error:
            raise ValueError(f"json_schema cannot be compiled ({_line(error)}); mend it") from None
        return self._compiled("json_schema", grammar)

    def regex(self, pattern: str) -> TokenGrammar:
        """A whole text that a regular expression (Rust's) matches."""
        from llguidance import LLMatcher

        return self._compiled("regex", LLMatcher.grammar_from_regex(pattern))

    def lark(self, grammar: str) -> TokenGrammar:
        """A text by a grammar in Lark's form, from its rule `start`."""
        from llguidance import LLMatcher

        return self._compiled("grammar", LLMatcher.grammar_from_lark(grammar))

    def _compiled(self, key: str, grammar: str) -> TokenGrammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"{key} cannot be compiled ({_line(matcher.get_error())}); mend it")
        made = TokenGrammar(matcher, self._size)
        if not made.allowed().any():
            raise ValueError(f"{key} begins with what no token of this model spells; change it")
        return made


class _Vocabulary:
    """A tokenizer as llguidance reads one."""

    def __init__(self, tokenizer: Tokenizer, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokenizer.pieces()
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.specials_by_id)

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace")).tolist()


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
