"""Saves beside other systems, the goals of three settings, and where the processor time of a save goes."""

from benchmarks.common.goals import of_saving
from benchmarks.peers import OURS, SYSTEMS
from benchmarks.tables.markdown import bound, measured, result, run, table

SETTINGS = {
    "FSDP2 x 1": "fsdp2x1-1536-peers",
    "FSDP2 x 2": "fsdp2x2-1536-peers",
    "DDP x 2": "ddpx2-1536-peers",
}
_HEADINGS = ["", "stall", "visible", "added", "durable", "speed", "CPU s/GiB", "memory"]


def sections():
    """Of the page."""
    yield "## Saving, beside other systems"
    yield _WORDS
    for setting, name in SETTINGS.items():
        yield f"### {setting}"
        yield run(name)
        yield systems(name)
        yield limits(name)
    yield "### Goals"
    yield goals()
    yield _WHY
    yield "## Where the processor time of a save goes"
    yield run("profile")
    yield profile()


def systems(name):
    """Ours in seconds, the others in multiples of ours in the same rounds."""
    rows = rows_of(name)
    ours = next(row for row in rows if row["system"] == OURS)
    return table(_HEADINGS, [_ours(ours), *(_other(row) for row in rows if row is not ours)])


def goals():
    """All settings side by side."""
    columns = [{goal.what: goal for goal in of_saving(rows_of(name))} for name in SETTINGS.values()]
    rows = [
        [what, bound(goal), *(measured(column[what]) if what in column else "" for column in columns)]
        for what, goal in columns[0].items()
    ]
    return table(["", "wanted", *SETTINGS], rows)


def limits(name):
    """Of the machine, in that run."""
    row = rows_of(name)[0]
    gib = row["nbytes"] / 2**30
    told = (f"{what.removesuffix('_s')} {s:.3f} s ({gib / s:.1f} GiB/s)" for what, s in row["limits"].items())
    return f"Limits of the machine in this run: {', '.join(told)}."


def profile():
    """CPU seconds by kind."""
    settings = result("profile")["settings"]
    first = next(iter(settings.values()))
    rows = [
        [kind, *(f"{each['kinds'][kind]:.3f}" for each in settings.values()), _least(first, kind)]
        for kind in first["kinds"]
    ]
    rows.append(["**all**", *(f"{each['cpu_s']:.3f}" for each in settings.values()), ""])
    return table(["CPU s of 1.5 GiB", *settings, "least there is"], rows)


def rows_of(name):
    """What was measured there."""
    (rows,) = result(name)["settings"].values()
    return [row for row in rows if "skipped" not in row]


def _least(setting, kind):
    least = setting["least"].get(kind)
    return "" if least is None else f"{least:.3f}"


def _ours(row):
    seconds = [f"{row[name]:.2f} s" for name in ("stall_s", "visible_s", "added_s", "durable_s")]
    return [f"**{row['label']}**", *seconds, f"{row['speed']:.2f}", f"{row['cpu_s_per_gib']:.2f}", _memory(row)]


def _other(row):
    mark = "" if SYSTEMS[row["system"]].fsyncs else " ¹"
    names = ("stall_s", "visible_s", "added_s", "durable_s")
    ratios = [_ratio(row, name) for name in names]
    speed = f"{row['speed']:.2f}" if "speed" in row else ""
    if row["torn"]:
        return [f"{row['label']}{mark}", *("torn ²" for _ in ratios), speed, "", ""]
    return [f"{row['label']}{mark}", *ratios, speed, _ratio(row, "cpu_s_per_gib"), _memory(row)]


def _ratio(row, name):
    if name not in row or not row["ours"].get(name):
        return ""
    ratio = row[name] / row["ours"][name]
    return f"{ratio:.1f} x" if ratio < 9.95 else f"{ratio:.0f} x"


def _memory(row):
    return f"{row['memory']:.2f}" if "memory" in row else ""


_WORDS = """1.5 GiB of model and AdamW state, training on both cores; medians of 5 rounds after one that does
not count, each system against ours of the same rounds. **Stall**: the call and what the optimizer step right
after it takes longer. **Visible**: the same with a forward and backward in between. **Added**: wall time a loop
loses by one checkpoint. **Durable**: until every byte is on the local disk, with fsync. **Speed**: training
while that goes on, of undisturbed. **Memory**: host memory above the training's own, in multiples of what is
written. ¹ does not fsync, which is added to its durable time. ² what came back was not what was saved: not
compared."""

_WHY = """Bold: not met. A training that keeps both cores busy has to give up what a save takes of the processor
(the profile below), so its speed, and the stall, are what the processor allows here. The second core is no
whole one: a step on two threads takes 0.72 of its time on one."""
