"""R30: when the number of ranks has changed, what each had of its own follows a stated policy, and one line says so."""

import pytest
import torch

import dcpsvc
from dcpsvc import PerRank, Rng
from dcpsvc.errors import RestoreFailedError, SharingError
from tests.ranks.harness import run_ranks, values

SAVED = 3


class Loader:
    """A place in the data, and what it was told."""

    def __init__(self, position):
        self.position, self.seeds = position, []

    def state_dict(self):
        return {"position": self.position, "batches": torch.arange(self.position)}

    def load_state_dict(self, state):
        assert state["batches"].numel() == state["position"]
        self.position = state["position"]

    def reseed(self, step, rank):
        self.seeds.append((step, rank))


def save(rank, world, root):
    torch.manual_seed(rank)
    state = {"loader": PerRank(Loader(10 * rank + 1)), "seen": PerRank(torch.full((2,), rank)), "rng": Rng()}
    with dcpsvc.Checkpointer(root / "run", state, local=root / f"local-{rank}", save_last=False) as ckpt:
        ckpt.save(5).wait(30)
        ckpt.wait()


def shared_out(saved, rank, world):
    """All positions, divided anew."""
    whole = sum(one["position"] for one in saved)
    mine = whole // world + (rank < whole % world)
    return {"position": mine, "batches": torch.arange(mine)}


def summed(saved, rank, world):
    return torch.stack(saved).sum(0) + 100 * rank


def load(rank, world, root, policies):
    loader, seen, rng = policies
    torch.manual_seed(100 + rank)
    mine = Loader(7)
    state = {
        "loader": PerRank(mine, resize=loader),
        "seen": PerRank(torch.full((2,), -1), resize=seen),
        "rng": Rng(resize=rng),
    }
    lines, error = [], ""
    ckpt = dcpsvc.Checkpointer(
        root / "run", state, local=root / f"other-{rank}", save_last=False,
        on_event=lambda event: lines.append(event.detail) if event.name == dcpsvc.Point.RESUMED else None,
    )  # fmt: skip
    with ckpt:
        try:
            ckpt.resume()
        except RestoreFailedError as err:
            error = str(err)
    return mine.position, mine.seeds, state["seen"].value.tolist(), torch.rand(1).item(), "".join(lines), error


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resized")
    values(run_ranks(SAVED, save, folder))
    return folder


def test_by_rank_each_takes_over_what_its_number_had(root):
    for rank, found in enumerate(values(run_ranks(2, load, root, ("by-rank", "by-rank", "by-rank")))):
        torch.manual_seed(rank)
        assert found[:4] == (10 * rank + 1, [], [rank, rank], torch.rand(1).item())
        assert "3 -> 2 ranks: values of ranks that are gone are left out" in found[4]


def test_reseed_leaves_the_value_as_it_is_here_and_tells_it_so(root):
    results = values(run_ranks(2, load, root, ("reseed", "reseed", "reseed")))
    assert [found[:3] for found in results] == [(7, [(5, rank)], [-1, -1]) for rank in range(2)]
    numbers = {found[3] for found in results}
    assert len(numbers) == 2
    assert numbers.isdisjoint(torch.manual_seed(seed) and torch.rand(1).item() for seed in (0, 1, 100, 101))
    assert "3 -> 2 ranks: loader, seen, rng: as here, reseeded" in results[0][4]


def test_a_function_makes_it_of_what_all_saved_ranks_had(root):
    results = values(run_ranks(2, load, root, (shared_out, summed, "by-rank")))
    assert [found[0] for found in results] == [17, 16]  # of 1, 11 and 21
    assert [found[2] for found in results] == [[3, 3], [103, 103]]
    assert "left out; loader, seen: by its own function" in results[0][4]


def test_strict_refuses_with_both_numbers_on_every_rank_and_touches_nothing(root):
    for rank, found in enumerate(values(run_ranks(2, load, root, ("strict", "by-rank", "by-rank")))):
        torch.manual_seed(100 + rank)
        assert found[:4] == (7, [], [-1, -1], torch.rand(1).item())
        assert "loader" in found[5]
        assert "3 ranks" in found[5]
        assert "2 ranks, and resize is 'strict'" in found[5]


def test_with_as_many_ranks_each_gets_its_own_back_whatever_the_policy(root):
    for rank, found in enumerate(values(run_ranks(SAVED, load, root, ("strict", summed, "reseed")))):
        torch.manual_seed(rank)
        assert found == (10 * rank + 1, [], [rank, rank], torch.rand(1).item(), found[4], "")
        assert " ranks" not in found[4]


@pytest.mark.parametrize("make", [lambda resize: PerRank(1, resize=resize), lambda resize: Rng(resize=resize)])
@pytest.mark.parametrize("resize", ["by_rank", "", None, 3])
def test_a_policy_that_is_none_is_refused_where_it_is_declared(make, resize):
    with pytest.raises(SharingError, match="must be 'by-rank', 'strict', 'reseed' or a function"):
        make(resize)
