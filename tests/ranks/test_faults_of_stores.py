"""L1-L7: the store fails, hangs, lies or is late for one rank; all hear the same in time, and training goes on."""

import contextlib
import errno
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from dcpsvc.errors import StoreAccessError, StoreError, StoreFullError, StoreUnavailableError
from tests.ranks.lives import FAILED, MISSING, ROLES, UNKNOWN, Life, assert_the_laws_hold, side_by_side
from tests.ranks.rounds import BOUND_S, UPLOAD_S, Fault, live_through


def raising(make):
    def fault(real, key, *args):
        raise make(key)

    return fault


def once(fault):
    used = []

    def first(real, key, *args):
        if used:
            return real(key, *args)
        used.append(key)
        return fault(real, key, *args)

    return first


def after(calls, fault):
    """All is well for so many calls."""
    used = []

    def later(real, key, *args):
        used.append(key)
        return real(key, *args) if len(used) <= calls else fault(real, key, *args)

    return later


def no(kind):
    return lambda key: kind("put", key, "not today")


def taken_and(make):
    """The work is done, and the answer is lost."""

    def fault(real, key, *args):
        real(key, *args)
        raise make(key)

    return fault


def answering_no(real, key, *args):
    real(key, *args)
    return False


def cut_short(data):
    return data[: len(data) * 3 // 4]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def changing(change):
    """Something else than what was given is taken, and all is said to be well."""

    def fault(real, key, what):
        if isinstance(what, bytes):
            return real(key, change(what))
        with tempfile.NamedTemporaryFile() as other:
            other.write(change(what.read_bytes()))
            other.flush()
            return real(key, Path(other.name))

    return fault


def slow(real, key, *args):
    threading.Event().wait(UPLOAD_S / 4)
    return real(key, *args)


def nearly_too_slow(real, key, *args):
    threading.Event().wait(UPLOAD_S * 4 / 5)
    return real(key, *args)


class Hanging:
    """An operation that hangs until all have heard. Then it is done, or was done before, or is done from a copy."""

    def __init__(self, *, taken=False, copied=False):
        self._taken, self._copied = taken, copied
        self._gate, self._begun, self._ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, real, key, *args):
        if self._gate.is_set():
            return real(key, *args)
        self._begun.set()
        try:
            with tempfile.TemporaryDirectory() as folder:
                if self._copied:
                    args = (shutil.copy(args[0], folder),)
                result = real(key, *args) if self._taken else None
                self._gate.wait(BOUND_S)
                return result if self._taken else real(key, *map(Path, args) if self._copied else args)
        finally:
            self._ended.set()

    @contextlib.contextmanager
    def around(self, _):
        yield
        self.let_go()

    def let_go(self):
        self._gate.set()
        if self._begun.is_set():
            self._ended.wait(BOUND_S)


def hanging(place, hears, blames=None, *, calls=0, **how):
    operation = Hanging(**how)
    store = {place: after(calls, operation)}
    return Fault(store=store, around=operation.around, hears=hears, blames=blames, deadline_s=UPLOAD_S)


def hanging_on(place, hears, blames=None):
    """Also while the next save is made."""
    operation = Hanging()
    return Fault(store={place: operation}, ends=operation.let_go, hears=hears, blames=blames, deadline_s=UPLOAD_S)


def failing(place, fault, hears, blames=None, **more):
    return Fault(store={place: fault}, hears=hears, blames=blames, deadline_s=UPLOAD_S, **more)


FULL, ANY_TIME = ("StoreFullError",), ("StoreUnavailableError", "TimeoutError")
SHARD = "put_file data"

UPLOADS = {
    f"{name} its upload": fault
    for name, fault in {
        "the store refuses": failing(SHARD, raising(no(StoreError)), FAILED, ("upload", ("StoreError",))),
        "the store forbids": failing(SHARD, raising(no(StoreAccessError)), FAILED, ("upload", ("StoreAccessError",))),
        "the store has no room for": failing(SHARD, raising(no(StoreFullError)), FAILED, ("upload", FULL)),
        "the store is once not there for": failing(SHARD, once(raising(no(StoreUnavailableError))), ()),
        "the store is not there for": failing(
            SHARD, raising(no(StoreUnavailableError)), (*FAILED, *MISSING), ("upload", ANY_TIME)
        ),
        "the store loses its answer to": failing(SHARD, once(taken_and(no(StoreUnavailableError))), ()),
        "the store raises OSError for": failing(
            SHARD, raising(lambda _: OSError(errno.EIO, "I/O error")), FAILED, ("upload", ("OSError",))
        ),
        "the store raises MemoryError for": failing(
            SHARD, raising(lambda _: MemoryError()), FAILED, ("upload", ("MemoryError",))
        ),
        "the store raises SystemExit for": failing(
            SHARD, raising(lambda _: SystemExit(3)), FAILED, ("upload", ("RuntimeError",))
        ),
        "the store raises KeyboardInterrupt for": failing(
            SHARD, raising(lambda _: KeyboardInterrupt()), FAILED, ("upload", ("RuntimeError",))
        ),
        "the store hangs in": hanging(SHARD, (*FAILED, *MISSING), ("upload", ("TimeoutError",))),
        "the store hangs for long in": hanging_on(SHARD, (*FAILED, *MISSING), ("upload", ("TimeoutError",))),
        "the store has taken and hangs in": hanging(
            SHARD, (*FAILED, *MISSING), ("upload", ("TimeoutError",)), taken=True
        ),
        "the store takes too late": hanging(
            SHARD, (*FAILED, *MISSING), ("upload", ("TimeoutError",)), copied=True
        ),
        "the store is slow with": failing(SHARD, slow, ()),
        "the store cuts short": failing(SHARD, changing(cut_short), FAILED, ("upload", ("CorruptShardError",))),
        "the store damages": failing(SHARD, changing(flipped), FAILED, ("upload", ("CorruptShardError",))),
        "the store does not show": failing("read data", raising(no(StoreError)), FAILED, ("upload", ("StoreError",))),
        "the store hangs when it shows": hanging("read data", (*FAILED, *MISSING), ("upload", ("TimeoutError",))),
    }.items()
}  # fmt: skip


