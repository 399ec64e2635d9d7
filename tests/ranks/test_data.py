"""R32: the position in the data: ranks killed three times inside one epoch give every sample exactly once."""

import json
import multiprocessing

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

import dcpsvc
from tests.ranks.harness import die, run_ranks
from tests.ranks.models import checkpointer

pytestmark = pytest.mark.timeout(200)

EACH, BATCH, EVERY = 41, 2, 5
"""Samples of a rank; of a batch; steps from one commit to the next."""

WORKERS = {"num_workers": 2, "prefetch_factor": 3, "multiprocessing_context": "fork"}


class Numbers(torch.utils.data.Dataset):
    """The numbers of some rank, or of all."""

    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.first + index


def everybodys(world):
    return Numbers(0, world * EACH)


# --- loaders that keep their position themselves ----------------------------------------------------


class Stateful:
    """A StatefulDataLoader, each rank's own."""

    def __init__(self, data, **options):
        from torchdata.stateful_dataloader import StatefulDataLoader

        self.loader = StatefulDataLoader(data, BATCH, **WORKERS, **options)
        self.state = {"loader": dcpsvc.PerRank(self.loader)}

    def batches(self):
        yield from self.loader


def stateful_distributed(rank, world):
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    data = everybodys(world)
    return Stateful(data, sampler=StatefulDistributedSampler(data, world, rank, seed=7))


def stateful_with_a_plain_sampler(rank, world):
    data = everybodys(world)
    return Stateful(data, sampler=DistributedSampler(data, world, rank, seed=7))


def stateful_shuffled(rank, world):
    return Stateful(Numbers(rank * EACH, EACH), shuffle=True)  # the order is the checkpoint's, not the seed's


# --- plain ones: what was trained is counted, whatever was fetched beyond it ------------------------


class Counted:
    """A plain DataLoader over what is left of the epoch."""

    def __init__(self, data, sampler, begin):
        self.data, self.sampler, self.begin = data, sampler, begin
        self.position = {"epoch": 0, "batches": 0}
        self.state = {"position": self.position}

    def batches(self):
        self.begin(self.position["epoch"])
        left = list(BatchSampler(self.sampler, BATCH, drop_last=False))[self.position["batches"] :]
        for batch in DataLoader(self.data, batch_sampler=left, **WORKERS):
            self.position["batches"] += 1
            yield batch


def plain_distributed(rank, world):
    data = everybodys(world)
    sampler = DistributedSampler(data, world, rank, seed=7)
    return Counted(data, sampler, sampler.set_epoch)


def plain_random(rank, world):
    data, generator = Numbers(rank * EACH, EACH), torch.Generator()
    return Counted(data, RandomSampler(data, generator=generator), generator.manual_seed)


KINDS = [stateful_distributed, stateful_with_a_plain_sampler, stateful_shuffled, plain_distributed, plain_random]


# --- on the ranks -----------------------------------------------------------------------------------


def live(rank, world, root, number):
    """One life: to a batch beyond the next commit, and killed; the fourth, to the end of the epoch."""
    multiprocessing.current_process()._config["daemon"] = False  # which must not have workers
    torch.manual_seed(10 * number + rank)
    seen = {}
    for make in KINDS:
        mine, given = make(rank, world), []
        ckpt = checkpointer(root / make.__name__ / "run", mine.state, save_last=False)
        step = ckpt.resume()
        assert step == number * EVERY
        for batch in mine.batches():
            if number < 3 and step == (number + 1) * EVERY:
                break  # a batch that no checkpoint knows of
            step += 1
            given += batch.tolist()
            if step == (number + 1) * EVERY:
                ckpt.save(step).wait()
        seen[make.__name__] = given
        if number == 3:
            ckpt.close()
    (root / f"{number}-{rank}.json").write_text(json.dumps(seen))
    if number < 3:
        die()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """By kind of data and by rank, what all four lives trained on."""
    pytest.importorskip("torchdata")
    root = tmp_path_factory.mktemp("data")
    for make in KINDS:
        (root / make.__name__).mkdir()
    for number in range(4):
        outcomes = run_ranks(2, live, root, number, timeout_s=60)
        assert {each.signal for each in outcomes} == {9 if number < 3 else None}, [
            each.log[-4000:] for each in outcomes
        ]
        assert not [each.raised.trace for each in outcomes if each.raised]
    found = {}
    for make in KINDS:
        told = [[json.loads((root / f"{n}-{r}.json").read_text())[make.__name__] for n in range(4)] for r in range(2)]
        found[make] = [[number for life in lives for number in life] for lives in told]
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_three_kills_inside_an_epoch_give_every_rank_every_sample_of_its_own_exactly_once(seen, kind):
    by_rank = seen[kind]
    assert [len(one) for one in by_rank] == [EACH, EACH]
    assert sorted(by_rank[0] + by_rank[1]) == list(range(2 * EACH))
    assert by_rank[0] != sorted(by_rank[0])  # it was shuffled
