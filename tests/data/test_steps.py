"""Steps between a corpus and its documents: each keeps its law, and the report adds up."""

import copy
import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.curation.passes as passes
from configs.cli import main
from data.cache import verify
from data.config import DataConfig
from data.curation.base import DocumentTable as Seen
from data.curation.config import (
    FEATURES,
    PII_KINDS,
    DedupExact,
    FilterQuality,
    MaskPII,
    StratifiedSample,
    parse_steps,
)
from data.curation.dedup import Clusters, DedupExactStep, chance, choose_bands, normalized
from data.curation.optimize import OptimizedCorpus, documents
from data.curation.page import page
from data.curation.pii import MaskPIIStep
from data.curation.quality import FilterQualityStep, features
from data.curation.report import check_report, line_of
from data.curation.sample import SampleStep
from data.errors import DataError
from data.pipeline import prepare
from data.sources.corpus import Corpus
from scripts.data_report import data_report
from tests.data.corpora import BYTES, folder_config, some_texts, write_texts

SPLITS = ("train", "validation")
PROSE = "The cat sat with the dog, and that was to be the end of it. Nobody had to go. They have it."
STEPS: list[dict[str, Any]] = [
    {"step": "filter_length", "min_words": 5},
    {"step": "filter_quality", "max": {"digits": 0.3}},
    {"step": "mask_pii"},
    {"step": "dedup_exact"},
    {"step": "compress", "codec": "zstd", "level": 5},
    {"step": "shard", "documents": 7},
]


def texts_with_faults() -> list[str]:
    rng = random.Random(3)
    words = PROSE.split()
    good = [f"{' '.join(rng.choices(words, k=30))} mail{n}@example.org" for n in range(60)]
    short = [f"short {n}" for n in range(8)]
    digits = [f"numbers {n} " + "1234567890 " * 20 for n in range(6)]
    spaced = [text.replace(" ", "  \n") for text in good[:9]]
    return good + short + digits + spaced


