import hashlib
import os
import threading

import pytest

from common.files import file_digest, lock, replacing, text_digest, write_text


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_whole(tmp_path, durable, shared):
    path = tmp_path / "a.json"
    for text in ("first", "séconde\n"):
        write_text(path, text, durable=durable, shared=shared)
        assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_breaks_off_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"] and path.read_text() == "old"


def test_a_durable_file_and_its_name_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.readlink(f"/proc/self/fd/{fd}")))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("named"), replace(a, b)))
    write_text(tmp_path / "a", "text", durable=True)
    assert done == [str(tmp_path / ".a.tmp"), "named", str(tmp_path)]
    done.clear()
    write_text(tmp_path / "a", "text")
    assert done == ["named"]


def test_writers_that_share_a_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a", shared=True) as one, replacing(tmp_path / "a", shared=True) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one"  # who is ready last


def test_digests_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes("é\n".encode())
    wanted = hashlib.sha256("é\n".encode()).hexdigest()
    assert file_digest(tmp_path / "a") == text_digest("é\n") == wanted


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    path, order = tmp_path / ".lock", []
    held = lock(path, wait=False)
    with pytest.raises(BlockingIOError):
        lock(path, wait=False)
    waiter = threading.Thread(target=lambda: order.append(os.close(lock(path, wait=True))))
    waiter.start()
    order.append("first")
    os.close(held)
    waiter.join(30)
    assert order == ["first", None]
