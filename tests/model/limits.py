"""Short deadlines, so that a history is short, and what they add up to."""

from __future__ import annotations

SYNC_S = 1.0
UPLOAD_S = 4.0
BEAT_S = SYNC_S / 4
SLACK_S = 6.0
"""For single calls that are slow without being late."""

_DECIDE_S = 4 * UPLOAD_S
"""The coordinator's calls to the run root at the commit: whose is it, write, look, whose is it now."""

LIVE_LIMIT_S = (
    2 * SYNC_S  # plan, compare
    + 2 * SYNC_S  # a new group, the layout
    + UPLOAD_S  # the local disk
    + 2 * (UPLOAD_S + SYNC_S)  # both acknowledgements
    + 2 * UPLOAD_S  # shard, layout
    + UPLOAD_S + _DECIDE_S  # commit
    + 3 * UPLOAD_S  # retention: leftovers, debris, policy
    + SLACK_S
)  # fmt: skip
OPEN_LIMIT_S = 3 * UPLOAD_S + 4 * (2 * UPLOAD_S + 4 * UPLOAD_S) + SLACK_S
"""Claim and inheritance, and a few uploads to finish with a few shards each."""

LEAVE_LIMIT_S = 3 * SYNC_S + SLACK_S
