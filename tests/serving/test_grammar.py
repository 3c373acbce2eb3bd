"""What may be written under a grammar: random walks end in texts of it, with vocabularies of every kind."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from serving.grammar import ANY_OBJECT, GrammarCompiler
from tests.serving.test_stream import TOKENIZERS

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["é", "世界", "b"]}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}


def compiler_of(kind):
    tokenizer = TOKENIZERS[kind]
    return tokenizer, GrammarCompiler(tokenizer, {tokenizer.eos_id}, tokenizer.vocab_size + 30)


def walk(tokenizer, grammar, draw):
    """A text written by chance, until its end is allowed and drawn, or nothing else is."""
    tokens, eos = [], tokenizer.eos_id
    while True:
        allowed = grammar.allowed()
        assert allowed.dtype == bool and allowed.shape == (tokenizer.vocab_size + 30,)
        assert not allowed[tokenizer.vocab_size :].any()
        choices = np.flatnonzero(allowed)
        if allowed[eos] and (len(choices) == 1 or draw.random() < 0.3):
            return b"".join(tokenizer.pieces()[token] for token in tokens).decode()
        token = int(draw.choice([c for c in choices if c != eos]))
        grammar.accept(token)
        tokens.append(token)
        assert len(tokens) < 500


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_written_by_chance_meets_the_schema(kind):
    tokenizer, compiler = compiler_of(kind)
    draw, compiled = random.Random(0), compiler.json_schema(SCHEMA)
    texts = {walk(tokenizer, compiled.fresh(), draw) for _ in range(10)}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(texts) > 5  # each fresh one begins anew


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_regular_expression_and_a_lark_grammar_hold(kind):
    tokenizer, compiler = compiler_of(kind)
    draw = random.Random(1)
    for _ in range(10):
        assert re.fullmatch("(ab|é)+x{2}", walk(tokenizer, compiler.regex("(ab|é)+x{2}").fresh(), draw))
        assert walk(tokenizer, compiler.lark('start: "a" other\nother: "b" | "é"'), draw) in ("ab", "aé")


def test_any_object_is_an_object():
    _, compiler = compiler_of("byte")
    allowed = compiler.json_schema(ANY_OBJECT).allowed()
    assert np.flatnonzero(allowed).tolist() == [ord("{")]


@pytest.mark.parametrize(
    ("way", "given", "says"),
    [
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater"),
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "number"}]}, "incompatible types"),
        ("json_schema", {"enum": []}, "anyOf is empty"),
        ("json_schema", {"type": "nonsense"}, "Invalid type"),
        ("json_schema", {"type": "object", "dependentSchemas": {}}, "Unimplemented keys"),
        ("json_schema", {"type": "string", "pattern": "("}, "unclosed group"),
        ("json_schema", {"$ref": "#/nowhere"}, "does not exist"),
        ("regex", "(", "unclosed group"),
        ("lark", "start: other", "unknown name"),
    ],
)
def test_what_cannot_be_met_is_one_line(way, given, says):
    _, compiler = compiler_of("byte")
    with pytest.raises(ValueError, match="cannot be compiled") as error:
        getattr(compiler, way)(given)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_token_that_does_not_follow_is_refused():
    _, compiler = compiler_of("byte")
    with pytest.raises(ValueError, match="token 98 does not follow"):
        compiler.regex("a").accept(98)
