"""How much of what a model writes is Python: a figure that a person understands."""

import ast
import io
import tokenize
import warnings
from collections.abc import Iterator, Sequence

LEAST_LINES = 3
CLAUSES = {"elif", "else", "except", "finally"}  # go on with a statement, in the first column though they are
NO_CODE = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def parse_share(snippets: Sequence[str], finished: Sequence[bool] | None = None) -> tuple[float, int, int]:
    """(share, parsed, total): the share of the snippets that are Python. (0.0, 0, 0) of none.

    A snippet is the prompt and its continuation as one text. It counts as parsed where both hold:
      1. `ast.parse` accepts its complete top-level statements. The last top-level statement, from its first
         line (its first decorator's) to the end of the text, may have been cut off by the length limit and is
         dropped, however complete it looks; where `finished` says that the model ended the text itself,
         nothing is dropped.
      2. At least three lines of what is left are neither blank nor only a comment.
    A text of a single unfinished statement is therefore not parsed: nothing of it is left. Top-level
    statements are found by Python's own tokenizer, up to the first text that it refuses.
    """
    ended = [False] * len(snippets) if finished is None else finished
    parsed = sum(is_python(text, whole) for text, whole in zip(snippets, ended, strict=True))
    return (parsed / len(snippets) if snippets else 0.0), parsed, len(snippets)


def is_python(text: str, finished: bool = False) -> bool:
    """Whether one snippet counts as parsed, see `parse_share`."""
    code = text if finished else complete_statements(text)
    lines = (line.strip() for line in code.splitlines())
    if sum(bool(line) and not line.startswith("#") for line in lines) < LEAST_LINES:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a `\d` in a plain string is bad style, and Python
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def complete_statements(text: str) -> str:
    """The text before its last top-level statement."""
    *_, last = [1, *_statement_starts(text)]
    return "".join(text.splitlines(keepends=True)[: last - 1])


def _statement_starts(text: str) -> Iterator[int]:
    """Line (from 1) of each top-level statement that the tokenizer reaches."""
    at_line_start, decorated = True, False
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in NO_CODE:
                continue
            if at_line_start and token.start[1] == 0 and token.string not in CLAUSES:
                if not decorated:
                    yield token.start[0]
                decorated = token.string == "@"
            at_line_start = token.type == tokenize.NEWLINE
    except (tokenize.TokenError, SyntaxError, ValueError):
        return
