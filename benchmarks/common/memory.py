"""Host memory above the training's own while a system saves again and again."""

from benchmarks.common.process import PeakMemory

_TENTHS = 10
_SAVE_S = 20
"""Longest that one save may take, in the middle."""


def memory(crew, saves):
    """Sampled from outside, all processes of the system, shared pages counted once.

    Returns:
        ``memory``: the peak above the training's own, in multiples of the state; ``memory_grown``: by how much the
        peak of the last tenth of the saves is above that of the second.
    """
    with PeakMemory(crew.pids) as peak:
        crew.do("saves", timeout_s=saves * _SAVE_S, count=saves)
    above = [(sample - crew.base_nbytes) / crew.nbytes for sample in peak.samples]
    tenth = max(1, len(above) // _TENTHS)
    grown = max(above[-tenth:]) - max(above[tenth : 2 * tenth] or above)
    return {"memory": max(above), "memory_grown": grown}