class Behind:
    """A listing that shows what was there when the fault began."""

    def __init__(self):
        self._known = set()

    def __call__(self, real, key):
        return [entry for entry in real(key) if entry.key in self._known]

    @contextlib.contextmanager
    def around(self, rounds):
        store = rounds.store
        self._known = {entry.key for entry in type(store).__mro__[1].list(store, "")}
        yield


def lagging():
    behind = Behind()
    places = ("list data", "list manifests", "list epochs", "list tombstones", "list layouts")
    return Fault(store=dict.fromkeys(places, behind), around=behind.around)


MANIFEST, OWNER = "create manifests", "list epochs"

COMMITS = {
    "the layout is refused": failing(
        "create layouts", raising(no(StoreError)), FAILED, ("upload", ("StoreError",)), regroups=True
    ),
    "the layout is cut short once": failing("create layouts", changing(cut_short), (), regroups=True),
    "the layout is always cut short": Fault(
        store={"create layouts": changing(cut_short), "put layouts": changing(cut_short)}, regroups=True,
        hears=FAILED, blames=("upload", ("CorruptShardError",)), deadline_s=UPLOAD_S,
    ),
    "the owner cannot be listed before the upload": failing(
        OWNER, raising(no(StoreError)), FAILED, ("upload", ("StoreError",))
    ),
    "the owner cannot be listed before the commit": failing(
        OWNER, after(1, raising(no(StoreError))), FAILED, ("commit", ("StoreError",))
    ),
    "the owner cannot be listed after the commit": failing(OWNER, after(2, raising(no(StoreError))), UNKNOWN),
    "the owner's listing hangs before the upload": hanging(
        OWNER, (*FAILED, *MISSING), ("upload", ("TimeoutError",))
    ),
    "the owner's listing hangs before the commit": hanging(
        OWNER, (*FAILED, *UNKNOWN), ("commit", ("TimeoutError",)), calls=1
    ),
    "the owner's listing hangs after the commit": hanging(OWNER, UNKNOWN, calls=2),
    "each call before the commit is slow": Fault(
        store=dict.fromkeys((OWNER, SHARD), nearly_too_slow), hears=(*FAILED, *MISSING), blames=("upload", ANY_TIME),
        deadline_s=UPLOAD_S,
    ),
    "the manifest is refused": failing(MANIFEST, raising(no(StoreError)), FAILED, ("commit", ("StoreError",))),
    "the manifest is taken and the answer lost": failing(MANIFEST, once(taken_and(no(StoreUnavailableError))), ()),
    "the manifest is taken and said to exist": failing(MANIFEST, answering_no, ()),
    "the manifest is not answered": failing(MANIFEST, raising(no(StoreUnavailableError)), UNKNOWN),
    "the manifest is cut short": failing(MANIFEST, changing(cut_short), FAILED, ("commit", ("StoreError",))),
    "the manifest is damaged": failing(MANIFEST, changing(flipped), FAILED, ("commit", ("StoreError",))),
    "the manifest hangs": hanging(MANIFEST, UNKNOWN),
    "the manifest is taken and hangs": hanging(MANIFEST, (*UNKNOWN, None), taken=True),
    "the manifest cannot be looked at": failing("get manifests", raising(no(StoreAccessError)), UNKNOWN),
    "the listing lags behind": lagging(),
    "what is expired cannot be listed": failing("list data", raising(no(StoreError)), ()),
    "no tombstone can be written": failing("create tombstones", raising(no(StoreError)), ()),
    "no manifest can be deleted": failing("delete manifests", raising(no(StoreError)), ()),
    "no shard can be deleted": failing("delete data", raising(no(StoreError)), ()),
    "deleting a shard hangs": hanging("delete data", ()),
    "the manifest raises MemoryError": failing(MANIFEST, raising(lambda _: MemoryError()), UNKNOWN),
    "the manifest raises SystemExit": failing(MANIFEST, raising(lambda _: SystemExit(3)), UNKNOWN),
    "deleting a shard raises SystemExit": failing("delete data", raising(lambda _: SystemExit(3)), ()),
}  # fmt: skip
"""Of the coordinator's store: it alone commits and deletes."""


# --- the jobs -------------------------------------------------------------------------------------------

FAULTS = UPLOADS | COMMITS


def live(rank, world, place, role, names):
    return live_through(rank, world, place, role, {name: FAULTS[name] for name in names})


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    uploads = [life for role in ROLES for life in Life(role=role, faults=UPLOADS, world=2).in_parts(2)]
    commits = Life(role="coordinator", faults=COMMITS, world=2).in_parts(3)
    return side_by_side(live, [*uploads, *commits], tmp_path_factory.mktemp("lived"))


CASES = [(role, name) for role in ROLES for name in (FAULTS if role == "coordinator" else UPLOADS)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("role", "name"), CASES)
def test_a_fault_of_the_store_of_one_rank_is_told_alike_to_all_in_time_and_costs_one_save_at_most(lived, role, name):
    assert_the_laws_hold(lived.case(role, name))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_all_that_the_ranks_close_in_peace_and_no_thread_is_left(lived):
    assert all(end == (None, []) for end in lived.ends()), lived.ends()