def write_records(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[DataConfig, OptimizedCorpus, dict[str, Any]]:
    """A corpus with faults of every kind, and what the steps make of it."""
    root = tmp_path_factory.mktemp("steps")
    write_records(root / "texts" / "a.jsonl", texts_with_faults())
    config = folder_config(root / "texts", root / "cache", steps=STEPS, validation_fraction=0.2)
    corpus = OptimizedCorpus(config)
    corpus.ensure()
    report = corpus.report()
    assert report is not None
    return config, corpus, report


def seen(signatures: np.ndarray, is_train: list[bool]) -> Seen:
    return Seen(signatures, np.array(is_train), lambda row: "")


# The configuration


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"step": "filter_qualty"}, "did you mean filter_quality?"),
        ({"step": "sample", "fracton": 0.5}, "data.steps[0].fracton is no parameter of sample; did you mean"),
        ({"step": "sample"}, "data.steps[0] (sample) needs fraction"),
        ({"step": "sample", "fraction": 0}, "fraction=0.0 must be above 0"),
        ({"step": "sample", "fraction": 0.5, "seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"step": "filter_length", "min_words": True}, "min_words=True must be a whole number"),
        ({"step": "filter_length"}, "filter_length has no bound"),
        ({"step": "filter_length", "min_words": 9, "max_words": 8}, "min_words=9 is more than max_words=8"),
        ({"step": "filter_quality", "max": {"digit": 0.1}}, "max.digit is no feature; did you mean digits?"),
        ({"step": "filter_quality", "preset": "gophr"}, "did you mean gopher?"),
        ({"step": "filter_quality", "min": {"digits": float("nan")}}, "must be a number"),
        ({"step": "filter_language", "keep": []}, "keep is empty"),
        ({"step": "filter_learned", "good": "g", "bad": "b"}, "give either keep"),
        ({"step": "mask_pii", "kinds": ["mail"]}, "did you mean email?"),
        ({"step": "dedup_minhash", "threshold": 1.5}, "threshold=1.5"),
        ({"step": "compress", "codec": "zstd", "level": 23}, "level=23 must be from 1 to 22"),
        ({"step": "compress", "codec": "none", "level": 3}, "level=3 has no effect"),
        ({"step": "shard"}, "shard has no bound"),
        ("dedup_exact", "names no step"),
    ],
)
def test_a_wrong_step_is_one_line_that_names_it(entry, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        DataConfig(steps=[entry])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("data.steps[0]")


def test_presets_bind_unless_an_own_threshold_is_given():
    (step,) = parse_steps(
        [{"step": "filter_quality", "preset": "gopher", "min": {"words": 1, "stop_words": None}}]
    )
    assert isinstance(step, FilterQuality)
    limits = step.limits()
    assert limits["words"] == (1, 100_000)
    assert "stop_words" not in limits
    assert limits["mean_word_length"] == (3, 10)


def test_no_steps_leave_a_corpus_as_it_was(corpus, prepared):
    plain = folder_config(*corpus, steps=[])
    assert Corpus(plain).digest == Corpus(folder_config(*corpus)).digest
    again = prepare(plain, BYTES, progress=False)
    assert again.digest == prepared.digest
    assert again.description == prepared.description


def test_the_digest_covers_source_steps_and_their_order(built, tmp_path):
    config, corpus, _ = built

    def digest(steps: list[Any]) -> str:
        return OptimizedCorpus(
            folder_config(Path(str(config.path)), tmp_path, steps=steps, validation_fraction=0.2)
        ).digest

    assert digest(STEPS) == corpus.digest
    others = [digest(STEPS[1:]), digest(STEPS[::-1]), digest([{**STEPS[0], "min_words": 6}, *STEPS[1:]])]
    assert len({corpus.digest, *others}) == 4


# The derived corpus and its report


def test_the_result_is_a_tfds_directory_of_what_was_kept(built):
    config, corpus, report = built
    before = {split: list(documents(folder_config_of(config), split)) for split in SPLITS}
    after = {split: list(corpus.split(split)) for split in SPLITS}
    for split in SPLITS:
        masked = [re.sub(r"mail\d+@example.org", "<EMAIL>", text) for text in before[split]]
        kept = iter(masked)
        assert after[split]
        assert all(text in kept for text in after[split])  # in the order of the source
        assert [len(before[split]), len(after[split])] == report["corpus"]["documents"][split]
    directory = corpus.split("train").directory
    assert (directory / "dataset_info.json").exists()
    shards = sorted(path.name for path in directory.glob("optimized-train*"))
    count = -(-len(after["train"]) // 7)
    assert shards == [f"optimized-train.array_record-{n:05d}-of-{count:05d}" for n in range(count)]
    assert report["corpus"]["details"]["shards"]["train"][:-1] == [7] * (count - 1)
    verify(corpus.directory)


def folder_config_of(config: DataConfig) -> DataConfig:
    return folder_config(Path(str(config.path)), Path(config.cache_dir), validation_fraction=0.2)


def test_training_reads_what_the_steps_left(built):
    config, corpus, report = built
    lines: list[str] = []
    prepared = prepare(config, BYTES, progress=False)
    assert prepared.train is not None
    texts = [prepared.tokenizer.decode(ids[1:-1]) for ids in prepared.train.framed()]
    assert texts == list(corpus.split("train"))
    assert prepared.description["train"]["documents"] == report["corpus"]["documents"]["train"][1]
    assert prepared.description["documents_path"] == str(corpus.directory)
    lines += corpus.lines()
    assert [line.split(":")[0] for line in lines[:-1]] == [step["step"] for step in STEPS]


def test_every_drop_has_a_reason_and_each_step_begins_where_the_last_ended(built):
    _, _, report = built
    check_report(report)
    by_step = {step["step"]: step for step in report["steps"]}

    def dropped(name: str) -> Counter[str]:
        return sum((Counter(by_step[name]["reasons"][split]) for split in SPLITS), Counter())

    assert dropped("filter_length") == {"min_words": 8}
    assert dropped("filter_quality") == {"max_digits": 6}
    assert sum(dropped("dedup_exact").values()) == 9
    assert by_step["mask_pii"]["counts"] == {"email": 69}


@pytest.mark.parametrize("path", ["documents", "bytes", "reasons", "histograms", "corpus"])
def test_a_report_that_does_not_add_up_is_refused(built, path):
    report = copy.deepcopy(built[2])
    if path == "corpus":
        report["corpus"]["documents"]["train"][1] += 1
    elif path == "reasons":
        report["steps"][0]["reasons"]["train"]["min_words"] += 1
    elif path == "histograms":
        report["steps"][1]["histograms"]["digits"]["before"][0] += 1
    else:
        report["steps"][1][path]["validation"][0] += 1
    with pytest.raises(DataError, match="does not add up"):
        check_report(report)


def test_workers_and_jobs_do_not_change_a_byte(built, tmp_path, monkeypatch):
    config, corpus, _ = built
    monkeypatch.setattr(passes, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(passes, "JOB_BYTES", 1 << 10)
    again = OptimizedCorpus(dataclasses.replace(config, cache_dir=str(tmp_path), workers=2))
    again.ensure()
    manifests = [json.loads((each.directory / "manifest.json").read_text()) for each in (corpus, again)]
    assert manifests[0] == manifests[1]
    assert len(manifests[0]["files"]) > 6


def test_the_page_is_one_file_and_escapes_documents(built):
    _, corpus, report = built
    text = (corpus.directory / "report.html").read_text("utf-8")
    assert text.count("data:image/png;base64,") >= 5
    assert not re.search(r"""(?:src|href)=['"](?!data:)""", text)
    evil = copy.deepcopy(report)
    evil["steps"][0]["examples"][0]["text"] = "<script>alert('x')</script>"
    evil["steps"][0]["reasons"]["train"] = {"$min<b>": 1}
    evil["steps"] = evil["steps"][:1]
    made = page(evil)
    assert "<script>" not in made
    assert "&lt;script&gt;" in made


def test_examples_are_few_short_and_hide_what_the_corpus_hides(tmp_path):
    texts = [f"{PROSE} {PROSE} mail{n}@example.org " + "word " * 200 * (n % 2) for n in range(50)]
    write_records(tmp_path / "texts" / "a.jsonl", texts)
    steps = [{"step": "filter_length", "max_words": 100}, {"step": "mask_pii"}]
    corpus = OptimizedCorpus(folder_config(tmp_path / "texts", tmp_path / "cache", steps=steps))
    corpus.ensure()
    text = (corpus.directory / "report.json").read_text("utf-8")
    report = json.loads(text)
    assert "@example.org" not in text
    examples = [example for step in report["steps"] for example in step["examples"]]
    assert [len(step["examples"]) for step in report["steps"]] == [10, 10]
    assert all(len(example["text"]) < 420 for example in examples)
    assert any("<EMAIL>" in example["text"] for example in examples)


def test_a_damaged_corpus_is_made_again_and_the_reason_said(tmp_path):
    write_texts(tmp_path / "texts", some_texts(40))
    config = folder_config(tmp_path / "texts", tmp_path / "cache", steps=[{"step": "dedup_exact"}])
    corpus = OptimizedCorpus(config)
    assert corpus.ensure() is None
    texts = list(corpus.split("train"))
    shard = next(corpus.directory.rglob("*train*00000*"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(bytes(raw))
    assert shard.name in str(OptimizedCorpus(config).ensure())
    assert list(OptimizedCorpus(config).split("train")) == texts


def test_steps_that_leave_nothing_are_refused_and_leave_nothing_behind(tmp_path):
    write_texts(tmp_path / "texts", some_texts(40))
    steps = [{"step": "dedup_exact"}, {"step": "filter_length", "min_words": 100_000}]
    config = folder_config(tmp_path / "texts", tmp_path / "cache", steps=steps)
    with pytest.raises(DataError, match=r"data.steps\[1\] \(filter_length\) leaves no validation documents"):
        OptimizedCorpus(config).ensure()
    assert len(list((tmp_path / "cache" / "documents").iterdir())) == 1  # the source's


@pytest.mark.parametrize("codec", ["brotli", "snappy", "none"])
def test_records_of_every_compression_are_read_through_tfds(codec, tmp_path):
    texts = some_texts(40, longest=300)
    write_texts(tmp_path / "texts", texts)
    steps = [{"step": "compress", "codec": codec, "group": 4}, {"step": "shard", "megabytes": 0.004}]
    corpus = OptimizedCorpus(folder_config(tmp_path / "texts", tmp_path / "cache", steps=steps))
    corpus.ensure()
    found = [text for split in SPLITS for text in corpus.split(split)]
    assert sorted(found) == sorted(texts)
    report = corpus.report()
    assert report is not None
    assert len(report["corpus"]["details"]["shards"]["train"]) > 1
    assert report["steps"][0]["details"]["file_bytes"] == sum(
        path.stat().st_size for path in corpus.split("train").directory.glob("*.array_record*")
    )


def test_the_errand_prints_the_table_and_where_the_page_lies(tmp_path, monkeypatch, capsys):
    write_texts(tmp_path / "texts", some_texts(40))
    monkeypatch.chdir(tmp_path)
    words = ["+experiment=debug", "data=folder", "data.path=texts", "data.validation_fraction=0.3"]
    assert main(data_report, [*words, "data.steps=[{step: dedup_exact}]"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^dedup_exact +train +(\d+) +\1 ", out, re.MULTILINE)
    where = re.search(r"^page: (.*)$", out, re.MULTILINE)
    assert where and Path(where[1]).read_text("utf-8").startswith("<!doctype html>")
    assert main(data_report, words) == 2
    assert "data.steps is empty" in capsys.readouterr().err


# Sampling


@pytest.mark.parametrize("fraction", [0.013, 0.25, 0.5, 0.999, 1.0])
def test_each_stratum_keeps_its_share_to_within_one_document(fraction):
    sizes = {"en": 700, "de": 199, "tiny": 1, "pair/a": 2, "pair/b": 3}
    step = SampleStep(StratifiedSample(fraction=fraction, by="source"))
    values = [name for name, size in sizes.items() for _ in range(size)]
    texts = [f"document {n}" for n in range(len(values))]
    decision = step.decide(seen(step.sign(texts, values), [True] * len(texts)))
    kept = Counter(value for value, keep in zip(values, decision.keep, strict=True) if keep)
    assert all(abs(kept[name] - fraction * size) < 1 for name, size in sizes.items())
    assert sum(kept.values()) == round(fraction * len(values))


def test_a_sample_is_the_same_whatever_the_order_and_another_with_another_seed():
    texts = [f"document {n}" for n in range(500)]

    def kept(texts: list[str], seed: int) -> set[str]:
        step = SampleStep(StratifiedSample(fraction=0.2, seed=seed))
        decision = step.decide(seen(step.sign(texts, [""] * len(texts)), [True] * len(texts)))
        return {text for text, keep in zip(texts, decision.keep, strict=True) if keep}

    assert kept(texts, 1) == kept(texts[::-1], 1)
    assert len(kept(texts, 1) & kept(texts, 2)) < 60  # of 100, about 20 by chance


def test_strata_of_paths_are_their_first_parts(tmp_path):
    for name, count in (("en/a", 50), ("en/b", 30), ("de/c", 20)):
        write_records(tmp_path / "texts" / f"{name}.jsonl", [f"{name} number {n}" for n in range(count)])
    steps = [{"step": "sample", "fraction": 0.5, "by": "path", "depth": 1}]
    config = folder_config(tmp_path / "texts", tmp_path / "cache", steps=steps)
    plain = folder_config(tmp_path / "texts", tmp_path / "cache")
    source = Counter(text[:2] for text in documents(plain, "train"))
    kept = Counter(text[:2] for text in documents(config, "train"))
    assert set(kept) == {"en", "de"}
    report = OptimizedCorpus(config).report()
    assert report is not None
    assert report["steps"][0]["details"]["strata"] == {name: [source[name], kept[name]] for name in source}
    held_out = [list(documents(each, "validation")) for each in (plain, config)]
    assert held_out[0] == held_out[1]
    assert all(abs(kept[name] - source[name] / 2) < 1 for name in source)
    with pytest.raises(DataError, match="by=lang is no field of .*; it has path, text"):
        OptimizedCorpus(
            folder_config(tmp_path / "texts", tmp_path / "c", steps=[{**steps[0], "by": "lang"}])
        ).ensure()


# Duplicates


def test_the_first_of_equal_documents_stays_and_validation_comes_first():
    texts = ["same  text", "other", "same\ntext", "other", "caf\u00e9", "cafe\u0301", "new"]
    is_train = [False, False, True, True, True, True, True]
    step = DedupExactStep(DedupExact())
    decision = step.decide(seen(step.sign(texts, [""] * 7), is_train))
    assert decision.keep.tolist() == [True, True, False, False, True, False, True]
    assert [decision.reasons[decision.reason[row]] for row in (2, 3, 5)] == [
        "duplicate_of_validation",
        "duplicate_of_validation",
        "duplicate",
    ]
    assert decision.details["train_documents_like_validation"] == 2
    exact = DedupExactStep(DedupExact(normalize=False))
    assert exact.decide(seen(exact.sign(texts, [""] * 7), is_train)).keep.tolist()[2:6] == [
        True,
        False,
        True,
        True,
    ]
    assert normalized(" a\t\u0065\u0301\n") == "a \u00e9"


def test_clusters_are_the_connected_components_of_pairs_that_share_a_key():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 12, (60, 3)).astype(np.uint64)
    alike = rng.random((60, 60)) < 0.06
    alike |= alike.T
    clusters = Clusters(60, 0.5, lambda a, b: float(alike[a, b]))
    for band in range(3):
        clusters.join(keys[:, band])
    parent = list(range(60))

    def root(row: int) -> int:
        return row if parent[row] == row else root(parent[row])

    for a in range(60):
        for b in range(a):
            if alike[a, b] and (keys[a] == keys[b]).any() and root(a) != root(b):
                parent[max(root(a), root(b))] = min(root(a), root(b))
    assert [clusters.find(row) for row in range(60)] == [root(row) for row in range(60)]
    assert len(set(map(root, range(60)))) > 2


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_what_they_promise_with_as_many_rows_as_they_can(threshold):
    bands, rows = choose_bands(threshold, 256, 0.99)
    assert bands * rows <= 256
    assert chance(threshold, bands, rows) >= 0.99
    assert chance(threshold, 256 // (rows + 1), rows + 1) < 0.99


# Filters


def test_features_are_what_their_names_say():
    values = features(PROSE)
    assert set(values) == set(FEATURES)
    assert values["words"] == 22
    assert values["sentences"] == 3
    assert values["stop_words"] == 8
    assert values["punctuated_lines"] == 1
    found = features("- one\n- one\n* two...\nA LONG LINE THAT HAS MORE THAN THIRTY CHARACTERS\n\n12 {#}")
    assert found["lines"] == 5
    assert found["bullet_lines"] == 3 / 5
    assert found["ellipsis_lines"] == 1 / 5
    assert found["duplicate_lines"] == 1 / 5
    assert found["short_lines"] == 4 / 5
    assert found["braces"] == 1
    repeated = features("one two three four five six " * 2)
    assert repeated["duplicate_5grams"] == 0.5
    assert all(0 <= value for value in features("").values())
    assert all(
        0 <= features("a b a b a b a b")[name] <= 1 for name in ("top_bigram", "unique_words", "digits")
    )


def test_a_document_is_dropped_for_the_feature_that_is_out_of_bounds():
    step = FilterQualityStep(FilterQuality(preset="gopher", min=(("words", 10.0),)))
    assert step.apply(PROSE).reason is None
    assert step.apply("the and 1234 4567 7890 2345 3456 5678 8901 1111").reason == "min_alphabetic_words"
    assert step.apply("the and of " + "extraordinarilylong " * 20).reason == "max_mean_word_length"
    assert step.apply("the").reason == "min_words"


# Personal data

PERSONAL = {
    "a.b+c@mail.example.org.": "<EMAIL>.",
    "<X_y@uni-x.de>": "<<EMAIL>>",
    "call +49 30 1234567 now": "call <PHONE> now",
    "+1 (212) 555-0123": "<PHONE>",
    "+33 1 23 45 67 89": "<PHONE>",
    "+442079460958": "<PHONE>",
    "(212) 555-0123, 212-555-0123 or 1-212-555-0123": "<PHONE>, <PHONE> or <PHONE>",
    "Tel: 030 / 123 45 67": "Tel: <PHONE>",
    "Tel. 030-1234567": "Tel. <PHONE>",
    "from 8.8.8.8, 1.2.3.4": "from <IP>, <IP>",
    "66.249.65.107 - - [x]": "<IP> - - [x]",
    "http://8.8.8.8/x": "http://<IP>/x",
    "8.8.4.4:443": "<IP>:443",
    "2001:4860:4860::8888": "<IP>",
    "4111 1111 1111 1111": "<CARD>",
    "4111-1111-1111-1111": "<CARD>",
    "4111111111111111.": "<CARD>.",
    "3782 822463 10005": "<CARD>",
    "2221 0000 0000 0009": "<CARD>",
    "IBAN DE89 3704 0044 0532 0130 00 BIC": "IBAN <IBAN> BIC",
    "GB29NWBK60161331926819": "<IBAN>",
    "https://user:pa55@host.org/x": "https://<CREDENTIALS>@host.org/x",
    "AKIA" + "IOSFODNN7EXAMPLE": "<SECRET>",
    "ghp_" + "a1B2" * 9: "<SECRET>",
    "-----BEGIN RSA " + "PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----": "<SECRET>",
}
IMPERSONAL = """
version 1.2.3.4|v1.2.3.4|v. 2.0.0.1|pkg==1.2.3.4|pkg-1.2.3.4|rev 1.2.3.4.5|1.2.3.4 Title Here|## 3.1.2.1 Scope
127.0.0.1|192.168.1.1|10.0.0.1|203.0.113.5|300.1.1.1|0x1.2.3.4|fe80::1|::1|00:1b:44:11:3a:b7|std::vec::add|12:30:45
2024-01-15|15.01.2024|2019-2020-2021|20240115123045|2024-11-24 18:06:35+00:00
978-3-16-148410-0|ISBN 9783161484100|0-306-40615-2|ISBN 978 0 306 40615 7|doi:10.1000/182|arXiv:2112.11446
4111 1111 1111 1112|1234567890123456|0.4111111111111111|3.14159265358979|1,234,567,890|1.234.567.890
123-456-7890|555-0123|+12|+1.5|1e+10|10 + 20 30 40|x = a+123456789|tel. 5|030 1234567|(200) 300 400
@property|user@host|git@github|http://host:8080/a@b|a@b@c.org|DE00 3704 0044 0532 0130 00|sk-learn|a[1:2:3]
"""


@pytest.mark.parametrize("text", PERSONAL)
def test_what_gives_somebody_away_is_masked_and_masking_twice_changes_nothing(text):
    step = MaskPIIStep(MaskPII(kinds=PII_KINDS))
    outcome = step.apply(text)
    assert outcome.text == PERSONAL[text]
    assert sum(outcome.counts.values()) == len(re.findall(r"<[A-Z]+>", outcome.text))
    assert step.apply(outcome.text).text == outcome.text


@pytest.mark.parametrize(
    "text", [each for line in IMPERSONAL.strip().split("\n") for each in line.split("|")]
)
def test_versions_dates_and_numbers_are_left_alone(text):
    outcome = MaskPIIStep(MaskPII(kinds=PII_KINDS)).apply(text)
    assert outcome.text == text
    assert not outcome.counts


def test_only_the_kinds_that_were_asked_for_are_masked():
    text = "a@example.org 8.8.8.8"
    assert MaskPIIStep(MaskPII(kinds=("ip",))).apply(text).text == "a@example.org <IP>"


def test_a_line_on_a_step_says_what_went_and_why():
    step = {
        "step": "dedup_exact",
        "documents": {"train": [1000, 900], "validation": [10, 10]},
        "reasons": {"train": {"duplicate": 99, "duplicate_of_validation": 1}, "validation": {}},
        "counts": {},
        "details": {},
    }
    assert line_of(step) == (
        "dedup_exact: train 1,000 → 900, validation 10 documents (duplicate 99, duplicate_of_validation 1)"
    )
