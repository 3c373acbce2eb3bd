"""The trainer on a mixture with a curriculum, and on a stream whose shards move between processes."""

import pytest

from tests.training.test_processes import SMALL, assert_same_losses, finish, job
from training.loop import fit

MIXED = (
    *("+data.mixture.words.weight=[[0,1.0],[6,0.0]]", "+data.mixture.words.source=folder"),
    *("+data.mixture.again.weight=1.0", "+data.mixture.again.validation_fraction=0.3"),
    *("data.curriculum=[[0,4],[3,16]]", "data.packing=first_fit", "training.accumulation_steps=2"),
    "training.global_batch_size=16",
)
SHARDED = ("data.mode=streaming", "data.virtual_shards=4")


@pytest.mark.slow
def test_a_mixture_resumes_bitwise_and_says_its_shares_in_table_rows_and_summary(ground, capsys):
    fit(ground.config("mixed", *SMALL, *MIXED))
    said = capsys.readouterr().out
    shown = " ".join(said.split())
    assert "again 75.00% of rows" in shown and "words 25.00% of rows" in shown, said
    rows = ground.rows("mixed")
    held_out = [row for row in rows if "eval/loss" in row]
    shares = [(row["mixture/again"], row["mixture/words"]) for row in held_out]
    assert shares == [(0.625, 0.375), (0.75, 0.25)]
    # At the end of the schedule nothing of `words` is left, so the whole is the other.
    assert all(row["eval/loss"] == row["eval/again/loss"] != row["eval/words/loss"] for row in held_out)
    summary = ground.summary("mixed")
    assert summary["mixture"] == {"again": 0.75, "words": 0.25}
    assert summary["packing"] == "first_fit" and 0.9 < summary["rows_full"] <= 1.0
    whole = ground.record("mixed", 6)
    (ground.run("mixed") / "checkpoints" / "6").rename(ground.run("mixed") / "lost")
    (ground.run("mixed") / "summary.json").unlink()
    fit(ground.config("mixed", *SMALL, *MIXED))
    assert ground.record("mixed", 6)["digests"] == whole["digests"]
    assert ground.rows("mixed") == rows


@pytest.mark.slow
@pytest.mark.matrix
def test_a_sharded_stream_goes_from_two_processes_to_one_and_four(ground):
    fit(ground.config("shards-whole", *SMALL, *SHARDED, "training.num_steps=9"))
    finish(job(ground, 2, "shards", *SHARDED, "training.num_steps=3"))
    assert ground.record("shards", 3)["data"] == ground.record("shards-whole", 3)["data"]
    assert sorted(ground.record("shards", 3)["data"]["shards"]) == ["0", "1", "2", "3"]
    fit(ground.config("shards", *SMALL, *SHARDED, "training.num_steps=6"))
    finish(job(ground, 4, "shards", *SHARDED, "training.num_steps=9"))
    assert_same_losses(
        *([row for row in ground.rows(name) if "loss" in row] for name in ("shards", "shards-whole"))
    )
    assert ground.record("shards", 9)["data"] == ground.record("shards-whole", 9)["data"]
