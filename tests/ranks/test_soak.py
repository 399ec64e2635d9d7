"""A short soak: many disturbed saves in a row of one job."""

import pytest

from tests.ranks.soak import balance


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_whose_saves_are_disturbed_again_and_again_loses_nothing_and_leaks_nothing(tmp_path):
    found = balance(tmp_path, world=2, saves=30, seed=1)

    assert found["lost"] == []
    assert found["there without being reported"] == []
    assert found["disturbed"] >= 10
    assert found["committed"] >= 10
    assert found["failed and reported"] >= 5
    assert found["said by all ranks alike"] == 30
    assert found["leaked threads"] == [{}, {}]
    assert found["leaked descriptors"] == [0, 0]
    assert found["unfinished files"] == []
