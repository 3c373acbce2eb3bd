"""How one job of a sweep ends in a process of its own, among clients of Slurm's that only write down."""

import pickle

import pytest

from configs.cli import main
from configs.swept_job import EndedElsewhere, end_elsewhere

CLIENT = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
[ "$(basename "$0")" = scontrol ] || echo "$STATE"
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A job of Slurm's, the last element of its array; what its clients are asked."""
    for name in ("squeue", "scontrol"):
        (tmp_path / name).write_text(CLIENT)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name, value in {"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def test_a_job_that_saved_at_a_notice_requeues_itself_and_leaves_no_result(calls, monkeypatch):
    monkeypatch.setenv("STATE", "RUNNING")
    with pytest.raises(SystemExit) as end:  # which no launcher takes for a result
        end_elsewhere(75)
    assert end.value.code == 75
    assert calls()[1:] == ["scontrol requeue 7_1"]  # 7 alone would be the whole array


def test_a_cancelled_job_does_not(calls, monkeypatch):
    monkeypatch.setenv("STATE", "COMPLETING")
    with pytest.raises(EndedElsewhere):
        end_elsewhere(75)
    assert [call.split()[0] for call in calls()] == ["squeue"]


def test_the_first_task_requeues_for_all(calls, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit):
        end_elsewhere(75)
    assert calls() == []


def test_other_statuses_come_back_to_the_sweep(calls, monkeypatch):
    assert end_elsewhere(0) is None
    for status in (1, 2):
        with pytest.raises(EndedElsewhere) as ended:
            end_elsewhere(status)
        assert pickle.loads(pickle.dumps(ended.value)).status == status
    assert calls() == []
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(EndedElsewhere):
        end_elsewhere(75)


def test_a_missing_launcher_is_named_with_its_install_command(monkeypatch, capsys):
    monkeypatch.setattr("configs.swept_job._installed", lambda: False)
    assert (
        main(lambda config: 0, ["-m", "+experiment=debug", "seed=0,1", "hydra/launcher=submitit_slurm"]) == 2
    )
    said = "hydra/launcher=submitit_slurm needs the extra `slurm`; install it with: pip install -e '.[slurm]'"
    assert said in capsys.readouterr().err


def test_a_sweep_that_slurm_does_not_take_is_one_line_of_slurm_s(monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("sbatch: error: fetch_config: failed\nsbatch: fatal: no configuration\n")

    monkeypatch.setattr("hydra.main", lambda **_: lambda job: refuse)
    assert main(lambda config: 0, ["-m", "+experiment=debug", "seed=0,1"]) == 2
    assert capsys.readouterr().err == "error: sbatch: fatal: no configuration\n"


def test_a_sweep_by_a_launcher_is_checked_before_it_starts(monkeypatch, capsys):
    monkeypatch.setattr("configs.swept_job._installed", lambda: True)
    words = ["-m", "+experiment=debug", "hydra/launcher=submitit_slurm"]
    assert main(lambda config: 0, [*words, "seed=0,0"]) == 2
    assert "two jobs of this sweep would share" in capsys.readouterr().err
