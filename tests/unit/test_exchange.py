"""A group in which rank 0 alone is given what the others have: in order, in time, and all leave together."""

import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch.distributed as dist

from dcpsvc.ranks.exchange import Exchange
from dcpsvc.ranks.messages import LostPeerError

PATIENCE_S, SOON_S, MOMENT_S = 1.0, 20.0, 0.2
SIZES = [3, 0, 70_000, 1 << 20, 0, 5]


class Counting(Exchange):
    """Counts the bytes that come to this rank by name."""

    received_nbytes = 0

    def swap(self, outgoing, incoming):
        self.received_nbytes += sum(len(parcel.view) for parcel in incoming)
        super().swap(outgoing, incoming)


@pytest.fixture
def groups():
    """Makes the groups of so many ranks, all in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = []

    def make(number):
        how = {"world_size": number, "namespace": "run", "timeout_s": PATIENCE_S}
        made.extend(Counting(rank=rank, **how) for rank in range(number))
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(lambda one: one.renew(0), made))
        return made

    yield make
    for one in made:
        one.close()
    dist.destroy_process_group()


def begun(pool, groups, sizes, *, ranks=None):
    """What each rank is going to hear, by rank."""
    given = {rank: bytearray([rank]) * sizes[rank] for rank in ranks or range(len(groups))}
    return {rank: pool.submit(groups[rank].gather, data, sizes) for rank, data in given.items()}


@pytest.mark.parametrize("sizes", [SIZES, [0] * 6, [9, 0, 0, 0, 0, 0]], ids=["some", "nobody", "rank 0"])
def test_rank_0_is_given_what_each_has_in_order_and_the_others_nothing(groups, sizes):
    made = groups(len(sizes))
    with ThreadPoolExecutor(len(sizes)) as pool:
        for _ in range(3):
            heard = {rank: one.result(SOON_S) for rank, one in begun(pool, made, sizes).items()}
            assert heard.pop(0) == [bytearray([rank]) * size for rank, size in enumerate(sizes)]
            assert set(map(tuple, heard.values())) == {()}
    assert [one.received_nbytes for one in made] == [3 * sum(sizes[1:]), 0, 0, 0, 0, 0]


def test_one_rank_alone_is_given_its_own(groups):
    (alone,) = groups(1)
    assert alone.gather(bytearray(b"own"), [3]) == [b"own"]


def test_nobody_leaves_before_rank_0_has_all(groups):
    made = groups(3)
    with ThreadPoolExecutor(3) as pool:
        ahead = begun(pool, made, [0, 4, 0], ranks=[1, 2])
        assert wait(ahead.values(), MOMENT_S).done == set()
        heard = begun(pool, made, [0, 4, 0], ranks=[0])
        assert heard[0].result(SOON_S) == [b"", b"\1" * 4, b""]
        assert [one.result(SOON_S) for one in ahead.values()] == [[], []]


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_rank_that_does_not_come_keeps_nobody_longer_than_the_timeout_and_the_group_is_given_up(groups, absent):
    made = groups(3)
    there = [rank for rank in range(3) if rank != absent]
    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        for one in begun(pool, made, [0, 4, 1 << 20], ranks=there).values():
            assert isinstance(one.exception(SOON_S), LostPeerError)
    assert time.monotonic() - began < 5 * PATIENCE_S
    assert [made[rank].poisoned for rank in there] == [True, True]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: one.renew(1), made))
        assert begun(pool, made, SIZES[:3])[0].result(SOON_S)[2] == b"\2" * SIZES[2]


def test_in_a_group_that_was_left_nothing_is_waited_for(groups):
    made = groups(2)
    made[1].close()
    with pytest.raises(LostPeerError, match="the group is closed"):
        made[1].gather(bytearray(), [0, 0])
