"""A set of blocks, against a plain set: what is in it, what is saved of it, what it costs."""

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stortrends_ha.replication.block_map import PAGE_BLOCKS, PAGE_BYTES, BlockMap

BLOCKS = 3 * PAGE_BLOCKS + 1001  # the last page is not whole
EDGES = [at for page in range(4) for at in (page * PAGE_BLOCKS, page * PAGE_BLOCKS + 7, (page + 1) * PAGE_BLOCKS - 1)]
places = st.one_of(st.sampled_from([edge for edge in EDGES if edge < BLOCKS]), st.integers(0, BLOCKS - 1))
lengths = st.sampled_from([1, 2, 8, 9, 1000, PAGE_BLOCKS - 1, PAGE_BLOCKS, PAGE_BLOCKS + 1, BLOCKS])
steps = st.one_of(
    st.tuples(st.just("add"), places, lengths),
    st.tuples(st.just("add"), places, st.just(1)),
    st.tuples(st.just("remove"), places, lengths),
    st.tuples(st.just("discard"), places, st.just(1)),
    st.tuples(st.sampled_from(["fill", "clear", "save", "update"]), places, lengths),
)


def carry_out(step: tuple[str, int, int], map_: BlockMap, plain: set[int], saved: dict[int, bytes]) -> None:
    what, first, length = step
    last = first + length - 1
    blocks = range(first, min(last + 1, BLOCKS))
    other = BlockMap(BLOCKS)
    other.add(first, last)
    steps: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "add": (lambda: map_.add(first, last), lambda: plain.update(blocks)),
        "remove": (lambda: map_.remove(first, min(last, BLOCKS - 1)), lambda: plain.difference_update(blocks)),
        "discard": (lambda: map_.discard(first), lambda: plain.discard(first)),
        "fill": (map_.fill, lambda: plain.update(range(BLOCKS))),
        "clear": (map_.clear, plain.clear),
        "save": (lambda: saved.update(map_.pages_to_save()), lambda: None),
        "update": (lambda: map_.update(other), lambda: plain.update(blocks)),
    }
    for each in steps[what]:
        each()


@settings(deadline=None, max_examples=150)
@given(st.lists(steps, max_size=12), st.lists(places, max_size=5))
@example([("fill", 0, 1), ("discard", BLOCKS - 1, 1), ("remove", 0, PAGE_BLOCKS)], [0, BLOCKS - 1])
def test_it_is_the_same_set_as_a_plain_one(script: list[tuple[str, int, int]], looked_at: list[int]) -> None:
    map_, plain, saved = BlockMap(BLOCKS), set[int](), dict[int, bytes]()
    for step in script:
        carry_out(step, map_, plain, saved)
        assert map_.count == len(plain)
    assert set(map_) == plain
    for block in looked_at:
        assert (block in map_) == (block in plain)
        later = [each for each in plain if each >= block]
        assert map_.next_from(block) == min(later, default=None)
        assert map_.any_in(block, block + 99) == any(each <= block + 99 for each in later)
        if block in plain:
            end = map_.run_end(block, BLOCKS - 1)
            assert plain.issuperset(range(block, end + 1))
            assert end == BLOCKS - 1 or end + 1 not in plain
    saved |= map_.pages_to_save()
    again = BlockMap.load(BLOCKS, dict(saved))
    assert set(again) == plain
    assert again.count == len(plain)
    assert not again.changed
    assert not map_.pages_to_save()


@settings(deadline=None, max_examples=50)
@given(st.lists(steps, max_size=6), st.sets(st.integers(0, 3)))
def test_page_that_cannot_be_trusted_has_all_its_blocks_and_is_saved_again(
    script: list[tuple[str, int, int]], damaged: set[int]
) -> None:
    map_, plain = BlockMap(BLOCKS), set[int]()
    for step in script:
        carry_out(step, map_, plain, {})
    pages: dict[int, bytes | None] = {number: map_.page(number) for number in range(4)}
    loaded = BlockMap.load(BLOCKS, pages | dict.fromkeys(damaged))
    expected = plain | {at for page in damaged for at in range(page * PAGE_BLOCKS, (page + 1) * PAGE_BLOCKS)}
    assert set(loaded) == {at for at in expected if at < BLOCKS}
    assert set(loaded.pages_to_save()) == damaged


def test_block_beyond_the_end_is_never_in_it() -> None:
    map_ = BlockMap(10)
    map_.add(8, 1 << 60)
    map_.add(1 << 50, 1 << 60)
    assert list(map_) == [8, 9]
    assert (10 in map_, 1 << 50 in map_) == (False, False)
    map_.fill()
    assert (list(map_), map_.count) == (list(range(10)), 10)


def test_only_what_has_changed_is_saved_and_only_once() -> None:
    map_ = BlockMap(BLOCKS)
    map_.add(5, 5)
    assert set(map_.pages_to_save()) == {0}
    map_.add(5, 5)
    map_.add(0, -1)
    map_.discard(6)
    assert map_.pages_to_save() == {}
    map_.add(PAGE_BLOCKS, PAGE_BLOCKS)
    map_.discard(5)
    assert {number: page.count(0) for number, page in map_.pages_to_save().items()} == {
        0: PAGE_BYTES,
        1: PAGE_BYTES - 1,
    }


@pytest.mark.parametrize("full", [False, True])
def test_map_of_the_largest_volume_costs_nothing_while_it_is_empty_or_full(full: bool) -> None:
    map_ = BlockMap(1 << 30)  # 64 TiB
    if full:
        map_.fill()
    assert map_.count == full << 30
    pages = list(map_._pages.values())
    assert len({id(page) for page in pages}) <= 2
    assert (map_.next_from(1 << 29) is not None) == full
    assert map_.any_in(0, 1 << 29) == full


def test_full_page_that_is_shared_is_not_changed_with_another() -> None:
    map_ = BlockMap(BLOCKS)
    map_.fill()
    map_.discard(3)
    map_.remove(PAGE_BLOCKS + 9, PAGE_BLOCKS + 10)
    assert map_.count == BLOCKS - 3
    other = BlockMap(BLOCKS)
    other.fill()
    assert other.count == len(list(other)) == BLOCKS


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 5000)), max_size=6), st.integers(0, 6))
def test_in_blocks_of_another_size_it_has_each_that_has_any_of_it(runs: list[tuple[int, int]], shift: int) -> None:
    map_, smaller = BlockMap(BLOCKS), BlockMap(BLOCKS << shift)
    for first, length in runs:
        map_.add(first, first + length - 1)
        smaller.add(first << shift, (first << shift) + length - 1)
    assert set(map_.rescaled(1 << shift, BLOCKS << shift, 1)) == {
        (block << shift) + part for block in map_ for part in range(1 << shift)
    }
    assert set(smaller.rescaled(1, BLOCKS, 1 << shift)) == {block >> shift for block in smaller}
