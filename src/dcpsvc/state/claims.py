"""What each rank says it saves, in a form that ranks can compare: structure before a byte is written, values after.

One digest per component travels with every save, and one for each group of ranks that hold the same parts. Only when
digests differ are the details exchanged, key by key, so the error can name what differs and on which ranks.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from dcpsvc.format.digest import digest
from dcpsvc.format.parse import compact
from dcpsvc.format.shardfile import INNER
from dcpsvc.state import documents
from dcpsvc.state.collected import Sharing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcpsvc.state.collected import Collected

Claims = dict[str, dict[str, str]]
"""Component -> key -> what this rank says about it. A group of ranks is a component of them alone."""

GROUP = "="
"""Begins the names of such: no component is called so."""
_MAX_TEXT = 64


def of_tensors(collected: Collected) -> Claims:
    """What of that is said of tensors: the same for all saves of one structure."""
    said: Claims = defaultdict(dict)
    for key, item in collected.items.items():
        if item.sharing is not Sharing.PER_RANK:
            said[component_of(key)][key] = item.claim
    return said


def claims(collected: Collected, tensors: Claims | None = None) -> Claims:
    """Everything the ranks must agree on, but for the values of replicated tensors: see ``replicas``.

    Args:
        collected: This rank's part.
        tensors: As :func:`of_tensors` gave it for the same structure.
    """
    known = of_tensors(collected) if tensors is None else tensors
    said: Claims = defaultdict(dict, {component: dict(keys) for component, keys in known.items()})
    for key, text in collected.agreed.items():
        said[component_of(key)][key] = text
    for key, of in collected.aliases.items():
        said[component_of(key)][key] = f"is {of}"
    for name, document in collected.documents.items():
        mine = said[component_of(name)]
        # A tensor has said more than its place already.
        leaves = documents.leaves(document, name, but=mine)
        mine |= {path: _text(leaf) for path, leaf in leaves.items() if path not in mine}
    for name in map(component_of, collected.own_documents):
        if name != INNER:  # ranks that have parts of a model may have none
            said[name][name] = "per rank"
    return said


def of_option(name: str, value: str | None) -> Claims:
    """That this rank was given an option, whose name has a blank and so is no component's."""
    return {} if value is None else {name: {name: value}}


def is_option(key: str) -> bool:
    """Whether a key is of :func:`of_option`."""
    return " " in component_of(key)


def component_of(key: str) -> str:
    """The name in the user's mapping that a key belongs to."""
    return key.split(".", 1)[0].split("@", 1)[0]


def digests(said: Claims) -> dict[str, str]:
    """One digest per component."""
    return {component: digest(compact(sorted(keys.items()))) for component, keys in said.items()}


class Digests:
    """As :func:`digests`, of one save after the other: most say what the last one said. One thread."""

    def __init__(self) -> None:
        self._last: Claims = {}
        self._digests: dict[str, str] = {}

    def of(self, said: Claims) -> dict[str, str]:
        """One digest per component, worked out anew where it says something else than the last time."""
        new = {component: keys for component, keys in said.items() if self._last.get(component) != keys}
        kept = {component: self._digests[component] for component in said if component not in new}
        self._last, self._digests = said, kept | digests(new)
        return self._digests


def differing(by_rank: Sequence[Mapping[str, str]]) -> list[str]:
    """Components whose digests are not the same everywhere, or that not every rank has; a group's, in the group."""
    names = sorted({name for rank in by_rank for name in rank})
    return [name for name in names if len({rank.get(name) for rank in by_rank if _has(rank, name)}) > 1]


def disagreements(by_rank: Sequence[Claims]) -> list[tuple[str, dict[str, list[int]]]]:
    """Keys on which the ranks differ: for each, what is said and by whom. ``absent`` where a rank lacks it."""
    keys = sorted({(key, name) for said in by_rank for name, component in said.items() for key in component})
    found: list[tuple[str, dict[str, list[int]]]] = []
    for key, name in keys:
        answers: dict[str, list[int]] = defaultdict(list)
        for rank, said in enumerate(by_rank):
            if _has(said, name):
                answers[said.get(name, {}).get(key, "absent")].append(rank)
        if len(answers) > 1:
            found.append((key, dict(answers)))
    return found


def _has(said: Mapping[str, Any], component: str) -> bool:
    return component in said or not component.startswith(GROUP)


def _text(leaf: Any) -> str:
    data = compact(leaf)
    return data.decode() if len(data) <= _MAX_TEXT else f"{data[:24].decode()}... ({digest(data)[:12]})"
