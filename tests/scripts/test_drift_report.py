"""The drift report: nothing where nothing moved, the name of what was moved where something did."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data.config import TokenizerConfig
from data.curation import drift
from data.curation.drift import StoreSample, compare, findings, sample
from data.curation.drift_page import page
from data.errors import DataError
from data.tokens.store import TokenStore
from data.tokens.tokenizer import train_tokenizer
from scripts.drift_report import beginnings, main

VOCABULARY = 60


def store(seed, documents=240, *, tilt=0.0, longer=1.0, path="corpus"):
    """Documents of random tokens, Zipf's; `tilt` of them are token 50, which is rare."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    lengths = (rng.lognormal(3.5, 0.4, documents) * longer).astype(int) + 5
    bodies = [rng.choice(VOCABULARY, n, p=shares / shares.sum()) for n in lengths]
    bodies = [np.where(rng.random(len(ids)) < tilt, 50, ids) for ids in bodies]
    framed = [np.concatenate([[VOCABULARY], ids, [VOCABULARY]]) for ids in bodies]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in framed])])
    sizes = np.r_[np.arange(VOCABULARY) % 5 + 1, 0].astype(np.int32)
    tokens = np.concatenate(framed).astype(np.uint16)
    num_bytes = int(sizes[tokens].sum())
    return TokenStore(Path(path), tokens, offsets, sizes, num_bytes, VOCABULARY, VOCABULARY)


def everything(one) -> StoreSample:
    return sample(one, one.num_documents, 0)


def compared(new, old=None):
    return compare(everything(old or store(0)), everything(new))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_another_sample_of_the_same_source_is_no_drift(seed):
    assert findings(compared(store(seed))) == []
    assert findings(compared(store(seed, documents=60))) == []  # a smaller one differs by more, and so may


def test_the_same_corpus_is_no_drift():
    assert findings(compared(store(0))) == []


def test_a_token_that_has_become_common_is_named():
    report = compared(store(1, tilt=0.1))
    risen = report["tokens"]["risen"][0]
    assert risen["id"] == 50 and risen["z"] > 10 and risen["new_ppm"] > 3 * risen["old_ppm"]
    found = findings(report)
    assert found and found[0].startswith("tokens:") and "50" in found[0]
    assert report["tokens"]["js_bits"]["value"] > report["tokens"]["js_bits"]["floor"]


def test_longer_documents_are_named_and_their_tokens_are_not():
    found = findings(compared(store(1, longer=2.0)))
    assert any(line.startswith("tokens: ks") for line in found)
    assert not any("Jensen" in line for line in found)


def test_tokens_that_old_lacks_are_counted():
    old = store(0)
    old.tokens[old.tokens == 7] = 8
    coverage = compared(store(1), old)["coverage"]
    assert coverage["new_token_kinds"] == 1
    new = store(1)
    inner = new.tokens[new.tokens != VOCABULARY]
    assert coverage["new_token_share"] == pytest.approx((inner == 7).mean())
    assert coverage["new_bytes_per_token"] == pytest.approx(new.token_bytes[inner].mean())


def test_divergences_and_gaps_are_those_of_the_papers():
    p, q = np.array([3.0, 1.0, 0.0]), np.array([1.0, 1.0, 2.0])
    m = np.array([0.5, 0.25, 0.25])
    by_hand = (
        0.75 * np.log2(0.75 / m[0]) + 0.0 + 0.25 * np.log2(0.25 / m[0]) + 0.5 * np.log2(0.5 / m[2])
    ) / 2
    assert drift.jensen_shannon(p, q) == pytest.approx(by_hand)
    assert drift.jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    a, b = (p + 0.5) / 5.5, (q + 0.5) / 5.5
    assert drift.kullback_leibler(p, q) == pytest.approx((a * np.log2(a / b)).sum())
    x, y = np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])
    assert drift.kolmogorov_smirnov(x, y)[0] == 0.5
    # The p-value of chance is uniform: of 400 comparisons, a twentieth is below 0.05.
    rng = np.random.default_rng(0)
    values = [drift.kolmogorov_smirnov(rng.random(80), rng.random(120))[1] for _ in range(400)]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09
    old = np.arange(1000.0)
    assert drift.stability_index(old, old) == 0
    half = np.repeat(np.arange(500.0), 2)  # five deciles doubled, five emptied to half a document
    expected = 5 * 0.1 * np.log(2) + 5 * (0.1 - 0.0005) * np.log(0.1 / 0.0005)
    assert drift.stability_index(old, half) == pytest.approx(expected, rel=1e-6)


