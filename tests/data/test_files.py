"""Files as other programs write them: linked folders, cut archives, signatures, Arrow's ways to say text."""

import gzip
import io
import json
from collections.abc import Callable, Iterator

import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
import zstandard

from data.curation.optimize import documents
from data.errors import DataError
from data.sources.bad_records import BadRecords
from data.sources.files import column_texts, list_folder, read_documents
from data.sources.lines import LongInteger, file_lines, load_json
from data.tokens.chat import conversation_text, read_chat
from data.tokens.chat_template import ChatTemplate
from tests.data.corpora import folder_config, some_texts, write_texts

MARK = b"\xef\xbb\xbf"


def names(folder):
    return [str(path.relative_to(folder)) for path in list_folder(folder)]


# Links ------------------------


def test_linked_folders_are_read_and_each_folder_once(tmp_path):
    inside = write_texts(tmp_path / "texts", ["a"])
    write_texts(inside / "own", ["b"])
    elsewhere = write_texts(tmp_path / "disk" / "deep", ["c"]).parent
    (inside / "a link").symlink_to(elsewhere)
    (inside / "z link").symlink_to(elsewhere)  # once more
    (inside / "its own").symlink_to(inside / "own")  # which keeps its name
    (inside / ".hidden").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(inside)
    (elsewhere / "parent").symlink_to("..")
    (elsewhere / "itself").symlink_to(".")
    assert names(inside) == ["000.txt", "a link/deep/000.txt", "own/000.txt"]


def test_links_among_many_folders_are_no_maze(tmp_path):
    """Twenty folders with a link each to all others have 20! paths."""
    folders = [write_texts(tmp_path / "texts" / str(i), [str(i)]) for i in range(20)]
    for one in folders:
        for other in folders:
            if one != other:
                (one / f"to {other.name}").symlink_to(other)
    assert names(tmp_path / "texts") == sorted(f"{i}/000.txt" for i in range(20))


def test_a_link_to_a_parent_brings_what_lies_beside_the_folder(tmp_path):
    inside = write_texts(tmp_path / "all" / "texts", ["a"])
    write_texts(tmp_path / "all" / "others", ["b"])
    (inside / "up").symlink_to("..")
    assert names(inside) == ["000.txt", "up/others/000.txt"]


@pytest.mark.parametrize("target", ["/nowhere/disk2", "more"])
def test_a_link_to_nothing_is_refused_since_it_may_have_been_a_folder(tmp_path, target):
    folder = write_texts(tmp_path / "texts", ["a"])
    (folder / "more").symlink_to(target)
    with pytest.raises(DataError, match=r"^data\.path: .*texts/more cannot be read \(.*\); .* move it away$"):
        list_folder(folder)


def test_documents_of_a_linked_folder_are_documents_of_the_corpus(tmp_path):
    texts = some_texts(30)
    folder = write_texts(tmp_path / "texts", texts[:20])
    (folder / "more").symlink_to(write_texts(tmp_path / "disk", texts[20:]))
    config = folder_config(folder, tmp_path / "cache")
    assert sorted([*documents(config, "train"), *documents(config, "validation")]) == sorted(texts)


# zstd -------------------------


