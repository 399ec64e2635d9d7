"""Every error dcpsvc raises, as one tree. Callers decide by type, never by text.

::

    DcpsvcError
    |-- ConfigError                 an option that makes no sense
    |-- ClosedError                 the Checkpointer is closed, or not open yet
    |-- RootError                   the run root or the local tier cannot be used
    |   |-- NoRunError              nothing is stored there
    |   |-- UnsupportedFormatError  the root was written by another format version
    |   |-- DestinationError        a copy cannot go there: another run, or a later checkpoint
    |   `-- RunBusyError            another live process on this host writes this run
    |-- StateError                  something in the state cannot be saved or loaded as declared
    |   |-- UnsupportedStateError   an object that is neither tensor nor JSON-like, named by key
    |   |-- SharingError            a declaration that this rank, or another component, contradicts
    |   |-- StateMismatchError      the checkpoint and the state in memory do not fit
    |   |   `-- StructureMismatchError  in keys, shapes or dtypes: with a table of all differences
    |   `-- TornSnapshotError       a tensor was changed while it was being copied
    |-- SaveError                   one attempt to save one step did not become a checkpoint
    |   |-- SaveFailedError         ranks failed, or disagreed about what to save
    |   |-- RanksMissingError       ranks did not arrive before the deadline
    |   |-- FencedError             a newer job has taken the run root over; this one must end
    |   |-- SaveSkippedError        left out, or given up for a newer one, as backpressure= says; no failure
    |   |-- CommitUnknownError      the commit may or may not have happened; only the store can tell
    |   `-- StepExistsError         the step is already committed
    |-- RestoreError                a checkpoint cannot be read back
    |   |-- NoSuchStepError         an explicitly named step that is not there
    |   |   `-- StepDeletedError    it was, and is being deleted, or was while somebody read it
    |   |-- NoValidCheckpointError  commits exist, and every one of them is damaged
    |   `-- RestoreFailedError      a rank could not read, or did not arrive
    |-- CheckpointGoneError         metrics or a pin for a checkpoint that is not there, or being deleted
    |-- RemovalRefusedError         a checkpoint that must not be deleted: the last one, pinned, in use
    |-- ExportError                 a checkpoint cannot be written in a foreign format
    |-- ForeignFormatError          what another library wrote cannot be taken
    |-- FormatError                 a file of ours that does not say what it should
    |   |-- ManifestError
    |   |-- LayoutError
    |   `-- CorruptShardError       bytes that do not match their checksum, or are missing
    |-- StoreError                  the run root's store said no
    |   |-- StoreNotFoundError
    |   |-- StoreObjectError        an object that is not what it should be
    |   |-- NoBucketError           no bucket of that name; none is ever created
    |   |-- StoreAccessError        credentials or permissions
    |   |-- StoreFullError          no space left
    |   `-- StoreUnavailableError   transient: worth another try
    |       `-- StoreThrottledError the server asks for fewer requests
    `-- WaitTimeoutError            wait() or close() ran out of time
"""

from __future__ import annotations

from dcpsvc.errors.checkpoint import (
    CheckpointGoneError,
    ExportError,
    ForeignFormatError,
    NoSuchStepError,
    NoValidCheckpointError,
    RemovalRefusedError,
    RestoreError,
    RestoreFailedError,
    StepDeletedError,
)
from dcpsvc.errors.format import CorruptShardError, FormatError, LayoutError, ManifestError
from dcpsvc.errors.save import (
    CommitUnknownError,
    FencedError,
    RanksMissingError,
    SaveError,
    SaveFailedError,
    SaveSkippedError,
    StepExistsError,
)
from dcpsvc.errors.service import (
    ClosedError,
    ConfigError,
    DcpsvcError,
    DestinationError,
    NoRunError,
    RankFailure,
    RootError,
    RunBusyError,
    UnsupportedFormatError,
    WaitTimeoutError,
)
from dcpsvc.errors.state import (
    SharingError,
    StateError,
    StateMismatchError,
    StructureMismatchError,
    TornSnapshotError,
    UnsupportedStateError,
)
from dcpsvc.errors.storage import (
    NoBucketError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreNotFoundError,
    StoreObjectError,
    StoreThrottledError,
    StoreUnavailableError,
)

__all__ = [
    "CheckpointGoneError",
    "ClosedError",
    "CommitUnknownError",
    "ConfigError",
    "CorruptShardError",
    "DcpsvcError",
    "DestinationError",
    "ExportError",
    "FencedError",
    "ForeignFormatError",
    "FormatError",
    "LayoutError",
    "ManifestError",
    "NoBucketError",
    "NoRunError",
    "NoSuchStepError",
    "NoValidCheckpointError",
    "RankFailure",
    "RanksMissingError",
    "RemovalRefusedError",
    "RestoreError",
    "RestoreFailedError",
    "RootError",
    "RunBusyError",
    "SaveError",
    "SaveFailedError",
    "SaveSkippedError",
    "SharingError",
    "StateError",
    "StateMismatchError",
    "StepDeletedError",
    "StepExistsError",
    "StoreAccessError",
    "StoreError",
    "StoreFullError",
    "StoreNotFoundError",
    "StoreObjectError",
    "StoreThrottledError",
    "StoreUnavailableError",
    "StructureMismatchError",
    "TornSnapshotError",
    "UnsupportedFormatError",
    "UnsupportedStateError",
    "WaitTimeoutError",
]

for _name in __all__:  # wherever its room is: so it pickles and is shown by the path that callers import
    globals()[_name].__module__ = __name__
