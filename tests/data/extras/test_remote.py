"""Folders in S3, served by moto on loopback: mirrored once, checked, and noticed when they change."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.curation.optimize import documents
from data.errors import DataError
from data.pipeline import prepare
from data.sources.array_record import text_record, write_prepared
from data.sources.remote import Mirror
from tests.data.corpora import BYTES, folder_config, some_texts, train_of, write_texts
from tests.data.extras import require
from tests.s3 import bucket

# protobuf 6.33 warns of what tfds's copy of an older json_format does.
pytestmark = pytest.mark.filterwarnings("ignore:label.* is deprecated")


@pytest.fixture
def s3(endpoint, monkeypatch):
    with bucket(endpoint, monkeypatch, "corpora") as fs:
        yield fs


def upload(fs: Any, folder: Path, remote: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe(f"{remote}/{path.relative_to(folder)}", path.read_bytes())


def s3_config(cache: Path, url: str = "s3://corpora/texts", **values: Any) -> DataConfig:
    defaults: dict[str, Any] = {
        "source": "folder",
        "validation_fraction": 0.3,
        "seq_len": 16,
        "workers": 2,
    }
    return DataConfig(path=url, cache_dir=str(cache), **(defaults | values))


@pytest.fixture
def texts(s3, tmp_path):
    folder = write_texts(tmp_path / "texts", some_texts(20))
    (folder / "deep").mkdir()
    (folder / "deep" / "x.jsonl").write_text('{"text": "below"}\n')
    upload(s3, folder, "corpora/texts")
    return folder


def counted(monkeypatch) -> list[str]:
    fetched: list[str] = []
    fetch = Mirror._fetch

    def counting(self: Mirror, name: str) -> dict[str, Any]:
        fetched.append(name)
        return fetch(self, name)

    monkeypatch.setattr(Mirror, "_fetch", counting)
    return fetched


def test_a_remote_folder_is_the_local_one_and_is_fetched_once(s3, texts, tmp_path, monkeypatch):
    fetched = counted(monkeypatch)
    remote = prepare(s3_config(tmp_path / "remote"), BYTES, progress=False)
    assert len(fetched) == 21
    local = prepare(folder_config(texts, tmp_path / "local"), BYTES, progress=False)
    assert remote.digest == local.digest
    assert (train_of(remote).path / "tokens.bin").read_bytes() == (
        train_of(local).path / "tokens.bin"
    ).read_bytes()
    prepare(s3_config(tmp_path / "remote"), BYTES, progress=False)
    assert len(fetched) == 21


def test_a_changed_object_is_noticed_and_a_removed_one_is_gone(s3, texts, tmp_path, monkeypatch):
    first = prepare(s3_config(tmp_path / "c"), BYTES, progress=False)
    fetched = counted(monkeypatch)
    s3.pipe("corpora/texts/000.txt", texts.joinpath("000.txt").read_text()[::-1].encode())  # as long
    changed = prepare(s3_config(tmp_path / "c"), BYTES, progress=False)
    assert fetched == ["000.txt"] and changed.digest != first.digest
    s3.pipe("corpora/texts/000.txt", texts.joinpath("000.txt").read_bytes())
    assert prepare(s3_config(tmp_path / "c"), BYTES, progress=False).digest == first.digest
    s3.rm("corpora/texts/001.txt")
    assert prepare(s3_config(tmp_path / "c"), BYTES, progress=False).digest != first.digest
    assert not list((tmp_path / "c" / "mirror").rglob("001.txt"))


def test_a_mirror_that_broke_off_goes_on(s3, texts, tmp_path, monkeypatch):
    fetch = Mirror._fetch

    def breaks(self, name):
        if name == "012.txt":
            raise DataError("the line went dead")
        return fetch(self, name)

    config = s3_config(tmp_path / "c", workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "_fetch", breaks)
        with pytest.raises(DataError, match="went dead"):
            prepare(config, BYTES, progress=False)
    notes = next((tmp_path / "c" / "mirror").rglob("mirror.jsonl"))
    notes.write_text(notes.read_text() + '{"name": "013')  # what a kill leaves
    fetched = counted(monkeypatch)
    prepared = prepare(config, BYTES, progress=False)
    assert sorted(fetched) == [*(f"{n:03d}.txt" for n in range(12, 20)), "deep/x.jsonl"][: len(fetched)]
    assert len(fetched) <= 9
    assert prepared.digest == prepare(folder_config(texts, tmp_path / "l"), BYTES, progress=False).digest


def test_a_byte_flipped_in_the_mirror_is_fetched_again(s3, texts, tmp_path, monkeypatch):
    first = prepare(s3_config(tmp_path / "c"), BYTES, progress=False)
    path = next((tmp_path / "c" / "mirror").rglob("003.txt"))
    stat = path.stat()
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a disk that rots sets no time
    fetched = counted(monkeypatch)
    assert prepare(s3_config(tmp_path / "c"), BYTES, progress=False).digest == first.digest
    assert fetched == ["003.txt"]


def test_a_file_that_arrives_damaged_is_refused(s3, texts, tmp_path, monkeypatch):
    s3fs = require("s3fs", "s3")
    get = s3fs.S3FileSystem._get_file

    async def damaged(self, remote, local, *args, **options):
        await get(self, remote, local, *args, **options)
        raw = bytearray(Path(local).read_bytes())
        raw[0] ^= 1
        Path(local).write_bytes(raw)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", damaged)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"did not arrive as the server has it \(md5\)"):
        prepare(s3_config(tmp_path / "c"), BYTES, progress=False)


@pytest.mark.parametrize("named", (True, False))
def test_a_prepared_dataset_in_a_bucket(s3, tmp_path, named):
    splits = {"train": map(text_record, map(str.encode, some_texts(30))), "validation": [text_record(b"h")]}
    write_prepared(tmp_path, "x", splits)
    upload(s3, tmp_path / "x", "corpora/x")
    where: dict[str, Any] = {"url": "s3://corpora", "name": "x"} if named else {"url": "s3://corpora/x/1.0.0"}
    config = s3_config(tmp_path / "c", source="tfds", **where)
    first = prepare(config, BYTES, progress=False)
    assert list(documents(config, "train")) == some_texts(30)
    shutil.rmtree(tmp_path / "x")
    changed = [text[::-1] for text in some_texts(30)]
    splits = {"train": map(text_record, map(str.encode, changed)), "validation": [text_record(b"h")]}
    write_prepared(tmp_path, "x", splits)
    upload(s3, tmp_path / "x", "corpora/x")
    assert prepare(config, BYTES, progress=False).digest != first.digest
    assert list(documents(config, "train")) == changed


def test_a_saved_hf_dataset_in_a_bucket(s3, tmp_path):
    datasets = require("datasets", "hf")
    datasets.Dataset.from_dict({"text": some_texts(30)}).save_to_disk(str(tmp_path / "saved"))
    upload(s3, tmp_path / "saved", "corpora/saved")
    slices: dict[str, Any] = {"train_split": "train[10:]", "validation_split": "train[:10]"}
    config = s3_config(tmp_path / "c", "s3://corpora/saved", source="hf", **slices)
    assert list(documents(config, "train")) == some_texts(30)[10:]


def test_what_is_not_there_is_one_line(s3, tmp_path, monkeypatch):
    def refused(url: str, match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            prepare(s3_config(tmp_path / "c", url), BYTES, progress=False)
        assert "\n" not in str(caught.value)

    refused("s3://no-such-bucket/texts", r"data\.path=s3://no-such-bucket/texts (cannot be read|holds no)")
    refused("s3://corpora/nothing", r"data\.path=s3://corpora/nothing holds no objects")
    s3.pipe("corpora/up/../../out.txt", b"x")
    refused("s3://corpora/up", "outside its folder")
    require("s3fs", "s3").S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    refused("s3://corpora/texts", r"cannot be read \(.*AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    require("s3fs", "s3").S3FileSystem.clear_instance_cache()
    refused("s3://corpora/texts", r"cannot be read \(.*AWS_PROFILE")
