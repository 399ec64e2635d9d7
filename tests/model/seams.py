"""Production classes with a window in them, and a light heartbeat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcpsvc.catalog import Catalog
from dcpsvc.errors import RankFailure
from dcpsvc.life import Life
from dcpsvc.ranks.rendezvous import Rendezvous
from dcpsvc.resuming import Resuming
from dcpsvc.stages import discover
from dcpsvc.storage.shards import VerifiedShard
from tests.model.limits import SLACK_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.intake import Chosen
    from dcpsvc.ranks.rendezvous import Meeting
    from dcpsvc.state.drift import Terms
    from tests.model.host import Host
    from tests.model.shard import SimFolders
    from tests.model.wires import KeyValueServer


class Pulse:
    """The ranks' store for a heartbeat: at once, or not at all."""

    def __init__(self, host: Host, server: KeyValueServer) -> None:
        self._host, self._server = host, server

    def set(self, key: str, value: str) -> None:
        if self._host.cut or self._server.down:
            raise RuntimeError("unreachable")
        self._server.values[key] = value

    def get(self, key: str) -> str | None:
        raise NotImplementedError(key)

    def compare_set(self, key: str, desired: str) -> str:
        raise NotImplementedError(key, desired)

    def delete(self, key: str) -> None:
        raise NotImplementedError(key)


class SimRendezvous(Rendezvous):
    """Every meeting keeps to its deadline; what the coordinator does to decide has deadlines of its own."""

    watch: Callable[[str, float, float], None]

    def meet(self, where: str, message: Any, decide: Callable[[list[Any]], Any], meeting: Meeting) -> Any:
        deciding_s = 0.0

        def timed(messages: list[Any]) -> Any:
            nonlocal deciding_s
            began = self.clock.now()
            try:
                return decide(messages)
            finally:
                deciding_s += self.clock.now() - began

        began = self.clock.now()
        try:
            return super().meet(where, message, timed, meeting)
        finally:
            self.watch(f"the meeting {where}", began, meeting.timeout_s + deciding_s + SLACK_S)


class SimCatalog(Catalog):
    """Tells what this rank comes to believe."""

    tell: Callable[[Attempt], None]

    def add(self, found: Manifest) -> None:
        self.tell(found.key)
        super().add(found)


class SimLife(Life):
    """Whose folders of PEFT, if any are asked for, are made without a model."""

    def __init__(self, folders: Callable[[Meeting], SimFolders], *given: Any) -> None:
        self._sim_folders = folders
        super().__init__(*given)

    def _asked_for(self, component: str | None) -> Any:
        return None if component is None else self._sim_folders(self._work)


class SimResuming(Resuming):
    """Resume without a model: every rank proves its share of the shards."""

    def _load(self, chosen: Chosen, terms: Terms) -> tuple[str, dict[str, str]]:
        message = None
        try:
            self._within(lambda: self._prove(chosen.attempt))
        except Exception as err:  # noqa: BLE001 - as Resuming._load does
            message = RankFailure(self.job.rank, "restore", type(err).__name__, str(err))
        self._meet(f"load-{chosen.attempt}/read", message, lambda _: None)
        return "loaded", {}

    def _prove(self, attempt: Attempt) -> None:
        found = discover.read_manifest(self.remote, attempt)
        for record in found.shards:
            if record.rank % self.job.world_size == self.job.rank:
                VerifiedShard([*self.nearer, self.remote], record).verify()
