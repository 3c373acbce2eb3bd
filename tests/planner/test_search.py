"""Searches and fixes, with a compiler that is made up: what they may never do."""

import math
import os
from dataclasses import replace

import pytest

from parallel.config import MESH_AXES, mesh_shape
from parallel.hardware import machine_of
from planner.analytic import estimate
from planner.candidates import candidates
from planner.compiled import DoesNotFit
from planner.fixes import fixes
from planner.pareto import draw, front
from planner.search import compile_all, search
from tests.configs.composing import config
from tests.planner.test_hardware import hardware
from training.config import with_vocab
from training.legal.nearest import legal

WORDS = ("+experiment=llama3_8b", "hardware=h100", "training.global_batch_size=64")


def asked(*words):
    return with_vocab(config("run.name=searched", *WORDS, *words))


MACHINE = machine_of(hardware("h100", nodes=2))


def honest(config, machine):
    """A compiler that agrees with the model."""
    return replace(estimate(config, machine), how="compiled", bubble=0.0)


def dies(config, machine):
    os._exit(3)


@pytest.fixture(scope="module")
def found():
    return search(asked(), MACHINE, top=4, jobs=1, compile=honest)


def test_every_candidate_is_legal_and_uses_all_devices():
    made = list(candidates(asked(), MACHINE))
    assert len(made) > 200
    for candidate in made:
        sizes = mesh_shape(candidate.config.mesh, MACHINE.devices)
        assert math.prod(sizes.values()) == MACHINE.devices
        assert legal(candidate.config, MACHINE.devices) is None
    assert len({candidate.words for candidate in made}) == len(made)


def test_what_the_numbers_hang_on_stays():
    base = asked()
    for candidate in candidates(base, MACHINE):
        for room in ("model", "data", "optim", "schedule", "tokenizer"):
            assert getattr(candidate.config, room) == getattr(base, room)
        assert candidate.config.training.global_batch_size == base.training.global_batch_size
        assert candidate.config.training.precision == base.training.precision


def test_words_make_the_candidate():
    for candidate in list(candidates(asked(), MACHINE))[::97]:
        again = asked(*candidate.words)
        sizes = [mesh_shape(c.mesh, MACHINE.devices) for c in (again, candidate.config)]
        assert sizes[0] == sizes[1]
        assert again.training == candidate.config.training
        assert again.pipeline == candidate.config.pipeline


def test_the_best_is_the_fastest_that_fits(found):
    assert found.best is not None
    assert found.best.work.how == "compiled"
    assert all(found.best.seconds <= e.seconds for e in found.compiled)
    assert all(e.work.memory.total <= MACHINE.memory_bytes for e in found.compiled)
    assert found.best.seconds <= found.asked.seconds
    fitting = [e for e in found.computed if e.work.memory.total <= 0.9 * MACHINE.memory_bytes]
    assert found.best.seconds <= min(e.seconds for e in fitting) * 1.2


def test_what_the_compiler_finds_too_large_is_not_chosen():
    def larger(config, machine):
        work = honest(config, machine)
        if config.training.remat == "dots":
            raise DoesNotFit(2**40, machine.memory_bytes, "h100")
        return work

    found = search(asked(), MACHINE, top=4, jobs=1, compile=larger)
    assert found.failed and all("the compiler refuses" in e.fault for e in found.failed)
    assert found.best is None or found.best.candidate.config.training.remat != "dots"


def test_a_compiler_that_dies_is_its_candidates_fault(found):
    ended = list(compile_all(found.computed[:2], MACHINE, dies, 2))
    assert [e.fault for e in ended] == ["the process that compiled it died"] * 2


def test_two_searches_find_the_same(found):
    again = search(asked(), MACHINE, top=4, jobs=1, compile=honest)
    assert again.json() == found.json()


def test_the_front_is_beaten_by_nobody(found):
    line = front(found.computed)
    assert [e.seconds for e in line] == sorted((e.seconds for e in line), reverse=True)
    for one in found.computed[::50]:
        assert any(e.seconds <= one.seconds and e.work.memory.total <= one.work.memory.total for e in line)


def test_the_picture_and_the_page_are_written(found, tmp_path):
    draw(found, tmp_path / "p.png", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "<svg" in page and "http" not in page
    assert " ".join(found.best.candidate.words) in page


def test_fixes_fit_are_ordered_and_keep_the_experiment():
    base = asked("training.remat=none")
    assert estimate(base, MACHINE).memory.total > MACHINE.memory_bytes
    found = fixes(base, MACHINE, compile=honest)
    assert len(found) == 3 and all(fix.verified for fix in found)
    assert [fix.slower for fix in found] == sorted(fix.slower for fix in found)
    for fix in found:
        assert fix.evaluated.work.memory.total <= MACHINE.memory_bytes
        assert fix.evaluated.candidate.config.data == base.data
        assert "GiB" in fix.line() and "verified by compiling" in fix.line()
    assert len({tuple(w.split("=")[0] for w in f.evaluated.candidate.words) for f in found}) == 3


def test_without_a_compiler_fixes_say_so():
    found = fixes(asked("training.remat=none"), MACHINE, count=1, compile=None)
    assert "not compiled" in found[0].line()


def test_no_fix_is_found_where_the_compiler_refuses_all():
    def never(config, machine):
        raise DoesNotFit(2**40, machine.memory_bytes, "h100")

    assert fixes(asked("training.remat=none"), MACHINE, compile=never) == []


def test_axes_are_all_of_the_mesh():
    first = next(candidates(asked(), MACHINE))
    assert set(mesh_shape(first.config.mesh, MACHINE.devices)) == set(MESH_AXES)
