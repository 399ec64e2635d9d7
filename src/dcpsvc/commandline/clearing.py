"""The command that deletes: gc."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from dcpsvc import progress
from dcpsvc.commandline.common import (
    EXIT_DAMAGED,
    Command,
    as_json_option,
    local_option,
    local_path,
    open_store,
    print_json,
    store_options,
    time_in_seconds,
)
from dcpsvc.commandline.steps import attempt_option, check_one, complete_step, number, step_typed
from dcpsvc.errors import ConfigError
from dcpsvc.format import keys, policy, run
from dcpsvc.stages import discover

if TYPE_CHECKING:
    from pathlib import Path

    from dcpsvc.storage.base import Store
    from dcpsvc.tools.clearing import Cleared
    from dcpsvc.tools.clearplan import Leftovers
    from dcpsvc.tools.clearrules import Rules
    from dcpsvc.tools.localtier import LocalLeftovers


def _age(text: str) -> float:
    return 0.0 if text in {"0", "0s"} else time_in_seconds(text)


@click.command("gc", cls=Command)
@click.argument("root")
@click.option("--dry-run", is_flag=True, help="Only tell what would go, and why the rest stays.")
@click.option(
    "--keep", metavar="RULES", help="Instead of the recorded policy, e.g. latest:3,best:2:loss:min,steps:1000."
)
@click.option(
    "--remove",
    "steps",
    type=step_typed,
    multiple=True,
    metavar="STEP",
    shell_complete=complete_step,
    help="This one goes too.",
)
@attempt_option
@click.option("--damaged", is_flag=True, help="Damaged checkpoints go too.")
@click.option("--force-last", is_flag=True, help="So may the newest checkpoint.")
@click.option(
    "--older-than",
    type=_age,
    default="24h",
    show_default=True,
    metavar="TIME",
    help="What is no checkpoint goes from this age on: it may be on its way, or wait for its upload.",
)
@click.option("--deletes-per-s", type=click.FloatRange(min=0, min_open=True), metavar="N", help="No faster than that.")
@click.option("--take-over", is_flag=True, help="The last job ran on another host, and has ended.")
@local_option
@store_options
@as_json_option
def gc_command(root: str, local: str | None, options: tuple[str, ...], **choices: Any) -> None:
    """Delete what the run at ROOT need not keep: by its policy, and what is no checkpoint.

    Checkpoints that the policy lets go; attempts that were never committed; shards, layouts and notes of nothing; ended
    leases, old probes, unfinished uploads. The same on this node's disk. No job of the run may be alive. What is
    pinned, being read, or needed by another checkpoint stays. Killed in the middle, the next call goes on.

    Exits with 1 if something had to stay that somebody began to use meanwhile.

    Examples:
      dcpsvc gc s3://bucket/runs/exp42 --dry-run
      dcpsvc gc ./runs/exp42 --keep latest:3,best:2:loss:min,steps:10000
      dcpsvc gc ./runs/exp42 --remove 500 --older-than 1h --deletes-per-s 50
    """
    from dcpsvc.tools import clearrules, localtier

    store = open_store(root, options)
    here = local_path(store, local)
    if choices["attempt"] is not None and len(choices["steps"]) != 1:
        raise click.UsageError("--attempt goes with one --remove STEP")
    steps = tuple(number(store, step) for step in choices["steps"])
    for step in steps:
        check_one(store, step, choices["attempt"])
    try:
        rules = clearrules.Rules(
            keep=None if choices["keep"] is None else policy.parse(choices["keep"]),
            typed=True,
            steps=steps,
            attempt=choices["attempt"],
            older_than_s=choices["older_than"],
            damaged=choices["damaged"],
            force_last=choices["force_last"],
            waiting=localtier.waiting(here, discover.committed(store), store.url),
        )
        if choices["dry_run"]:
            _tell(store, here, rules, as_json=choices["as_json"])
        else:
            _clear(store, here, rules, choices)
    except ConfigError as err:
        raise click.BadParameter(str(err), param_hint="--keep") from err


def _tell(store: Store, here: Path, rules: Rules, *, as_json: bool) -> None:
    from dcpsvc.tools import cleartables

    found, nearby = _find(store, here, rules)
    if as_json:
        print_json(_document(found, nearby) | {"dry_run": True})
    else:
        cleartables.print_plan(found, nearby)


def _find(store: Store, here: Path, rules: Rules) -> tuple[Leftovers, LocalLeftovers]:
    from dcpsvc.tools import leftovers, localtier

    now_s = time.time()
    found = leftovers.find(store, rules, now_s)
    gone = {one.attempt for one in found.doomed}
    staying = [attempt for attempt in discover.committed(store) if attempt not in gone]
    return found, localtier.find(here, staying, now_s - rules.older_than_s, store.url)


def _clear(store: Store, here: Path, rules: Rules, choices: dict[str, Any]) -> None:
    from dcpsvc.tools import clearing, cleartables, localtier

    found, nearby = _find(store, here, rules)
    run_id = run.loads(store.url, store.get(keys.RUN, max_nbytes=run.MAX_NBYTES)).run_id
    with progress.shown("freed", found.nbytes + nearby.nbytes, quiet=choices["as_json"]) as advance:
        pace = clearing.Pace(advance, choices["deletes_per_s"])
        done = clearing.clear(store, run_id, rules, pace, take_over=choices["take_over"])
        nearby = localtier.find(here, discover.committed(store), time.time() - rules.older_than_s, store.url)
        localtier.clear(here, nearby, time.time() - rules.older_than_s, pace)
    if choices["as_json"]:
        print_json(_document(found, nearby) | _done(done, nearby, pace.nbytes))
    else:
        cleartables.print_cleared(done, nearby, pace.nbytes, found.remarks)
    sys.exit(EXIT_DAMAGED if done.held else 0)


def _document(found: Leftovers, nearby: LocalLeftovers) -> dict[str, Any]:
    return {
        "policy": found.policy,
        "keep": [
            {"step": one.step, "attempt": one.attempt, "why": why, "nbytes": found.sizes.get(str(one), 0)}
            for one, why in found.keep.items()
        ],
        "remove": [one.document() for one in found.everything],
        "local_of": nearby.elsewhere,
        "local": [one.document() for one in nearby.everything],
        "unfinished": found.unfinished + nearby.unfinished,
        "spared": found.spared,
        "remarks": list(found.remarks),
        "nbytes": found.nbytes + nearby.nbytes,
        "freed_nbytes": _by_tier(found.nbytes, nearby.nbytes),
        "staying_nbytes": _by_tier(found.staying_nbytes, nearby.staying_nbytes),
    }


def _by_tier(remote: int, local: int) -> dict[str, int]:
    from dcpsvc.tools.listing import LOCAL, REMOTE

    return {REMOTE: remote, LOCAL: local}


def _done(done: Cleared, nearby: LocalLeftovers, nbytes: int) -> dict[str, Any]:
    said = done.document()
    return {
        "dry_run": False,
        "remove": said["removed"],
        "held": said["held"],
        "unfinished": done.unfinished + nearby.unfinished,
        "nbytes": nbytes,
        "freed_nbytes": _by_tier(done.nbytes, nbytes - done.nbytes),
    }
