"""Words of a command whose key takes text, quoted where Hydra would read something else in them.

Hydra's grammar knows no types: `run.name=2024_01_15` is to it the number 20240115, `12e5678` (a commit, say)
is infinity, `true` a truth value; and OmegaConf makes text of those. What is typed for text is text. A tilde
that no shell has taken, as none takes that of `data.path=~/texts`, it cannot read at all.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_visitor import HydraErrorListener
from hydra.errors import HydraException

# antlr4's names come from Hydra's own generated files: the version that it pins, and no dependency of ours.
from hydra.grammar.gen.OverrideLexer import (  # type: ignore[attr-defined]
    CommonTokenStream,
    InputStream,
    OverrideLexer,
    Token,
)
from hydra.grammar.gen.OverrideParser import OverrideParser

from configs.groups import groups
from data.config import DataConfig

Kind = tuple[Any, ...]  # the types that a value may have

NOT_TEXT = r"[+-]?(?:[\d_.]+(?:[eE][+-]?[\d_]+)?|(?i:inf|nan|true|false|null))"  # to Hydra
HOME = r"(?<![^=,:\[\s])~(?:\$\{[^}]*\}|[^\s,()\[\]{}])*"  # at the start of a value, or of an element of one
READ_AS_OTHER = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
SAME_KIND = ("choice", "shuffle", "tag")  # Hydra's functions whose arguments are values of the key
GROUP_CHOICE: Kind = (str, list[str], NoneType)


def as_typed(words: Sequence[str], root: type) -> list[str]:
    """The words of a command, what is typed for a text of `root` in quotes; null stays where it may be.

    A word that cannot be read stays as it is: who checks words says why.
    """
    return [_as_typed(word, root) for word in words]


def unquoted(word: str) -> str:
    """A word without the quotes that `as_typed` has given it."""
    return re.sub(rf"'({NOT_TEXT})'", r"\1", word)


def _as_typed(word: str, root: type) -> str:
    key, _, value = word.lstrip("+").partition("=")
    kind = GROUP_CHOICE if "." not in key and key in groups() else _kind_of(key, root)
    if kind and not re.search(r"['\"\\]", value):
        word = word[: len(word) - len(value)] + re.sub(HOME, r"'\g<0>'", value)
    if not kind or re.search(NOT_TEXT, value) is None:
        return word
    for token in reversed(list(_misread(_parsed(word), kind))):
        word = f"{word[: token.start]}'{token.text}'{word[token.stop + 1 :]}"
    return word


def _parsed(word: str) -> Any:
    """Hydra's parse tree of a word; None where it has no such word."""
    lexer = OverrideLexer(InputStream(word))
    parser = OverrideParser(CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(HydraErrorListener())
    try:
        return parser.override()
    except HydraException:
        return None


def _misread(node: Any, kind: Kind) -> Iterator[Token]:
    """Tokens of a tree that are no text to Hydra, where a value of `kind` is text."""
    if isinstance(node, OverrideParser.PrimitiveContext):
        tokens = [child.symbol for child in node.getChildren() if child.symbol.type != OverrideLexer.WS]
        known = [
            token
            for part, token in ((NoneType, OverrideLexer.NULL), (bool, OverrideLexer.BOOL))
            if part in kind
        ]
        other = [token for token in (*READ_AS_OTHER, OverrideLexer.NULL) if token not in known]
        if str in kind and len(tokens) == 1 and tokens[0].type in other:
            yield tokens[0]
        return
    if isinstance(node, OverrideParser.FunctionContext) and node.getChild(0).getText() not in SAME_KIND:
        return
    if isinstance(node, OverrideParser.ListContainerContext):
        kind = _flat(get_args(part)[0] for part in kind if _is(part, list))
    elif isinstance(node, OverrideParser.DictKeyValuePairContext):
        kind = _below(kind, node.dictKey().getText().strip())
    for child in getattr(node, "children", None) or ():
        yield from _misread(child, kind)


def _kind_of(key: str, root: type) -> Kind:
    """The types that a dotted key may have; none where there is no such key."""
    kind: Kind = (root,)
    for name in key.split("."):
        kind = _below(kind, name)
    return kind


def _below(kind: Kind, name: str) -> Kind:
    """The types of what has a name in a value: a field, also one of a derived class, or part of a mapping."""
    found = []
    for part in kind:
        if is_dataclass(part):
            assert isinstance(part, type)
            found += [hints[name] for hints in map(_hints, (part, *part.__subclasses__())) if name in hints]
        elif _is(part, dict):
            found.append(get_args(part)[1])
    return _flat(found)


def _hints(part: type) -> dict[str, Any]:
    """Fields' types, with what a mixture's parts are, whose keys are optional and so have no class."""
    return get_type_hints(part) | ({"mixture": dict[str, DataConfig]} if part is DataConfig else {})


def _is(kind: Any, generic: Any) -> bool:
    return get_origin(kind) is generic


def _flat(kinds: Iterable[Any]) -> Kind:
    return tuple(
        part
        for kind in kinds
        for part in (get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,))
    )
