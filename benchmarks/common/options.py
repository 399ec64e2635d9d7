"""The options all benchmarks share."""

import argparse
from pathlib import Path

from benchmarks.common.rounds import Setting
from benchmarks.peers import OURS, SYSTEMS

LEAST_ROUNDS = 5


def parser(doc, *, rounds=LEAST_ROUNDS, systems=None):
    """For one script.

    Args:
        doc: Its docstring.
        rounds: Measured after the first.
        systems: Measured unless told otherwise; None: all.
    """
    made = plain_parser(doc)
    made.add_argument("--mib", type=int, default=1536, help="of model and AdamW state (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=rounds, help="of which the medians are (default: %(default)s)")
    made.add_argument(
        "--settings", type=_settings, default="fsdp2x1", help="e.g. fsdp2x1,fsdp2x2,ddpx2 (default: %(default)s)"
    )
    made.add_argument(
        "--systems", type=_systems, default=[OURS, *(name for name in systems or SYSTEMS if name != OURS)],
        help=f"of {', '.join(SYSTEMS)}",
    )  # fmt: skip
    made.set_defaults(stopped=False)
    made.add_argument("--dir", default=None, help="where files are written (default: the temporary directory)")
    return made


def plain_parser(doc):
    """For a script that measures no system."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--out", type=Path, default=None, help="write the result there too, as JSON")
    return made


def _settings(text):
    return [Setting.parse(one) for one in text.split(",")]


def _systems(text):
    names = text.split(",")
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
    return names
