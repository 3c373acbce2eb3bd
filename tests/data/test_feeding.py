"""Batches ahead of the step: how many, in which thread, where the time goes; plans before they are due."""

import importlib
import threading
import time

import pytest

from data.loading.ahead import Ahead
from data.loading.input_timing import InputTiming, copying, stage
from data.loading.loader import Loader
from data.loading.prefetch import Prefetcher
from tests.data.test_loader import cached, same, streaming

SLOW = 0.03  # seconds: a hundred times what anything else here takes


class Counting(Loader):
    """Empty batches, counted."""

    def __init__(self):
        self.made = 0

    def batch(self, step, rows=None):
        self.made += 1
        return {"step": step}

    def state(self):
        return {}


def test_depth_bounds_how_far_ahead_batches_are_made_and_placed():
    loader, placed = Counting(), []

    def place(batch):
        placed.append((batch["step"], threading.current_thread()))
        return batch

    ahead = Prefetcher(loader, start=0, depth=3, place=place)
    taken = 5
    for step in range(taken):
        assert ahead.next()[0]["step"] == step
    time.sleep(0.1)
    most = taken + 3 + 1  # those waiting, and one in the thread's hand
    assert loader.made <= most
    ahead.close()
    assert [step for step, _ in placed] == list(range(len(placed))) and len(placed) <= most
    assert threading.current_thread() not in {thread for _, thread in placed}


def test_a_stage_within_another_counts_for_itself_alone():
    ticks = iter([0.0, 1.0, 3.0, 7.0])
    stages = InputTiming(clock=lambda: next(ticks))
    with stages.watching(), stage("fill"), stage("plan"):
        pass
    assert stages.take() == {"fill": 1.0 + 4.0, "plan": 2.0}
    assert stages.take() == {}
    with stage("fill"):  # nobody watches: nothing counts
        pass
    assert stages.take() == {}


def test_waiting_for_pages_of_the_disk_is_reading(monkeypatch):
    stages, faults = InputTiming(), iter([5, 6])
    monkeypatch.setattr("data.loading.input_timing._major_faults", lambda: next(faults))
    with copying(stages):
        time.sleep(SLOW)
    seconds = stages.take()
    assert seconds["read"] > seconds["fill"]


@pytest.mark.parametrize("slow", ["plan", "read", "tokenize", "fill", "place"])
def test_the_slow_stage_has_the_time(slow, prepared, streamed, corpus, monkeypatch):
    loader = streaming(streamed, corpus) if slow in ("read", "tokenize") else cached(prepared, corpus)
    owner, name = {
        "plan": ("data.loading.loader", "make_plan"),
        "read": (type(streamed.documents), "read"),
        "tokenize": (type(streamed.tokenizer), "encode_batch"),
        "fill": ("data.loading.loader", "fill"),
        "place": (Prefetcher, ""),
    }[slow]
    if name:
        delay(monkeypatch, owner, name)
    ahead = Prefetcher(loader, start=0, place=lambda batch: time.sleep(SLOW * (slow == "place")) or batch)
    ahead.next()
    ahead.close()
    assert max(ahead.stages, key=ahead.stages.get) == slow, ahead.stages


def delay(monkeypatch, owner, name):
    owner = importlib.import_module(owner) if isinstance(owner, str) else owner
    original = getattr(owner, name)

    def late(*given, **named):
        time.sleep(SLOW)
        return original(*given, **named)

    monkeypatch.setattr(owner, name, late)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_the_next_epochs_plan_is_made_ahead_and_changes_nothing(prepared, corpus, packing, monkeypatch):
    monkeypatch.setattr("data.loading.loader.NEAR", 1)  # as soon as an epoch begins
    ahead, threads = cached(prepared, corpus, packing=packing), []
    original = ahead._epochs[0]._made

    def made(epoch):
        threads.append((epoch, threading.current_thread()))
        return original(epoch)

    monkeypatch.setattr(ahead._epochs[0], "_made", made)
    steps = 0
    while len(ahead._epochs[0].kept) < 2 or 2 not in ahead._epochs[0].kept:
        batch = ahead.batch(steps)
        monkeypatch.setattr("data.loading.loader.NEAR", 10**9)
        assert same(batch, cached(prepared, corpus, packing=packing).batch(steps))
        monkeypatch.setattr("data.loading.loader.NEAR", 1)
        steps += 1
    here = threading.current_thread()
    assert [epoch for epoch, thread in threads if thread is here] == [0]
    assert {1, 2} <= {epoch for epoch, thread in threads if thread is not here}


def test_what_is_made_ahead_is_given_once_and_its_error_is_raised():
    ahead = Ahead()
    assert ahead.take(3) is None
    ahead.start(3, lambda: "plan")
    ahead.start(3, lambda: "another")  # under way: not made again
    assert ahead.take(4) is None
    assert ahead.take(3) == "plan"
    assert ahead.take(3) is None

    def broken():
        raise MemoryError("no room")

    ahead.start(5, broken)
    with pytest.raises(MemoryError, match="no room"):
        ahead.take(5)
