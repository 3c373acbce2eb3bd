import re

import fsspec
import pytest

from common.buckets import Bucket, is_remote
from common.errors import RunFault


def test_a_url_is_remote_and_a_path_is_not():
    assert [is_remote(x) for x in (None, "a/b", "/a", "s3://a/b", "file:///a")] == [False] * 3 + [True] * 2


def test_a_scheme_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(
        ValueError, match=re.escape("a.b=ftp://x has the scheme ftp; use s3://, gs:// or a path")
    ):
        Bucket("a.b", "ftp://x", RunFault, schemes=("s3", "gs"))
    with pytest.raises(ValueError, match="has the scheme file; use s3:// or a path"):
        Bucket("a.b", "file:///x", RunFault, schemes=("s3",))


def test_a_folder_is_opened_and_its_folders_are_made(tmp_path):
    fs, root = Bucket("a.b", f"file://{tmp_path}/x/", RunFault).open()
    assert root == str(tmp_path / "x")
    with fs.open(f"{root}/y/z", "wb") as file:
        file.write(b"text")
    assert (tmp_path / "x" / "y" / "z").read_bytes() == b"text"


def test_what_a_library_says_becomes_one_line_with_the_remedy(tmp_path, monkeypatch):
    url = f"file://{tmp_path}"
    bucket = Bucket("a.b", url, RunFault, ", then again")
    with pytest.raises(RunFault) as caught, bucket.plainly("read"):
        raise RuntimeError("no such bucket\nand more")
    assert str(caught.value) == (
        f"a.b={url} cannot be read (RuntimeError: no such bucket); check the bucket and folder, and the "
        "credentials (the permissions of the folder), then again"
    )
    with pytest.raises(FileNotFoundError), bucket.plainly("read", FileNotFoundError):
        raise FileNotFoundError
    with pytest.raises(RunFault, match="^already said$"), bucket.plainly("read"):
        raise RunFault("already said")

    def broken(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(fsspec.core, "url_to_fs", broken)
    with pytest.raises(RunFault, match=r"cannot be opened \(OSError: no route\)"):
        bucket.open()
