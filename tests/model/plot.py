"""What chance alone hardly brings about: a job held up at the worst moment, and a later one that meets it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.model.settings import EXPIRY

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.model.host import Host
    from tests.model.kernel import Kernel
    from tests.model.world import Start, World

_HANG_S = 3.5
_MOST_S = 30.0


class Plot:
    """The ambush of a history, and the duel that may follow.

    The coordinator of some start is held up where the settings say: its process stands still, or its call hangs, or its
    request is on the way for long and perhaps it dies. Mostly the next start begins at once. The one held up goes on
    after a while; or, in a duel, when the coordinator of a later start has come to a certain point, and waits there.
    """

    def __init__(self, world: World) -> None:
        self._world, self._settings = world, world.settings
        self._kernel, self._draw = world.kernel, world.kernel.random
        self._visits, self._visits_of_duel = self._settings.ambush_after, self._settings.duel_after
        self._release: Callable[[], None] | None = None

    def cast(self, start: Start, host: Host, *, final: bool) -> None:
        """Give a coordinator its part."""
        if self._release is not None and self._settings.duel != EXPIRY:
            self._challenge(host)
        elif self._settings.ambush and not final:
            host.ambush_label, host.ambush = self._settings.ambush, lambda host: self._strike(start, host)

    def _strike(self, start: Start, host: Host) -> None:
        draw, kernel, world = self._draw, self._kernel, self._world
        self._visits -= not world.faults.calm
        if self._visits or world.faults.calm:
            return
        kernel.note("ambush")
        if self._settings.duel or draw.random() < 0.7:
            self._follow(start)
        seconds = 0.5 + (_MOST_S if self._settings.duel else draw.choice((1.5, 4.0, 10.0))) * draw.random()
        is_write = host.ambush_label.startswith(("remote.create", "remote.put", "remote.delete"))
        match draw.choice(("freeze", "freeze", "hang", "in flight" if is_write else "hang")):
            case "freeze":
                self._await(lambda: kernel.thaw(host.process), start)
                kernel.freeze(host.process, seconds)
            case "hang":
                self._await(_woken(kernel), start)
                kernel.park(min(seconds, _HANG_S))
            case _:
                host.request = request = Request(is_last=draw.random() < 0.6)
                self._await(request.land, start)
                kernel.at(seconds, request.land)

    def _follow(self, start: Start) -> None:
        """The next start begins. Only an attempt whose ranks are gone is finished by it, and expires one day."""
        self._world.follow(start, gap_s=0.2 * self._draw.random())
        if self._draw.random() < 0.5 or self._settings.duel == EXPIRY:
            start.agent = False  # which would end the one held up, too
            for rank in start.running[1:]:
                self._kernel.kill(rank.host.process)

    def _await(self, release: Callable[[], None], start: Start) -> None:
        if not self._settings.duel:
            return
        self._release = release
        if self._settings.duel == EXPIRY:
            self._world.ledger.on_expiry = self._pass_by
        else:
            for later in self._world.starts[start.number + 1 :]:
                self._challenge(later.ranks[0].host)

    def _challenge(self, host: Host) -> None:
        host.ambush_label, host.ambush = self._settings.duel, self._meet

    def _meet(self, _: Host) -> None:
        if (release := self._take()) is not None:
            release()
            self._kernel.wait(0.6 * self._draw.random())

    def _pass_by(self) -> None:
        if (release := self._take()) is not None:
            self._kernel.at(0.6 * self._draw.random(), release)

    def _take(self) -> Callable[[], None] | None:
        """How to let the one go on that is held up, if it is time."""
        self._visits_of_duel -= 1
        if self._visits_of_duel > 0 or self._release is None:
            return None
        self._kernel.note("duel")
        self._world.ledger.outcomes["two jobs' coordinators met"] += 1
        release, self._release = self._release, None
        return release


class Request:
    """On its way for long; lands once.

    Attributes:
        is_last: Its sender dies.
        effect: What it does when it lands.
    """

    def __init__(self, *, is_last: bool) -> None:
        self.is_last = is_last
        self.effect: Callable[[], None] | None = None

    def land(self) -> None:
        effect, self.effect = self.effect, None
        if effect is not None:
            effect()


def _woken(kernel: Kernel) -> Callable[[], None]:
    """What wakes the calling thread, unless it has gone on by then."""
    task = kernel.current
    assert task is not None
    turn = task.turn
    return lambda: kernel.wake(task) if task.turn == turn else None
