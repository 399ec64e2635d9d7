"""How large the state is that everybody saves. Needs no torch."""

_COPIES = 3  # a parameter, and AdamW's two moments of it
_ITEM_NBYTES = 4


def shape(mib):
    """Width and number of transformer blocks that make about so many MiB of model and AdamW state."""
    fitting = (width for width in (1024, 256, 64) if mib * 2**20 >= _nbytes(width, 1))
    width = next(fitting, 64)
    return width, max(1, round(mib * 2**20 / _nbytes(width, 1)))


def nbytes(mib):
    """Of that state, exactly but for the step counters."""
    return _nbytes(*shape(mib))


def _nbytes(width, depth):
    return depth * (12 * width**2 + 13 * width) * _COPIES * _ITEM_NBYTES