def test_log_odds_know_how_sure_they_are():
    scores = drift.log_odds(np.array([1000.0, 10, 1, 0]), np.array([1000.0, 40, 4, 0]))
    assert scores[1] > scores[2] > 0 > scores[0]  # four times as often, but of fewer
    assert np.array_equal(drift.log_odds(np.ones(5), np.ones(5)), np.zeros(5))


def test_loss_is_taken_of_the_beginnings_of_documents():
    one = everything(store(0))
    batch = beginnings(one, 20, 16)
    first = one.store.document(int(one.index[0]))
    assert batch["tokens"].shape == (20, 16)
    assert np.array_equal(batch["tokens"][0, : len(first)], first[:16])
    assert np.all(batch["positions"][:, 1] == 1)


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    other = store(1)
    other.token_bytes[3] += 1
    with pytest.raises(DataError, match="different tokenizers"):
        compared(other)
    with pytest.raises(DataError, match="has 19 documents"):
        compared(store(0, documents=19))
    out = [f"out={tmp_path / 'd'}"]
    assert main([f"old={tmp_path / 'none'}", f"new={tmp_path}", *out]) == 2
    assert main([f"old={tmp_path}", f"new={tmp_path}", *out]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "does not exist" in errors[0] and "tokenizer=FILE" in errors[1]


def test_the_report_names_a_planted_shift_in_files_and_status(tmp_path, capsys):
    train_tokenizer((), TokenizerConfig(kind="byte")).save(tmp_path / "tokenizer.json")
    rng = np.random.default_rng(0)
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    for name, extra in (("old", []), ("new", ["##$"] * 3)):
        (tmp_path / name).mkdir()
        for i in range(60):
            text = " ".join(rng.choice(words + extra, rng.integers(20, 60)))
            (tmp_path / name / f"{i}.txt").write_text(text)
    options = [f"tokenizer={tmp_path / 'tokenizer.json'}", f"cache_dir={tmp_path / 'cache'}"]
    old, new = f"old={tmp_path / 'old'}", f"new={tmp_path / 'new'}"
    assert main([old, new, f"out={tmp_path / 'moved'}", *options]) == 3
    assert "drift in tokens" in capsys.readouterr().out
    report = json.loads((tmp_path / "moved.json").read_text())
    assert {token["text"] for token in report["tokens"]["risen"][:2]} == {"#", "$"}
    text = (tmp_path / "moved.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', text)) == 2 and "http" not in text
    assert report["verdict"].split(": ")[0].removeprefix("drift in ") in text

    assert main([old, f"new={tmp_path / 'old'}", f"out={tmp_path / 'same'}", *options]) == 0
    assert "no drift beyond chance" in capsys.readouterr().out


def test_the_page_shows_losses_where_there_are_some():
    report = compared(store(1))
    for token in (*report["tokens"]["risen"], *report["tokens"]["fallen"]):
        token["text"] = "$^{\n<b>"  # neither mathematics nor markup
    rows = {"old_rows": [1.0, 2.0], "new_rows": [2.0, 3.0]}
    loss = {"old": 1.5, "new": 2.5, "difference": 1.0, "interval": [0.5, 1.5], **rows}
    made = {"verdict": "drift", "drifted": ["loss: <up>"], "corpora": {}, "loss": loss, **report}
    text = page(made)
    assert text.count("data:image/png") == 3 and "&lt;up&gt;" in text and "<up>" not in text
