"""Uploads to an S3 server and resumes, beside other clients, and their goals."""

from benchmarks.common.goals import Goal
from benchmarks.tables.markdown import goals, result, run, table

_OURS = "dcpsvc"
_CLIENTS = ("obstore", "boto3", "s3torchconnector (CRT)")


def sections():
    """Of the page."""
    yield "## Uploading to S3"
    yield _UPLOADS
    yield run("upload")
    yield uploads()
    yield goals(upload_goals())
    yield _UPLOAD_WHY
    yield unchanged()
    yield "## Resuming"
    yield _RESUMES
    yield run("resume")
    yield resumes()
    yield goals(resume_goals())
    yield _RESUME_WHY
    yield run("ceiling")
    yield ceiling()
    yield "Bytes that the run root gives for each byte needed, when the number of ranks or the mesh changes:"
    yield resharded()


def uploads():
    """Rates, and of the best other."""
    one, many = (_by_system(rows) for rows in result("upload")["settings"].values())
    rows = [
        [name, *(f"{each[name][what]:.{digits}f}" for each in (one, many) for what, digits in _UPLOADED)]
        for name in one
    ]
    headings = ["", "1 GiB, MiB/s", "of best other", "CPU s/GiB", "64 x 16 MiB, MiB/s", "of best other", "CPU s/GiB"]
    return table(headings, rows)


def upload_goals():
    """What was asked for, of the default client and of the fast one."""
    found = result("upload")
    for title, rows in found["settings"].items():
        systems = _by_system(rows)
        writer = systems["DCP FsspecWriter"]["mib_per_s"]
        ours, plain = systems[_OURS], systems[f"{_OURS}, CRC32"]
        yield Goal(f"{title}, of the best other client, with `[fast]`", ours["of_best_peer"], 0.9, least=True)
        yield Goal(f"{title}, the same without `[fast]`", plain["of_best_peer"], 0.9, least=True)
        yield Goal(f"{title}, in multiples of DCP's FsspecWriter", ours["mib_per_s"] / writer, 3, least=True)
    for row in found["beside"]["training while uploading"]:
        if row["system"].startswith(_OURS):
            yield Goal(f"training beside it is slower by ({row['system']})", row["slower_by"], 0.05)


def unchanged():
    """Half of the file is the same as in the newest checkpoint."""
    halves = {title: rows for title, rows in result("upload")["beside"].items() if title.startswith("half")}
    rows = [
        [title, f"{sent['seconds']:.2f} s", f"{copied['seconds']:.2f} s", f"{copied['of_sending']:.2f}"]
        for title, (sent, copied) in halves.items()
    ]
    return table(["", "all is sent", "half is copied by the server", "of sending all"], rows)


def resumes():
    """Seconds, and in multiples of ours."""
    rows = [
        [title, row["system"], f"{row['seconds']:.3f} s", f"{row['x_ours']:.2f}", _over(row)]
        for title, found in result("resume")["settings"].items()
        for row in found
    ]
    return table(
        ["what", "system", "time", "x ours", "memory over the state"], [[_TITLES.get(t, t), *rest] for t, *rest in rows]
    )


def resume_goals():
    """What was asked for."""
    settings = {title: _by_system(rows) for title, rows in result("resume")["settings"].items()}
    for heat in ("warm", "cold"):
        found = settings[f"resume, local tier, {heat}"]
        yield Goal(
            f"`resume()`, local, {heat}, of the speed of plain reads", found["plain reads"]["x_ours"], 0.8, least=True
        )
        yield Goal(f"`resume()`, local, {heat}, in multiples of DCP load", found["DCP load"]["x_ours"], 2, least=True)
    for heat in ("warm", "cold"):
        found = settings[heat]["DCP load"]["x_ours"]
        yield Goal(f"`load()` of a module, local, {heat}, in multiples of DCP load", found, 2, least=True)
    best = min(settings["S3"][client]["x_ours"] for client in _CLIENTS if client in settings["S3"])
    yield Goal("`load()` from S3, of the best client's speed for the plain bytes", best, 0.9, least=True)
    yield Goal(
        "`load()` from S3, in multiples of FsspecReader", settings["S3"]["DCP FsspecReader"]["x_ours"], 3, least=True
    )
    (whole,) = settings["resume, S3, empty disk"].values()
    yield Goal("bytes fetched for each byte needed", whole["fetched"], 1.02)
    yield Goal("host memory above the state, of 256 MiB", whole["over_mib"] / 256, 1)


def ceiling():
    """What proving everything before anything is touched leaves of the speed of plain reads."""
    warm, cold = (_by_system(rows) for rows in result("ceiling")["settings"].values())
    rows = [
        [
            name,
            *(f"{each[name]['seconds']:.3f} s" for each in (warm, cold)),
            f"{warm[name]['x_plain']:.2f}",
            f"{cold[name]['x_plain']:.2f}",
        ]
        for name in warm
    ]
    return table(["", "warm", "cold", "of a plain read, warm", "cold"], rows)


def resharded():
    """For each change."""
    rows = [
        [row["ranks"], f"{row['each_by_itself']:.3f}", f"{row['from_root_when_shared']:.3f}"]
        for row in result("resume")["resharded"]
    ]
    return table(["ranks", "each by itself", "shared between ranks"], rows)


def _by_system(rows):
    return {row["system"]: row for row in rows if "skipped" not in row}


def _over(row):
    return f"{row['over_mib']:.0f} MiB" if "over_mib" in row else ""


_UPLOADED = (("mib_per_s", 0), ("of_best_peer", 2), ("cpu_s_per_gib", 2))
_TITLES = {
    "warm": "`load()` of a module, local, warm",
    "cold": "`load()` of a module, local, cold",
    "resume, local tier, warm": "`resume()`, local, warm",
    "resume, local tier, cold": "`resume()`, local, cold",
    "S3": "`load()`, S3",
    "resume, S3, empty disk": "`resume()`, S3, empty disk",
}

_UPLOADS = """A Ceph gateway on the same machine, so the server has one of the two cores. Ours checksums every
MiB before it sends it, and has the server prove every part; the others send (obstore, boto3 and the CRT sign,
"unsigned" does not). Without `[fast]`, s3fs carries the parts."""

_UPLOAD_WHY = """Of the clients measured, none gets to three times FsspecWriter's rate for 64 files; training is
slowed as by boto3, and by less with a limit on the rate. Half of the file unchanged since the newest
checkpoint:"""

_RESUMES = """1 GiB. Everything is proven before anything in the model is touched, so it is read twice; the
second table says what that alone leaves. `load()` of a module reads into tensors that are there; `resume()`
brings back a model and Adam into new memory, as DCP load does there."""

_RESUME_WHY = """Bold: not met. What two readings, the first of them hashed, can reach:"""
