"""R37 R38: one line per life-cycle event for the whole job; a failing rank speaks for itself."""

import logging

import dcpsvc
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer


class Lines(logging.Handler):
    """Keeps what is logged: level and text."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))

    def take(self, *levels):
        """What came since the last time, of some levels."""
        taken, self.lines = [line for line in self.lines if line[0] in levels], []
        return taken


def listen():
    lines = Lines()
    logging.getLogger("dcpsvc").addHandler(lines)
    logging.getLogger("dcpsvc").setLevel(logging.DEBUG)
    return lines


def live_a_life(rank, world, root):
    lines, heard = listen(), {}
    training = Training("ddp", rank)
    ckpt = checkpointer(root, training.state, every=dcpsvc.Every(steps=500), keep=dcpsvc.Latest(1))
    heard["opened"] = lines.take("INFO", "WARNING", "ERROR")
    ckpt.resume()
    heard["resumed"] = lines.take("INFO", "WARNING", "ERROR")
    ckpt.save(1, metrics={"loss": 0.5}).wait()
    ckpt.save(2).wait()
    ckpt.wait()
    heard["saved"] = lines.take("INFO", "WARNING", "ERROR")
    ckpt.close()
    heard["closed"] = lines.take("INFO", "WARNING", "ERROR")
    return heard


def test_each_event_is_one_line_of_rank_0_and_the_others_are_silent(tmp_path):
    root = tmp_path / "run"
    speaks, *silent = values(run_ranks(3, live_a_life, root))

    assert all(lines == [] for heard in silent for lines in heard.values())
    assert {name: len(lines) for name, lines in speaks.items()} == {"opened": 1, "resumed": 1, "saved": 3, "closed": 1}
    assert all(level == "INFO" for lines in speaks.values() for level, _ in lines)
    opened = speaks["opened"][0][1]
    assert all(part in opened for part in ("event=opened", str(root), "world_size=3", "steps=500"))
    assert "fresh start" in speaks["resumed"][0][1]
    assert speaks["saved"].pop()[1].endswith("removed step 1: not among the latest 1")
    for step, (_, line) in enumerate(speaks["saved"], 1):
        assert all(
            part in line for part in ("event=committed", "rank=0", f"step={step}", "attempt=", "nbytes=", "seconds=")
        )
    assert all("\n" not in line for lines in speaks.values() for _, line in lines)


class Counters:
    error = None

    def state_dict(self):
        if self.error:
            raise self.error
        return {}

    def load_state_dict(self, state):
        pass


def fail_on_rank_2(rank, world, root):
    lines = listen()
    training = Training("ddp", rank)
    training.state["counters"] = counters = Counters()
    with checkpointer(root, training.state) as ckpt:
        ckpt.save(1).wait()
        lines.take()
        counters.error = ValueError("bad luck") if rank == 2 else None
        raised_by(lambda: ckpt.save(2).wait())
        ckpt.wait()
        heard = lines.take("INFO", "WARNING", "ERROR")
        counters.error = None
        ckpt.save(3).wait()
    return heard


def test_a_failing_rank_logs_its_failure_with_its_number_and_rank_0_says_it_once(tmp_path):
    coordinator, bystander, failing = values(run_ranks(3, fail_on_rank_2, tmp_path / "run"))

    assert bystander == []
    ((level, line),) = failing
    assert level == "ERROR"
    assert all(part in line for part in ("rank=2", "step=2", "bad luck", "step 1 remains"))
    ((level, line),) = coordinator
    assert level == "WARNING"
    assert all(part in line for part in ("rank=0", "rank 2", "bad luck"))