def records(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def blocks(lines: bytes, **options) -> bytes:
    """A frame with a block for each line, as writers make that flush by record."""
    out = io.BytesIO()
    with zstandard.ZstdCompressor(**options).stream_writer(out, closefd=False) as writer:
        for line in lines.splitlines(keepends=True):
            writer.write(line)
            writer.flush(zstandard.FLUSH_BLOCK)
    return out.getvalue()


@pytest.mark.parametrize("policy", ("stop", "skip"))
@pytest.mark.parametrize("checksum", (False, True))
def test_zstd_that_ends_within_a_frame_is_refused_wherever_it_is_cut(tmp_path, policy, checksum):
    path = tmp_path / "x.jsonl.zst"
    frames = [
        blocks(records(*"ab"), write_checksum=checksum),
        blocks(records(*"cde"), write_checksum=checksum),
    ]
    whole, ends = b"".join(frames), {len(frames[0]): ["a", "b"], sum(map(len, frames)): list("abcde")}
    for size in range(1, len(whole) + 1):
        path.write_bytes(whole[:size])
        if size in ends:
            assert list(read_documents(path, "text", BadRecords(policy))) == ends[size]
            continue
        with pytest.raises(DataError, match=r"x\.jsonl\.zst is truncated or corrupt \(.*\); fetch it again"):
            list(read_documents(path, "text", BadRecords(policy)))


def test_zstd_frames_may_be_many_or_empty_or_none_of_ours_and_lines_longer_than_a_read(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    compress = zstandard.ZstdCompressor().compress
    comment = b"\x50\x2a\x4d\x18" + (5000).to_bytes(4, "little") + bytes(5000)  # a skippable frame
    long = "".join(map(str, range(40_000)))
    raw = records("a", long, "b")
    pieces = [comment, compress(raw[:10]), compress(b""), compress(raw[10:100_000]), comment]
    path.write_bytes(b"".join([*pieces, compress(raw[100_000:-1])]))  # no newline at the end
    assert list(file_lines(path)) == raw[:-1].splitlines(keepends=True)
    assert list(read_documents(path, "text")) == ["a", long, "b"]
    path.write_bytes(compress(raw) + b"what follows is no frame")
    with pytest.raises(DataError, match="is truncated or corrupt"):
        list(read_documents(path, "text"))


def test_a_sound_zstd_frame_that_cannot_be_read_is_not_called_corrupt(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    wide = zstandard.ZstdCompressionParameters
    path.write_bytes(blocks(records("a"), compression_params=wide(window_log=27)))
    assert list(read_documents(path, "text")) == ["a"]  # what `zstd` itself takes
    path.write_bytes(blocks(records("b")) + blocks(records("a"), compression_params=wide(window_log=28)))
    with pytest.raises(
        DataError, match=r"zst needs a window of 256 MB, where 128 MB are held; .*without --long"
    ):
        list(read_documents(path, "text"))
    words = zstandard.train_dictionary(1000, [records(f"hello {i}") for i in range(500)])
    path.write_bytes(blocks(records("hello"), dict_data=words))
    with pytest.raises(DataError, match=rf"zst needs the zstd dictionary {words.dict_id()}, .*without one"):
        list(read_documents(path, "text"))


# Signatures -------------------

PACK: dict[str, Callable[[bytes], bytes]] = {
    "x.txt": bytes,
    "x.md": bytes,
    "x.py": bytes,
    "x.jsonl": bytes,
    "x.jsonl.gz": gzip.compress,
    "x.jsonl.zst": zstandard.ZstdCompressor().compress,
}


def read(path, policy) -> list[str] | str:
    try:
        return list(read_documents(path, "text", BadRecords(policy)))
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("policy", ("stop", "skip"))
@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("raw", (b"", records("one", "two"), b"\n" + records("one"), b"\r\n"))
def test_a_byte_order_mark_changes_nothing(tmp_path, name, policy, raw):
    path = tmp_path / name
    path.write_bytes(PACK[name](raw))
    plain = read(path, policy)
    path.write_bytes(PACK[name](MARK + raw))
    assert read(path, policy) == plain


def test_a_mark_counts_where_a_byte_is_named_and_inside_of_a_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(MARK + records("one") + MARK + records("\ufefftwo\ufeff"))  # as of `cat` of two files
    assert list(read_documents(path, "text")) == ["one", "\ufefftwo\ufeff"]
    path.write_bytes(MARK + b'{"text": "\xff"}\n' + b'{"text": "\xff"}\n')
    assert "x.jsonl:1 is not UTF-8 at byte 13" in read(path, "stop")
    path.write_bytes(MARK + records("one") + b'{"text": "\xff"}\n')
    assert f"x.jsonl:2 is not UTF-8 at byte {3 + len(records('one')) + 10}" in read(path, "stop")


# JSON -------------------------

LONG = "7" * 5000


def test_numbers_of_any_length_leave_a_record_sound(tmp_path):
    path = tmp_path / "x.jsonl"
    inside = f'{{"text": "second", "a": [{{"b": {LONG}}}], "c": -{LONG}}}'
    path.write_text('{"text": "first"}\n' + inside + '\n{"text": "third"}\n')
    assert read(path, "stop") == ["first", "second", "third"]
    with pytest.raises(json.JSONDecodeError):
        load_json(f'{{"a": {LONG}, "b": }}')
    assert isinstance(load_json(LONG), LongInteger) and load_json('{"a": 5}') == {"a": 5}


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        (f'{{"text": {LONG}}}', "no_text", "data.text_key=text is a LongInteger in .*x.jsonl:2"),
        (LONG, "no_object", "x.jsonl:2 is a LongInteger"),
    ],
)
def test_a_long_number_where_text_should_be_is_a_bad_record_with_its_line(tmp_path, line, kind, said):
    path, bad = tmp_path / "x.jsonl", BadRecords("skip")
    path.write_text('{"text": "first"}\n' + line + "\n")
    with pytest.raises(DataError, match=said):
        list(read_documents(path, "text"))
    assert list(read_documents(path, "text", bad)) == ["first"]
    assert bad.counts == {kind: 1}


TURNS = '"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "test.jinja", "", "", ())


def test_conversations_are_read_through_marks_and_long_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    more = ("", f', "id": {LONG}', f', "tools": [{{"most": {LONG}}}]')
    lines = [f"{{{TURNS}{key}}}" for key in more]
    path.write_bytes(MARK + "\n".join(lines).encode())
    said: list[str] = []
    found = list(read_chat(path, TEMPLATE, lambda kind, message: said.append(f"{kind}: {message}")))
    assert found == [conversation_text(json.loads(lines[0]), "x")] * 2
    (refused,) = said
    assert refused.startswith("conversation: ") and "x.jsonl:3 has what cannot be written as JSON" in refused


# Arrow ------------------------

TEXTS = ["a", "b", None, "a", "", "語"]
PLAIN = pyarrow.array(TEXTS)
AS_TEXT = {
    "string": PLAIN,
    "large_string": PLAIN.cast(pyarrow.large_string()),
    "string_view": PLAIN.cast(pyarrow.string_view()),
    "dictionary": PLAIN.dictionary_encode(),
    "dictionary<large_string>": PLAIN.cast(pyarrow.large_string()).dictionary_encode(),
    "dictionary<string_view>": pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0, 1, None, 0, 2, 3], pyarrow.int8()),
        pyarrow.array(["a", "b", "", "語"]).cast(pyarrow.string_view()),
    ),
    "run_end_encoded": pyarrow.compute.run_end_encode(PLAIN),
    "run_end_encoded<large_string>": pyarrow.compute.run_end_encode(PLAIN.cast(pyarrow.large_string())),
}
WRITTEN = [kind for kind in AS_TEXT if kind != "dictionary<string_view>" and "run" not in kind]


