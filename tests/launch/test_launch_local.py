"""The launcher, with small programs for train.py: whose status, whose words, and nothing left running."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch.local import LaunchOptions, LocalJob, cause, environment, parse
from scripts.launch_local import main

ME = "import os, sys, time; me = int(os.environ['CAMBRIAN_PROCESS']); "


def options(processes=3, grace=5):
    return LaunchOptions(processes, 2, grace, [])


def run(code, **settings):
    return LocalJob(options(**settings), [sys.executable, "-c", ME + code]).run()


def test_words_are_the_launchers_or_train_s():
    got = parse(["--processes", "4", "+experiment=debug", "--devices-per-process=3", "--", "mesh.data=12"])
    assert got == LaunchOptions(4, 3, 30, ["+experiment=debug", "mesh.data=12"])
    assert [parse(["--processes", n]).devices for n in ("1", "2", "4", "8", "16")] == [8, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+experiment=debug"], "--processes is missing"),
        (["--processes"], "--processes=(nothing) must be a whole number"),
        (["--processes=0"], "--processes=0 must be a whole number from 1 to 256"),
        (["--processes=2", "--script=nothing.py"], "--script=nothing.py is no file"),
        (["--processes=2", "--devices-per-process=x"], "--devices-per-process=x must be"),
    ],
)
def test_what_is_wrong_with_them_is_one_line_and_status_2(words, said, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and not out


def test_each_process_gets_its_place_and_devices_of_its_own():
    base = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8 --b=2", "HOME": "/h"}
    got = environment(options(), 1, 4000, base)
    assert got["XLA_FLAGS"] == "--a=1 --b=2 --xla_force_host_platform_device_count=2"
    assert got["CAMBRIAN_COORDINATOR"] == "127.0.0.1:4000" and got["HOME"] == "/h"
    assert (got["CAMBRIAN_PROCESSES"], got["CAMBRIAN_PROCESS"], got["JAX_PLATFORMS"]) == ("3", "1", "cpu")


def test_all_done_is_0_with_rank_0_s_stdout_and_every_stderr_under_its_rank(capfdbinary):
    assert run("print('out', me); print('[Gloo] Rank 0'); print('err', me, file=sys.stderr)") == 0
    out, err = capfdbinary.readouterr()
    assert out == b"out 0\n"
    assert sorted(err.splitlines()) == [b"[0] err 0", b"[1] err 1", b"[2] err 2"]


def test_the_first_that_fails_ends_the_others_and_gives_the_status(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.local.FOLLOW_SECONDS", 0.5)
    began = time.monotonic()
    code = f"open(f'{tmp_path}/{{os.getpid()}}', 'w'); sys.exit(7) if me == 1 else time.sleep(60)"
    assert run(code) == 7
    assert time.monotonic() - began < 20
    assert_gone(int(path.name) for path in tmp_path.iterdir())


def test_those_who_come_to_the_same_end_may_say_so(capfdbinary):
    code = "time.sleep(0.3 * me); print('error', me, file=sys.stderr); sys.exit(2)"
    assert run(code) == 2
    assert len(capfdbinary.readouterr().err.splitlines()) == 3


def test_a_killed_rank_is_named(capfdbinary):
    assert run("os.kill(os.getpid(), 9) if me == 2 else time.sleep(60)") == 128 + 9
    assert b"rank 2 was ended by SIGKILL" in capfdbinary.readouterr().err


@pytest.mark.parametrize(
    ("failed", "wanted"),
    [
        ([(0, -signal.SIGABRT), (1, -signal.SIGKILL)], (1, -signal.SIGKILL)),
        ([(0, 75), (2, 1)], (2, 1)),
        ([(0, -signal.SIGKILL), (1, -signal.SIGABRT)], (0, -signal.SIGKILL)),
        ([(1, 75), (2, 75)], (1, 75)),
        ([(1, 2), (2, 7)], (1, 2)),
    ],
)
def test_of_ranks_that_end_between_two_looks_the_one_that_others_followed_gives_the_status(failed, wanted):
    assert cause(failed) == wanted


def assert_gone(pids):
    pids, end = list(pids), time.monotonic() + 10
    assert pids
    for pid in pids:
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < end, f"{pid} still runs"
            time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_of_them_and_what_they_started(number, tmp_path):
    """Each rank has a child, as data preparation has workers; rank 1 is deaf to all but SIGKILL."""
    child = f"import os, time; open(f'{tmp_path}/{{os.getpid()}}', 'w'); time.sleep(60)"
    code = (
        f"import signal, subprocess; open(f'{tmp_path}/{{os.getpid()}}', 'w'); "
        f"me == 1 and [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; "
        f"{number} == 9 or subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    script = (
        "import sys; from launch.local import LaunchOptions, LocalJob; "
        "sys.exit(LocalJob(LaunchOptions(2, 1, 1, []), [sys.executable, '-c', sys.argv[1]]).run())"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script, ME + code])
    end = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < (2 if number == signal.SIGKILL else 4):
        assert time.monotonic() < end and launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == (-9 if number == signal.SIGKILL else 128 + number)
    assert_gone(int(path.name) for path in tmp_path.iterdir())
