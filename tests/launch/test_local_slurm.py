"""What the Slurm for one command says where it cannot be had; that it works `make test-slurm` shows."""

from tests.slurm import local_slurm


def test_where_slurm_is_not_installed_the_command_that_does_is_said(monkeypatch, capsys):
    monkeypatch.setattr(local_slurm, "NEEDED", ("a_daemon_of_no_package",))
    assert local_slurm.main(["--", "true"]) == 2
    said = capsys.readouterr().err
    assert "a_daemon_of_no_package" in said and "apt-get install slurm-wlm munge" in said


def test_a_job_that_we_are_part_of_is_not_handed_on(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    environment = local_slurm.environment(tmp_path)
    assert [name for name in environment if name.startswith(("SLURM", "SBATCH"))] == ["SLURM_CONF"]


def test_nodes_have_ports_of_their_own(tmp_path):
    local_slurm.configure(tmp_path, ["n1", "n2"])
    text = (tmp_path / "slurm.conf").read_text()
    ports = [word for line in text.splitlines() for word in line.split() if word.startswith("Port=")]
    assert len(set(ports)) == 2
    assert (tmp_path / "munge.key").stat().st_mode & 0o777 == 0o600
