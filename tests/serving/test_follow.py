"""Newer weights are taken once, in order, and what is damaged is left out by its reason."""

import threading
import time

from common.errors import RunFault
from serving.follow import Followed, Follower
from tests.serving.fake_engine import FakeEngine, served


class Engine:
    def __init__(self):
        self.versions = []

    def update(self, params, version):
        self.versions.append((params, version))


class Damaged(RunFault):
    status = 1


def test_newer_steps_are_taken_and_damaged_ones_named_once(capsys):
    engine, steps = Engine(), [3]

    def load(step):
        if step == 5:
            raise Damaged("step 5: a digest differs")
        return f"weights of {step}", f"{step}-ab", 100.0 * step

    follower = Follower(engine, 3, 300.0, lambda: steps[-1] if steps else None, load)
    assert not follower.look() and follower.followed == Followed(3, 300.0, 3)
    steps.append(4)
    assert follower.look() and not follower.look()
    assert follower.followed == Followed(4, 400.0, 4)
    steps.append(5)
    assert not follower.look() and not follower.look()
    assert follower.followed == Followed(4, 400.0, 5)  # and it is behind, whyever
    assert capsys.readouterr().err.count("step 5 is left out: step 5: a digest differs") == 1
    steps.append(6)
    assert follower.look()
    steps.clear()
    assert not follower.look() and follower.followed == Followed(6, 600.0, 6)
    assert engine.versions == [("weights of 4", "4-ab"), ("weights of 6", "6-ab")]


def test_a_server_that_follows_says_how_far_it_is_behind():
    def value(name, client):
        rows = [
            row
            for row in client.ask("/metrics")[1].splitlines()
            if row.startswith(f"cambrian_serving_{name}")
        ]
        return [float(row.rsplit(" ", 1)[1]) for row in rows]

    with served(FakeEngine()) as client:
        assert value("newest_step", client) == value("weights_age_seconds", client) == []
        began = time.time()
        client.service.metrics.followed = lambda: Followed(40, began - 1000, 60)
        assert (value("weights_step", client), value("newest_step", client)) == ([40], [60])
        (age,) = value("weights_age_seconds", client)
        assert 1000 <= age <= 1001 + time.time() - began
        client.service.metrics.followed = lambda: Followed(60, began + 1e6, 60)  # by a clock that goes before
        assert value("weights_age_seconds", client) == [0]


def test_a_directory_that_cannot_be_read_now_is_read_later(capsys):
    def newest():
        raise OSError("the file system is away")

    assert not Follower(Engine(), 0, 0.0, newest, lambda step: ("", "", 0.0)).look()
    assert "the file system is away; looked for again in 10 s" in capsys.readouterr().err


def test_it_looks_until_it_is_over():
    engine, over = Engine(), threading.Event()
    thread = threading.Thread(
        target=Follower(engine, 0, 0.0, lambda: 1, lambda step: ("weights", "1-ab", 1.0), 0.01).follow,
        args=(over,),
    )
    thread.start()
    end = time.monotonic() + 60
    while not engine.versions and time.monotonic() < end:
        time.sleep(0.01)
    over.set()
    thread.join()
    assert engine.versions == [("weights", "1-ab")]
