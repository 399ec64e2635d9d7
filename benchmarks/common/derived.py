"""Numbers that follow from measured ones."""

import os


def more(row):
    """Costs per GiB, rates, and how the first save compares with later ones."""
    gib, cores = row["nbytes"] / 2**30, os.cpu_count()
    if "cpu_s" in row:
        row["cpu_s_per_gib"] = row["cpu_s"] / gib
        row["gib_per_s"] = gib / row["durable_s"]
        row["first_of_later"] = row["first_durable_s"] / row["durable_s"]
    if "cpu_s" in row and "added_s" in row:
        row["added_of_cpu"] = row["added_s"] / max(row["cpu_s"] / cores, 1e-9)
    return row
