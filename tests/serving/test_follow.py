"""Newer weights are taken once, in order, and what is damaged is left out by its reason."""

import threading
import time

from common.errors import RunFault
from serving.follow import Follower


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
        return f"weights of {step}", f"{step}-ab"

    follower = Follower(engine, 3, lambda: steps[-1] if steps else None, load)
    assert not follower.look()
    steps.append(4)
    assert follower.look() and not follower.look()
    steps.append(5)
    assert not follower.look() and not follower.look()
    assert capsys.readouterr().err.count("step 5 is left out: step 5: a digest differs") == 1
    steps.append(6)
    assert follower.look()
    steps.clear()
    assert not follower.look()
    assert engine.versions == [("weights of 4", "4-ab"), ("weights of 6", "6-ab")]


def test_a_directory_that_cannot_be_read_now_is_read_later(capsys):
    def newest():
        raise OSError("the file system is away")

    assert not Follower(Engine(), 0, newest, lambda step: ("", "")).look()
    assert "the file system is away; looked for again in 10 s" in capsys.readouterr().err


def test_it_looks_until_it_is_over():
    engine, over = Engine(), threading.Event()
    thread = threading.Thread(
        target=Follower(engine, 0, lambda: 1, lambda step: ("weights", "1-ab"), seconds=0.01).follow,
        args=(over,),
    )
    thread.start()
    end = time.monotonic() + 60
    while not engine.versions and time.monotonic() < end:
        time.sleep(0.01)
    over.set()
    thread.join()
    assert engine.versions == [("weights", "1-ab")]
