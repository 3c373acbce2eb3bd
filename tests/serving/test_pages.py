"""Pages are held by whom they were given to, shared where prompts begin alike, and never lost."""

import numpy as np
import pytest

from serving.pages import PagePool

PAGE, CHUNK, COUNT = 4, 8, 24


def prompts(rng):
    """A prompt whose beginning others may have had."""
    size = int(rng.integers(1, 40))
    return ([0] * 16 + [1] * 24)[:size] if rng.random() < 0.5 else rng.integers(0, 3, size).tolist()


@pytest.mark.parametrize("share", [True, False])
def test_no_page_is_lost_or_held_by_two_that_differ(share):
    rng = np.random.default_rng(0)
    pool, held = PagePool(COUNT, PAGE, CHUNK, share=share), []
    contents = {}  # page → what was written there last
    hits = 0
    for _ in range(10_000):
        if held and rng.random() < 0.5:
            pool.release(held.pop(int(rng.integers(len(held))))[0])
        prompt, version = prompts(rng), str(int(rng.integers(2)))
        more = int(rng.integers(1, 20))
        found = pool.take(prompt, len(prompt) + more, version)
        if found is None:
            needed = pool.needed(len(prompt) + more)
            assert needed > pool.count - pool.used  # nothing is refused that has room
            continue
        assert len(found.pages) == pool.needed(len(prompt) + more) == len(set(found.pages))
        assert found.cached % CHUNK == 0 and found.cached < len(prompt)
        assert share or not found.cached
        hits += found.cached
        # What is said to be there is there: the same tokens, of the same weights, from the same place on.
        for at in range(0, found.cached, PAGE):
            assert contents[found.pages[at // PAGE]] == (version, at, prompt[: at + PAGE])
        # What others hold is not written.
        others = {page for other, _ in held for page in other.pages}
        assert not others & set(found.pages[found.cached // PAGE :])
        read = int(rng.integers(found.cached, len(prompt)))
        for at in range(found.cached, len(prompt) - 1, PAGE):
            if at + PAGE <= read:
                contents[found.pages[at // PAGE]] = (version, at, prompt[: at + PAGE])
            else:
                contents.pop(found.pages[at // PAGE], None)
        for page in found.pages[(len(prompt) - 1) // PAGE :]:
            contents.pop(page, None)
        pool.written(found, read)
        held.append((found, prompt))
        assert pool.used == len({page for other, _ in held for page in other.pages})
        assert pool.used + pool.cached <= pool.count
    assert (hits > 1000) == share
    for found, _ in held:
        pool.release(found)
    assert pool.used == 0
    pool.forget()
    assert pool.cached == 0 and pool.take([1], COUNT * PAGE, "0") is not None


def test_chunks_that_depend_on_the_token_behind_them_are_shared_by_those_who_go_on_with_it():
    pool, prompt = PagePool(COUNT, PAGE, CHUNK, further=True), list(range(20))
    held = pool.take(prompt, 24, "0")
    pool.written(held, 19)
    pool.release(held)
    for other, cached in ((prompt, 16), (prompt[:17], 16), ([*prompt[:16], 99], 8), (prompt[:16], 8)):
        found = pool.take(other, 24, "0")
        assert found.cached == cached
        pool.release(found)


def test_the_least_recently_held_beginning_is_forgotten_first():
    pool = PagePool(8, PAGE, CHUNK)
    for token in (1, 2, 3):
        held = pool.take([token] * 9, 9, "0")
        pool.written(held, 8)
        pool.release(held)
    assert (pool.used, pool.cached) == (0, 6)
    again = pool.take([1] * 9, 9, "0")  # held once more: now 2 is the oldest
    assert again.cached == 8
    pool.release(again)
    assert pool.take([9] * 4, 4 * PAGE, "0").cached == 0
    for token, cached in ((1, 8), (2, 0)):
        held = pool.take([token] * 9, 9, "0")
        assert held.cached == cached
        pool.release(held)


def test_the_last_token_of_a_prompt_is_never_cached():
    pool = PagePool(8, PAGE, CHUNK)
    held = pool.take([1] * 9, 12, "0")
    pool.written(held, 8)
    assert pool.take([1] * 8, 12, "0").cached == 0
    assert pool.take([1] * 9, 12, "0").cached == 8
    assert pool.take([1] * 9, 12, "of other weights") is None or pool.used


def test_a_chunk_is_whole_pages():
    with pytest.raises(ValueError, match="chunk=6 must be a multiple of page=4"):
        PagePool(8, 4, 6)
