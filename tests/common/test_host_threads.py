"""Several CPU devices of one process do not wait for threads that wait for them."""

import os
import subprocess
import sys

import pytest

from common.host import EACH, XLA_THREADS, enough_threads
from tests.training.ground import ROOT

FORCED = "--xla_force_host_platform_device_count"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"XLA_FLAGS": f"{FORCED}=200 --xla_b=1"}, 200 * EACH),
        ({"XLA_FLAGS": f"{FORCED}=8 {FORCED}=300"}, 300 * EACH),  # the last one holds
        ({"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "200"}, 200 * EACH),
        ({"XLA_FLAGS": f"{FORCED}=200", XLA_THREADS: "3"}, None),  # as somebody asked for
        ({"XLA_FLAGS": f"{FORCED}=1"}, None),
        ({"XLA_FLAGS": ""}, None),
    ],
)
def test_forced_devices_get_several_threads_each(monkeypatch, environment, threads):
    before = environment.get(XLA_THREADS)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.setenv(XLA_THREADS, "")  # so that it is put back
    monkeypatch.delenv(XLA_THREADS)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert enough_threads() == threads
    assert os.environ.get(XLA_THREADS) == (before if threads is None else str(threads))


@pytest.mark.faults
@pytest.mark.slow
def test_a_step_that_held_all_threads_in_two_collectives_ends(ground):
    """With a thread for each device these eight wait for each other, on two cores, until XLA aborts them."""
    model = ("model.num_layers=8", "model.d_model=128", "model.num_kv_heads=8", "model.head_dim=16")
    words = ground.words("threads", *model, "model.d_ff=384", "data.seq_len=128", "mesh.fsdp=8")
    words += ["training.global_batch_size=128", "training.num_steps=2", "schedule.warmup_steps=1"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FORCED}=8"}
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in ground.rows("threads") if "loss" in row] == [1, 2]
