"""Listings, exports, adapters, replicas, many tensors, many ranks, many saves."""

from benchmarks.tables.markdown import result, run, table

_RANKS, _TENSORS = 4096, 5000
_LISTED = {
    "listing() with reasons": "`ls`: all, with reasons",
    "choose() newest": "the newest that can be resumed from",
}


_WHERE = {"directory": "a directory, 8 ranks", "Ceph": "Ceph, 1 rank"}


def sections():
    """Of the page."""
    yield "## Training beside a save, many saves, many tensors"
    yield run("interference")
    yield interference()
    yield run("memory")
    yield run("memory-ddpx2")
    yield _MEMORY
    yield memory()
    yield run("small")
    yield small()
    yield "## Many ranks"
    yield f"{_RANKS:,} ranks and {_TENSORS:,} tensors, simulated in one process: CPU s of the coordinator."
    yield run("scale")
    yield scale()
    yield "## Replicas are compared"
    yield run("replicas")
    yield replicas()
    yield "## Adapters"
    yield run("adapter")
    yield adapters()
    yield "## Listings"
    yield run("listing")
    yield run("listing-ceph")
    yield listings()
    yield "## Export and import"
    yield run("export")
    yield exports()


def interference():
    """Of undisturbed speed; of each round."""
    rows = []
    for setting, (row,) in result("interference")["settings"].items():
        speeds = sorted(each["speed"] for each in row["rounds"][1:])
        rows.append([setting, f"{row['speed']:.2f}", f"{speeds[0]:.2f} to {speeds[-1]:.2f}"])
    return table(["training speed while a save goes on", "median", "of the rounds"], rows)


def memory():
    """Over many saves."""
    rows = [
        [setting, f"{row['memory']:.2f}", f"{row['memory_grown']:.3f}"]
        for name in ("memory", "memory-ddpx2")
        for setting, (row,) in result(name)["settings"].items()
        if "memory" in row
    ]
    return table(
        ["host memory, of what is written", "peak over 100 saves", "grown from the first tenth to the last"], rows
    )


def small():
    """What a tensor costs beside its bytes."""
    row = result("small")["measured"]
    cells = [f"{row[name]:.2f} s" for name in ("call_s", "durable_s", "least_s", "first_call_s")]
    headings = [
        "100,000 tensors of 4 KiB",
        "`save()`",
        "durable",
        "one tensor of that size",
        "first `save()`",
        "us a tensor, wanted ≤ 20",
    ]
    return table(headings, [["", *cells, f"{row['over_us']:.1f}"]])


def scale():
    """By phase."""
    found = [row for row in result("scale")["rows"] if (row["ranks"], row["tensors"]) == (_RANKS, _TENSORS)]
    rows = [[row["phase"], f"{row['s']:.3f}", f"{row['nbytes']:,}", _received(row)] for row in found]
    return table(["phase", "CPU s", "bytes", "received by each rank"], rows)


def replicas():
    """Against not looking at all."""
    rows = [
        [
            f'`validate="{row["way"]}"`',
            *(f"{row[name]:.2f}" for name in ("blocked_x_off", "committed_x_off", "cpu_x_off")),
        ]
        for row in result("replicas")["rows"]
    ]
    return table(["DDP, of `off`", "`save()` blocks", "committed", "CPU s"], rows)


def adapters():
    """Bytes of one checkpoint."""
    rows = [
        [row["way"], row["model"], f"{row['nbytes']:,}", f"{row['of_everything']:.4f}"]
        for row in result("adapter")["rows"]
    ]
    return table(["LoRA of rank 4 on the attention, AdamW", "model", "bytes", "of training everything"], rows)


def listings():
    """Seconds."""
    found = [row for name in ("listing", "listing-ceph") for row in result(name)["rows"] if _once(name, row)]
    rows = [
        [_LISTED[row["what"]], _WHERE[row["where"]], f"{row['commits']:,}", f"{row['s']:.2f} s"]
        for row in found
        if row["what"] in _LISTED
    ]
    return table(["what", "where", "commits", "time"], rows)


def _once(name, row):
    """The second run has directories, too."""
    return name == "listing" or row["where"] == "Ceph"


def exports():
    """Time, and memory of the process itself."""
    rows = [
        [row["system"], f"{row['seconds']:.1f} s", f"{row['gib_per_s']:.2f}", f"{row['anon_nbytes'] / 2**20:.0f} MiB"]
        for row in result("export")["rows"]
    ]
    return table(["2 GiB", "time", "GiB/s", "memory above the start"], rows)


def _received(row):
    return f"{row['received_nbytes']:,}" if "received_nbytes" in row else ""


_MEMORY = """In the first run the C library is told to give large blocks back at once, as the benchmark has it since.
The second is from before: of what the training under DDP itself takes more than half is holes in its heap, which
grows into the number, by 0.03 of the state where nobody saves."""
