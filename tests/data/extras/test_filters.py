"""Near duplicates, languages and the learned filter, with the libraries that do the heavy part."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.curation.base import DocumentTable as Seen
from data.curation.config import DedupMinhash, FilterLanguage, FilterLearned
from data.curation.optimize import OptimizedCorpus
from data.errors import DataError
from tests.data.extras import require

pytestmark = pytest.mark.filterwarnings("ignore:label.* is deprecated")  # tfds, of protobuf's newest
SPLITS = ("train", "validation")
GERMAN = "Der Zug nach Hamburg fährt heute nicht, weil die Strecke wegen des Sturms gesperrt ist."
ENGLISH = "The train to Hamburg is not running today because the line is closed after the storm."
FRENCH = "Le train pour Hambourg ne circule pas aujourd'hui parce que la ligne est fermée."


def planted(distinct: int, pairs: dict[tuple[int, int], int], seed: int = 0) -> tuple[list[str], list[tuple]]:
    """Documents of words that occur nowhere else, and pairs whose 5-grams have an exact Jaccard.

    A document of S + 4 words has S shingles. Two that share their first c + 4 words and no other have c of
    them in common: c / (2 S - c). pairs: (common, shingles) → how many; returns (first, second, Jaccard).
    """
    rng = random.Random(seed)
    fresh = (f"{rng.choice('bdfgklmnprst')}{number:x}" for number in range(1 << 40))

    def words(count: int) -> list[str]:
        return [next(fresh) for _ in range(count)]

    texts = [" ".join(words(rng.randrange(60, 220))) for _ in range(distinct)]
    found = []
    for (common, shingles), count in pairs.items():
        for _ in range(count):
            shared = words(common + 4)
            rest = shingles - common
            texts += [" ".join(shared + words(rest)), " ".join(shared + words(rest))]
            found.append((len(texts) - 2, len(texts) - 1, common / (2 * shingles - common)))
    order = rng.sample(range(len(texts)), len(texts))
    place = {old: new for new, old in enumerate(order)}
    return [texts[old] for old in order], [(place[a], place[b], j) for a, b, j in found]


def test_near_duplicates_of_a_planted_set_are_found_and_the_others_kept():
    require("rensa", "filters")
    from data.curation.dedup import DedupMinhashStep

    # Jaccard 0.85, 0.9, 0.95 and 0.7, 0.6, 0.5, by construction.
    pairs = {
        (170, 185): 400,
        (180, 190): 100,
        (190, 195): 100,
        (140, 170): 400,
        (120, 160): 100,
        (100, 150): 100,
    }
    texts, planted_pairs = planted(9000, pairs)
    assert len(texts) >= 10_000
    step = DedupMinhashStep(DedupMinhash())
    signatures = np.concatenate(
        [step.sign(texts[first : first + 256], [""] * 256) for first in range(0, len(texts), 256)]
    )
    decision = step.decide(Seen(signatures, np.ones(len(texts), bool), texts.__getitem__))
    dropped = ~decision.keep
    near = [(a, b) for a, b, jaccard in planted_pairs if jaccard >= 0.85]
    far = [(a, b) for a, b, jaccard in planted_pairs if jaccard <= 0.7]
    assert len(near) == 600 and len(far) == 600
    found = np.mean([dropped[max(pair)] and not dropped[min(pair)] for pair in near])
    kept = np.mean([not dropped[a] and not dropped[b] for a, b in far])
    assert found >= 0.95, found
    assert kept >= 0.95, kept
    in_pairs = {row for a, b, _ in planted_pairs for row in (a, b)}
    assert not dropped[[row for row in range(len(texts)) if row not in in_pairs]].any()
    assert decision.details["documents_cut_short"] == 0
    assert decision.details["bytes_per_document"] == signatures.shape[1] * 8
    # What is compared is exact: the similarity that was planted.
    row = max(near[0])
    assert re.search(r"Jaccard 0\.850", decision.note(row))


def test_characters_are_shingles_where_words_have_no_blanks():
    require("rensa", "filters")
    from data.curation.dedup import DedupMinhashStep

    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(400))
    step = DedupMinhashStep(DedupMinhash(unit="character"))
    texts = [text, text[:-4] + "语言模型", "".join(rng.sample(text, 400)), "短", "短"]
    decision = step.decide(Seen(step.sign(texts, [""] * 5), np.ones(5, bool), texts.__getitem__))
    assert decision.keep.tolist() == [True, False, True, True, False]


def corpus_of(
    tmp_path: Path, texts: list[str], steps: list[dict[str, Any]], **values: Any
) -> OptimizedCorpus:
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    defaults: dict[str, Any] = {
        "validation_fraction": 0.2,
        "workers": 1,
        "cache_dir": str(tmp_path / "cache"),
    }
    corpus = OptimizedCorpus(
        DataConfig(source="folder", path=str(folder), steps=steps, **(defaults | values))
    )
    corpus.ensure()
    return corpus


def report_of(corpus: OptimizedCorpus) -> dict[str, Any]:
    report = corpus.report()
    assert report is not None
    return report


def test_train_documents_that_nearly_repeat_validation_go(tmp_path):
    require("rensa", "filters")
    texts, pairs = planted(100, {(180, 190): 60})
    corpus = corpus_of(tmp_path, texts, [{"step": "dedup_minhash"}])
    left = {split: set(corpus.split(split)) for split in SPLITS}
    (step,) = report_of(corpus)["steps"]
    across = 0
    for a, b, _ in pairs:
        one, other = ({s for s in SPLITS if texts[x] in left[s]} for x in (a, b))
        assert len(one) + len(other) == 1  # one of the two is left
        across += (one | other) == {"validation"}
    assert step["details"]["train_documents_like_validation"] > 0
    assert step["reasons"]["train"]["near_duplicate_of_validation"] <= across
    assert step["details"]["clusters"] == 60
    assert all(example["note"].startswith("Jaccard 0.9") for example in step["examples"])


def test_documents_in_other_languages_go(tmp_path):
    require("py3langid", "filters")
    texts = [f"{text} {n}" for n in range(30) for text in (GERMAN, ENGLISH, FRENCH)]
    corpus = corpus_of(tmp_path, texts, [{"step": "filter_language", "keep": ["de", "en"]}])
    left = [text for split in SPLITS for text in corpus.split(split)]
    assert Counter(text.rsplit(" ", 1)[0] for text in left) == {GERMAN: 30, ENGLISH: 30}
    (step,) = report_of(corpus)["steps"]
    assert step["counts"] == {"de": 30, "en": 30, "fr": 30}
    assert sum(step["reasons"][split].get("language_fr", 0) for split in SPLITS) == 30


def test_an_uncertain_language_goes_and_an_unknown_one_is_refused():
    require("py3langid", "filters")
    from data.curation.language import FilterLanguageStep

    step = FilterLanguageStep(FilterLanguage(keep=("en",), min_probability=0.999))
    assert step.apply(ENGLISH * 3).reason is None
    assert step.apply("ok 12").reason is not None
    with pytest.raises(DataError, match="keep=english is no language of py3langid; use .* en "):
        FilterLanguageStep(FilterLanguage(keep=("english",)))


def examples(kind: str, count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    shared = [f"word{n}" for n in range(300)]
    own = {
        "good": "however therefore evidence measured because".split(),
        "bad": "click buy cheap now win".split(),
    }
    return [
        " ".join(rng.choices(shared, k=40) + rng.choices(own[kind], k=6))
        + (". " if kind == "good" else "!!!")
        for _ in range(count)
    ]


@pytest.fixture
def example_files(tmp_path) -> dict[str, list[str]]:
    found = {}
    for seed, kind in enumerate(("good", "bad")):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in examples(kind, 150, seed)))
        found[kind] = [str(path)]
    return found


@pytest.mark.parametrize("how", [{"keep": 0.5}, {"min_score": 0.5}])
def test_the_learned_filter_keeps_what_is_like_the_good_examples(how, tmp_path, example_files):
    require("sklearn", "filters")
    good, bad = examples("good", 80, 10), examples("bad", 80, 11)
    step = {"step": "filter_learned", **example_files, "features": 500, **how}
    corpus = corpus_of(tmp_path, good + bad, [step])
    left = {text for split in SPLITS for text in corpus.split(split)}
    assert len(left & set(good)) >= 70
    assert len(left & set(bad)) <= 10
    (entry,) = report_of(corpus)["steps"]
    details = entry["details"]
    assert details["held_out_auc"] > 0.98
    assert details["held_out_precision"] > 0.9 and details["held_out_recall"] > 0.9
    assert any("however" in name for name, weight in details["weights"] if weight > 0)
    assert any("cheap" in name for name, weight in details["weights"] if weight < 0)
    assert "?" not in {name for name, _ in details["weights"]}
    manifest = json.loads((corpus.directory / "manifest.json").read_text())
    assert manifest["about"]["model_digests"] == [details["model_digest"]]
    assert sum(entry["histograms"]["score"]["before"]) == 160
    if "keep" in how:
        before, after = entry["documents"]["train"]
        assert after == round(before / 2)


def test_training_the_filter_again_gives_the_same_model(example_files):
    require("sklearn", "filters")
    from data.curation.learned import train

    config = FilterLearned(
        good=tuple(example_files["good"]), bad=tuple(example_files["bad"]), keep=0.5, features=500
    )
    (first, one), (second, other) = train(config), train(config)
    assert first.digest == second.digest
    assert one == other


def test_other_examples_are_another_corpus_and_too_few_are_refused(tmp_path, example_files):
    require("sklearn", "filters")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in examples("good", 40, 3))
    )

    def corpus() -> OptimizedCorpus:
        step = {"step": "filter_learned", **example_files, "keep": 0.5}
        return OptimizedCorpus(
            DataConfig(
                source="folder", path=str(tmp_path / "texts"), cache_dir=str(tmp_path / "c"), steps=[step]
            )
        )

    before = corpus().digest
    Path(example_files["good"][0]).write_text(json.dumps({"text": "one good document"}) + "\n")
    assert corpus().digest != before
    with pytest.raises(DataError, match=r"filter_learned good has too few examples \(1\)"):
        corpus().ensure()
    Path(example_files["good"][0]).unlink()
    with pytest.raises(DataError, match="good.jsonl cannot be read"):
        corpus()
