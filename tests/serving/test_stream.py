"""The text of tokens: the same, however they are split and whenever they come."""

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from data.config import TokenizerConfig
from data.tokens.tokenizer import Tokenizer, train_tokenizer
from serving.http.stream import AnswerFailed, AnswerStream, TextStream
from serving.request import Failed, Finished, Written
from tests.data.corpora import some_texts

LETTERS = "ab \n{}éß世界👍🏽\u200d\U0001f3fd'\"<|x"
SIMPLE = Finished("length", 1, 1, 0, 0.0, 0.0, 0.0, "1")


def sentence_pieces():
    """SentencePiece's kind: spaces as ▁, bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgxé", "▁a", "ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend.to_str())


TOKENIZERS = {
    "byte": train_tokenizer([], TokenizerConfig(kind="byte")),
    "bpe": train_tokenizer(some_texts(60), TokenizerConfig(kind="bpe", vocab_size=400)),
    "pieces": sentence_pieces(),
}


def written(pieces, tokens, stops=(), least=0):
    """(increments, whether it was stopped)"""
    stream = TextStream(pieces, stops, least)
    parts = [stream.write(token) for token in tokens]
    return [*parts, stream.finish()], stream.stopped


def cut(text, stops):
    """The text before the first stop string to be complete, found letter by letter."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_of_tokens_is_the_text(kind):
    tokenizer, draw = TOKENIZERS[kind], random.Random(1)
    pieces = tokenizer.pieces()
    for _ in range(300):
        text = "".join(draw.choices(LETTERS, k=draw.randrange(30)))
        parts, stopped = written(pieces, tokenizer.encode(text).tolist())
        assert "".join(parts) == text and not stopped
        assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_text_of_any_tokens_is_what_the_tokenizer_decodes(kind):
    """Half characters, bytes that no text has, specials and rows that no token owns."""
    tokenizer, draw = TOKENIZERS[kind], random.Random(2)
    pieces = tokenizer.pieces()
    for _ in range(500):
        tokens = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(20))]
        parts, _ = written(pieces, tokens)
        assert "".join(parts) == tokenizer.decode(tokens)
    assert written(pieces, [len(pieces) + 5])[0] == ["", ""]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_has_as_many_bytes_as_are_counted(kind):
    tokenizer = TOKENIZERS[kind]
    assert [len(piece) for piece in tokenizer.pieces()] == tokenizer.token_bytes().tolist()


def test_stop_strings_are_found_across_tokens_and_never_seen():
    draw = random.Random(3)
    found = 0
    for _ in range(3000):
        text = "".join(draw.choices("ab世", k=draw.randrange(25)))
        stops = ["".join(draw.choices("ab世", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 4))]
        data = text.encode()
        edges = sorted({0, len(data), *draw.choices(range(len(data) + 1), k=draw.randrange(9))})
        pieces = [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        parts, stopped = written(pieces, range(len(pieces)), stops)
        wanted = cut(text, stops)
        assert "".join(parts) == wanted and stopped == (wanted != text or any(s in text for s in stops))
        found += stopped
    assert 500 < found < 2900


def test_only_what_may_become_a_stop_is_held_back():
    pieces = [b"abc", b"a", b"b", b"x"]
    assert written(pieces, [0, 1, 2, 3], ["abx"]) == (["abc", "", "", "", ""], True)
    assert written(pieces, [0, 1, 2, 1, 3], ["abx"]) == (["abc", "", "", "ab", "ax", ""], False)
    assert written(pieces, [1, 2], ["abx"]) == (["", "", "ab"], False)


def test_before_the_least_count_nothing_stops():
    pieces = [b"stop", b"go"]
    assert written(pieces, [0, 1, 0], ["stop"], least=2) == (["stop", "go", "", ""], True)


def test_an_answer_ends_once_and_says_why():
    stream = AnswerStream(TextStream([b"a", b"!"], ["!"]), offset=3)
    first, second = stream.take(Written(0)), stream.take(Written(1))
    assert (first.text, first.offsets, second.text, second.offsets) == ("a", [3], "", [4])
    assert stream.stopped and stream.take(Written(0)).written == []
    last = stream.take(Finished("cancelled", 1, 2, 0, 0.0, 0.0, 0.0, "1"))
    assert last.reason == "stop" and stream.ended
    first.add(second)
    first.add(last)
    assert (first.text, len(first.written), first.reason) == ("a", 2, "stop")
    assert AnswerStream(TextStream([])).take(SIMPLE).reason == "length"
    for event in (Failed("lost"), Finished("cancelled", 1, 0, 0, 0.0, 0.0, 0.0, "1")):
        with pytest.raises(AnswerFailed):
            AnswerStream(TextStream([])).take(event)
