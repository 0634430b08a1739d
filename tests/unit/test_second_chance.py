"""When a disk that failed on the secondary is tried again."""

from itertools import pairwise

from stortrends_ha.node.second_chance import LAST_PAUSE_S, SecondChance


def tries(chance: SecondChance, first_s: int, last_s: int, *, failed: bool = True, well: bool = False) -> list[int]:
    """When it was tried, if it is asked each second and is always so."""
    return [now for now in range(first_s, last_s) if chance.due(now, failed=failed, well=well)]


def test_it_is_tried_less_and_less_often() -> None:
    found = tries(SecondChance(60), 1, 40_000)
    pauses = [after - before for before, after in pairwise(found)]
    assert found[0] == 61
    assert pauses[:5] == [121, 241, 481, 961, 1921]  # the time counts from when it is seen to have failed again
    assert set(pauses[5:]) == {LAST_PAUSE_S + 1}


def test_it_is_not_tried_while_it_has_not_failed() -> None:
    chance = SecondChance(60)
    assert tries(chance, 1, 1000, failed=False) == []
    assert tries(chance, 1000, 1060) == []
    assert tries(chance, 1060, 1061) == [1060]


def test_after_it_was_well_for_long_it_is_tried_soon_again() -> None:
    chance = SecondChance(60)
    assert tries(chance, 1, 200) == [61, 182]
    assert tries(chance, 200, 500, failed=False, well=True) == []
    assert tries(chance, 500, 600) == [560]


def test_after_it_was_well_for_a_moment_it_is_not() -> None:
    chance = SecondChance(60)
    assert tries(chance, 1, 200) == [61, 182]
    assert tries(chance, 200, 300, failed=False, well=True) == []
    assert tries(chance, 300, 500) == []