def texts_of(column: pyarrow.Array | pyarrow.ChunkedArray) -> Iterator[str]:
    return column_texts(column, "text", "x", BadRecords())


@pytest.mark.parametrize("kind", AS_TEXT)
def test_text_is_text_however_arrow_encodes_it(kind):
    column = AS_TEXT[kind]
    assert list(texts_of(column)) == ["a", "b", "a", "語"]
    assert list(texts_of(column[1:4])) == ["b", "a"]
    assert list(texts_of(pyarrow.chunked_array([column, column[:2]]))) == ["a", "b", "a", "語", "a", "b"]


@pytest.mark.parametrize("kind", WRITTEN)
def test_parquet_gives_the_same_documents_however_its_text_was_encoded(tmp_path, kind):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": AS_TEXT[kind]}), path)
    assert list(read_documents(path, "text")) == ["a", "b", "a", "語"]


@pytest.mark.parametrize("column", (pyarrow.array([b"a"]), pyarrow.array([b"a"]).dictionary_encode()))
def test_bytes_are_no_text(column):
    with pytest.raises(DataError, match=r"data\.text_key=text is .*binary.* in x; it must be text"):
        list(texts_of(column))


def test_what_is_not_utf8_in_a_dictionary_is_found_by_its_records():
    raw = pyarrow.array([b"a", b"\xff"])
    values = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 0], pyarrow.int8()), values)
    with pytest.raises(DataError, match="x: record 1 is not UTF-8 at byte 0"):
        list(texts_of(column))
    bad = BadRecords("skip")
    assert list(column_texts(pyarrow.chunked_array([column, column]), "text", "x", bad)) == ["a"] * 4
    assert bad.counts == {"utf8": 2}


# Whatever else ----------------


def test_what_nobody_foresaw_in_a_file_is_told_with_its_name(tmp_path, monkeypatch):
    """Not as a fault of data.cache_dir, where nothing is wrong."""
    folder = write_texts(tmp_path / "texts", some_texts(20))

    def surprise(path, *rest):
        if path.name == "003.txt":
            raise KeyError("surprise")
        return read_documents(path, *rest)

    monkeypatch.setattr("data.sources.tfds_builders.read_documents", surprise)
    with pytest.raises(DataError, match=r"^data\.path: .*003\.txt cannot be read \(KeyError: 'surprise'\); "):
        list(documents(folder_config(folder, tmp_path / "cache"), "train"))
