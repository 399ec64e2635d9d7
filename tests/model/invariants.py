"""What must be true after every event, whatever happened. Checked as things change; nothing is read twice.

The ledger watches the run root and hears from each simulated rank what it was told. It knows the run root as it is at
each moment, which no rank ever does, and judges by what a stranger would see there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcpsvc.errors import (
    CommitUnknownError,
    FencedError,
    RanksMissingError,
    SaveError,
    SaveFailedError,
    SaveSkippedError,
)
from dcpsvc.format import epochs, keys
from dcpsvc.stages import discover
from tests.model.files import TornError, files_of, is_whole
from tests.model.owners import Owners
from tests.model.stores import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.errors import RankFailure
    from dcpsvc.format.keys import Attempt, Epoch
    from dcpsvc.settling import Settled
    from tests.model.host import Host
    from tests.model.kernel import Kernel
    from tests.model.stores import Space


class BrokenInvariantError(Exception):
    """The protocol did what it must never do."""


@dataclass(slots=True)
class _Attempt:
    """What is known about one attempt.

    Attributes:
        existed: Its manifest's bytes, once it was there.
        appeared: When it came, the last time.
        author: The job that wrote it: the one that made the attempt, or one that finished its upload.
        confirmed: Some rank was told that it is committed.
        retired: The policy has let it go since.
        returned: Its manifest came back after that: when, and whether there was anything behind it.
        denied: Ranks that were told that it is not, and the type of the error.
        shared: What ranks heard that were in touch all the time, and who heard it first.
    """

    existed: bytes | None = None
    appeared: float = 0.0
    author: Epoch | None = None
    confirmed: bool = False
    retired: bool = False
    returned: tuple[float, bool] | None = None
    denied: dict[int, str] = field(default_factory=dict[int, str])
    shared: tuple[object, int] | None = None


class Ledger:
    """Everything that was promised and everything that is there.

    Args:
        kernel: For the time, and the trace.
        space: The run root.
        keep_newest: How many commits the policy keeps; None: all.
    """

    def __init__(self, kernel: Kernel, space: Space, keep_newest: int | None) -> None:
        self._kernel, self._space, self._keep = kernel, space, keep_newest
        self._snapshot = Snapshot(space)
        self.outcomes: Counter[str] = Counter()
        self._attempts: dict[Attempt, _Attempt] = defaultdict(_Attempt)
        self.needed: dict[str, tuple[bytes, int]] = {}
        self._files: dict[Attempt, list[str]] = {}
        self.valid: list[Attempt] = []
        self.owners = Owners(kernel, self.broken, self.outcomes)
        self.newest_confirmed = -1
        self.resumed: dict[Epoch, Attempt] = {}
        self.on_expiry: Callable[[], None] = lambda: None
        space.watch = self.changed
        space.asked = self.owners.asked

    @property
    def owner(self) -> Epoch:
        """Who owns the run root."""
        return self.owners.newest

    # --- what happens at the run root ---------------------------------------------------------------------------

    def changed(self, key: str, old: bytes | None, new: bytes | None, author: Host) -> None:
        """An object appeared, changed or went."""
        if key in self.needed and new != self.needed[key][0]:
            what = "was deleted" if new is None else "was changed"
            users = [str(attempt) for attempt, files in self._files.items() if key in files]
            raise self.broken(f"{key}, which commits {users} need, {what} by {author.process.name}")
        if key.startswith(keys.EPOCHS):
            self._epoch_changed(key, new)
        elif (attempt := keys.attempt_of(key)) is not None and key == attempt.manifest:
            self._manifest_changed(attempt, old, new, author)

    def _epoch_changed(self, key: str, new: bytes | None) -> None:
        named = keys.epoch_of(key)
        if named is None:
            return
        epoch, inherits = named
        if inherits:
            self._look_again(None)
        elif new is not None:
            self.owners.claim(epoch)

    def _manifest_changed(self, attempt: Attempt, old: bytes | None, new: bytes | None, author: Host) -> None:
        known = self._attempts[attempt]
        if new is None:
            self._kernel.note("manifest gone", str(attempt))
            self._check_deletion(attempt, author)
            known.returned = None
        else:
            self._kernel.note("manifest appears", str(attempt))
            if old is not None or known.existed not in {None, new}:
                raise self.broken(f"the manifest of {attempt} was written again, with other bytes")
            known.existed, known.appeared, known.author = new, self._kernel.now, author.epoch
            if known.retired:
                self._check_return(attempt, author)
        self._look_again(author)
        if new is not None and attempt in self.valid and known.denied and author.epoch == attempt.epoch:
            raise self.broken(f"ranks {sorted(known.denied)} heard that {attempt} failed, and now it is a checkpoint")

    def _check_return(self, attempt: Attempt, author: Host) -> None:
        """The policy let it go, and then a write of its manifest landed that was on its way all the time.

        No store can prevent that. Whoever wrote it must see, if nothing was left by then; else a later start does.
        """
        if author.token == self.owner.token:
            raise self.broken(f"{author.process.name} writes the manifest of {attempt}, which was deleted")
        is_hollow = not self._space.entries(attempt.data)
        self._attempts[attempt].returned = (self._kernel.now, is_hollow)
        behind = "nothing" if is_hollow else "a deletion under way"
        self.outcomes[f"a deleted checkpoint's manifest landed late, on {behind}"] += 1

    def _look_again(self, author: Host | None) -> None:
        """What counts now, as discovery sees it; the files of what is new must be there."""
        valid = [one for one in self._counting() if not self._is_ghost(one)]
        for attempt in valid:
            if attempt not in self._files:
                self._need(attempt)
        for attempt in [one for one in self._files if one not in valid]:
            self._release(attempt)
            known = self._attempts[attempt]
            if known.confirmed and not known.retired:
                raise self.broken(f"{attempt}, of which ranks heard that it is committed, does not count any more")
        self.valid = valid
        newest = max((attempt.step for attempt in valid), default=-1)
        if newest < self.newest_confirmed:
            raise self.broken(f"the newest commit is step {newest}, and step {self.newest_confirmed} was confirmed")

    def _counting(self) -> list[Attempt]:
        return discover.committed(self._snapshot)  # type: ignore[arg-type]

    def _is_ghost(self, attempt: Attempt) -> bool:
        """Deleted, though its manifest stands there again: discovery must pass over it if any file of it is gone."""
        return self._attempts[attempt].returned is not None

    def _need(self, attempt: Attempt) -> None:
        """A checkpoint that is new: its files must be there, and stay."""
        try:
            self._files[attempt] = files = files_of(self._space, attempt)
        except TornError as err:
            raise self.broken(f"{attempt} is a checkpoint, and {err}") from None
        for path in files:
            content, users = self.needed.get(path, (self._space.objects[path], 0))
            self.needed[path] = (content, users + 1)

    def _release(self, attempt: Attempt) -> None:
        for path in self._files.pop(attempt):
            content, users = self.needed.pop(path)
            if users > 1:
                self.needed[path] = (content, users - 1)

    def _check_deletion(self, attempt: Attempt, author: Host) -> None:
        """A manifest goes: that must be what the policy says, or it never was a checkpoint."""
        known = self._attempts[attempt]
        if attempt not in self.valid or not (known.confirmed or self._is_inherited(attempt)):
            return
        newer = [one for one in self.valid if one > attempt]
        if self._keep is None or len(newer) < self._keep:
            raise self.broken(f"{author.process.name} deletes {attempt}; only {len(newer)} commits are newer")
        if self.resumed.get(self.owner) == attempt:
            raise self.broken(f"{author.process.name} deletes {attempt}, which the running job resumed from")
        known.retired = True
        self.outcomes["expired"] += 1
        self.on_expiry()

    def _is_inherited(self, attempt: Attempt) -> bool:
        for key in sorted(self._space.objects, reverse=True):
            if (named := keys.epoch_of(key)) is not None and named[1]:
                return attempt in epochs.load_inheritance(key, self._space.objects[key]).attempts
        return False

    # --- what ranks are told ------------------------------------------------------------------------------------

    def believed(self, host: Host, attempt: Attempt) -> None:
        """A rank heard that an attempt is committed."""
        known = self._attempts[attempt]
        if attempt not in self.valid and not known.retired:
            raise self.broken(f"{host.process.name} believes that {attempt} is committed, and it is not")
        if known.returned is not None and known.returned[1] and host.epoch == attempt.epoch:
            raise self.broken(f"{host.process.name} believes that {attempt} is committed, and it was deleted before")
        known.confirmed = True
        if attempt in self.valid:
            self.newest_confirmed = max(self.newest_confirmed, attempt.step)

    def settled(self, host: Host, settled: Settled) -> None:
        """A rank has opened the run: what it starts from is what counts, unless somebody has taken over already."""
        if self.owner > settled.epoch:
            return
        known = set(settled.committed)
        if missing := [attempt for attempt in self.valid if attempt not in known and attempt.epoch < settled.epoch]:
            raise self.broken(f"{host.process.name} does not know of the commits {[str(one) for one in missing]}")
        for attempt in settled.committed:
            if not self._is_ghost(attempt):
                self.believed(host, attempt)
        for attempt in settled.unfinished:
            self.outcomes["left unfinished (seen by a rank)"] += 1
            if attempt in self.valid:
                raise self.broken(f"{host.process.name} is going to delete {attempt}, which is committed")
        for attempt in settled.recovered:
            self.outcomes["recovered (seen by a rank)"] += 1
            for name in set(self._attempts[attempt].denied.values()):
                self.outcomes[f"recovered after {name} was reported"] += 1

    def chose(self, host: Host, attempt: Attempt | None, newest_before: int) -> None:
        """A rank resumes."""
        if self.owner > host.epoch:
            return
        step = -1 if attempt is None else attempt.step
        if step < newest_before:
            raise self.broken(f"{host.process.name} resumes from step {step}; step {newest_before} is committed")
        if attempt is not None and self._is_ghost(attempt) and not is_whole(self._space, attempt):
            raise self.broken(f"{host.process.name} resumes from {attempt}, whose data is gone")
        if attempt is not None:
            self.resumed[host.epoch] = attempt

    def heard(self, host: Host, attempt: Attempt, error: SaveError | None) -> None:
        """A rank's save has ended."""
        known = self._attempts[attempt]
        if error is None:
            if not known.confirmed:
                raise self.broken(f"{host.process.name} was told of no error, and not that {attempt} is committed")
            self.outcomes["rank heard: committed"] += 1
            return
        self.outcomes[f"rank heard: {type(error).__name__}"] += 1
        if isinstance(error, (SaveFailedError, RanksMissingError, SaveSkippedError)):
            if known.existed is not None:
                self._check_denial(host, attempt, error)
            known.denied[host.rank] = type(error).__name__
        elif not isinstance(error, (CommitUnknownError, FencedError)):
            raise self.broken(f"{host.process.name} raises {error!r}")
        self._check_same(host, attempt, error)

    def _check_denial(self, host: Host, attempt: Attempt, error: SaveError) -> None:
        """A job that was replaced cannot know what its successor has finished; of its own doing it must know."""
        known = self._attempts[attempt]
        if known.author == attempt.epoch or self.owner <= attempt.epoch:
            raise self.broken(f"{host.process.name} reports {error}; but its manifest is there")
        self.outcomes["reported as broken off after a successor had finished it"] += 1

    def _check_same(self, host: Host, attempt: Attempt, error: SaveError) -> None:
        """What was decided together reads the same on every rank."""
        failures: tuple[RankFailure, ...] = getattr(error, "failures", ())
        if host.troubled or isinstance(error, CommitUnknownError):
            return
        said: object = (type(error).__name__, failures)
        if isinstance(error, RanksMissingError):
            said = (type(error).__name__, error.phase, error.missing, error.present)
        elif isinstance(error, FencedError):
            said = (type(error).__name__, error.reason)
        known = self._attempts[attempt]
        if known.shared is None:
            known.shared = (said, host.rank)
        elif known.shared[0] != said:
            raise self.broken(
                f"for {attempt} rank {known.shared[1]} heard {known.shared[0]} and rank {host.rank} heard {said}"
            )

    @property
    def ghosts(self) -> list[Attempt]:
        """Manifests that came back."""
        return [attempt for attempt, known in self._attempts.items() if known.returned is not None]

    def tidied(self, owner: Epoch, step: int) -> None:
        """The last job has committed: of what older ones left before it came nothing is there any more."""
        for key in self._space.objects:
            attempt = keys.attempt_of(key)
            if attempt is None or key != attempt.manifest or attempt.epoch >= owner or attempt.step > step:
                continue
            known = self._attempts[attempt]
            is_gone = known.returned is not None and not self._space.entries(attempt.data)
            if (is_gone or attempt not in self._counting()) and known.appeared < self.owners.claimed[owner]:
                raise self.broken(f"the manifest of {attempt} stays for ever")

    def took(self, host: Host, what: str, seconds: float, limit_s: float) -> None:
        """Something that has deadlines has ended."""
        if seconds > limit_s:
            raise self.broken(f"{host.process.name}: {what} took {seconds:.1f} s, its deadlines add up to {limit_s} s")

    def escaped(self, host: Host, what: str, error: BaseException) -> None:
        """An exception came out where only typed ones may."""
        raise self.broken(f"{host.process.name}: {what} raised {error!r}") from error

    def broken(self, text: str) -> BrokenInvariantError:
        """What to raise; the history ends with it, whoever catches it."""
        self._kernel.note("BROKEN", text)
        error = BrokenInvariantError(f"at {self._kernel.now:.3f} s: {text}")
        self._kernel.failure = self._kernel.failure or error
        return error
