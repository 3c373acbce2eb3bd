"""Notices to leave: what they do inside of the steps, outside, and the second time."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from common.errors import Ended
from parallel import processes
from parallel.config import MeshConfig
from parallel.mesh import build_layout
from tests.training.ground import ROOT
from training.safety.signals import SIGNALS, VOTE, Notices, Stopping


@pytest.fixture
def several(monkeypatch):
    """Two processes, the other of which says what the test has it say."""
    said = []
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "exchange", lambda name, value: [value, *said])
    return said


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_the_steps_a_notice_ends_the_command_where_it_is(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, Notices():
        os.kill(os.getpid(), number)
    assert isinstance(caught.value, Ended) == (number != signal.SIGINT)
    assert getattr(caught.value, "status", 130) == (130 if number == signal.SIGINT else 75)
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_notice_ends_a_process_whose_main_thread_hangs(number):
    """The main thread is deaf, as it is inside of a collective that never ends."""
    code = f"""
import os, signal, time
from training.safety.signals import SIGNALS, Notices
with Notices() as notices, notices.steps():
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.kill(os.getpid(), {int(number)})
    while notices.name is None:
        time.sleep(0.01)
    os.kill(os.getpid(), {int(signal.SIGTERM)})
    time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 75
    assert ended.stderr == f"SIGTERM after {signal.Signals(number).name}: leaving at once\n"


def test_alone_the_next_step_is_the_last_and_replicas_go_on_to_their_outer_step():
    notices = Notices()
    stopping, apart = Stopping(notices, None, 1), Stopping(notices, None, 4)
    assert stopping.ballot({}) == {} and not stopping.agreed(3, {}) and not apart.agreed(4, {})
    notices.name = "SIGTERM"
    assert stopping.agreed(3, {})
    assert [apart.agreed(step, {}) for step in (5, 6, 7, 8)] == [False, False, False, True]


def test_several_stop_where_one_voted_so_whoever_it_was(several):
    mesh = build_layout(MeshConfig(data=-1)).mesh
    notices = Notices()
    stopping = Stopping(notices, mesh, 1)
    assert not np.asarray(stopping.ballot({})[VOTE]).any()
    assert not stopping.agreed(1, {}) and not stopping.agreed(2, {VOTE: 0}) and stopping.agreed(3, {VOTE: 1})
    several.append("SIGUSR2")
    assert str(stopping.said(3)) == "SIGUSR2; saved at step 3, from where the same command goes on"
    notices.name = "SIGTERM"
    assert np.asarray(stopping.ballot({})[VOTE]).tolist() == [1] * mesh.size


def test_replicas_that_step_alone_ask_each_other_at_outer_steps(several):
    stopping = Stopping(Notices(), None, 2)
    several.append(None)
    assert not stopping.agreed(2, {})
    several[:] = ["SIGTERM"]
    assert not stopping.agreed(3, {}) and stopping.agreed(4, {})
