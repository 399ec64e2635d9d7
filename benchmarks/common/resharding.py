"""How many bytes of a transformer's checkpoint are fetched for each one needed, when other ranks read than wrote it.

Planned, not read: what each rank needs, in whole blocks, and who would read it. Parameters and both moments of Adam in
float32.
"""

import functools

from dcpsvc import allotment, reader
from dcpsvc.format import shardfile
from dcpsvc.format.digest import table_nbytes
from dcpsvc.format.keys import Attempt
from dcpsvc.format.layout import Chunk, Layout, Tensor
from dcpsvc.format.manifest import LayoutRef, Manifest, ShardRecord
from dcpsvc.format.shardfile import Piece
from dcpsvc.state.saved import Saved

ROWS, COLUMNS = 0, 1
ATTEMPT = Attempt(1, "1-cafecafe-0")


def transformer(hidden=1024, wide=2816, layers=8, words=32000):
    """Names, shapes, and the dimension that tensor parallelism cuts; None: it leaves it whole."""
    yield "embed.weight", (words, hidden), ROWS
    for layer in range(layers):
        for name in ("q", "k", "v"):
            yield f"{layer}.attention.{name}.weight", (hidden, hidden), ROWS
        yield f"{layer}.attention.o.weight", (hidden, hidden), COLUMNS
        for name in ("gate", "up"):
            yield f"{layer}.mlp.{name}.weight", (wide, hidden), ROWS
        yield f"{layer}.mlp.down.weight", (hidden, wide), COLUMNS
        yield f"{layer}.norms.weight", (2, hidden), None
    yield "norm.weight", (hidden,), None
    yield "head.weight", (words, hidden), ROWS


def state():
    for name, shape, dim in transformer():
        for kind in ("model", "optim.exp_avg", "optim.exp_avg_sq"):
            yield f"{kind}.{name}", shape, dim


def box(shape, dim, rank, world):
    """One rank's part, as FSDP2 and DTensor cut it; None if it has none."""
    if dim is None:
        return (0,) * len(shape), shape
    step = -(-shape[dim] // world)
    begin, end = min(rank * step, shape[dim]), min((rank + 1) * step, shape[dim])
    offsets, sizes = [0] * len(shape), list(shape)
    offsets[dim], sizes[dim] = begin, end - begin
    return (tuple(offsets), tuple(sizes)) if end > begin else None


def checkpoint(world):
    """Manifest and layout of what FSDP2 saves on so many ranks."""
    chunks, records = {}, []
    for rank in range(world):
        cut = ((name, shape, box(shape, 0, rank, world)) for name, shape, _ in state())
        placed = shardfile.place(Piece(name, "F32", shape, *found) for name, shape, found in cut if found)
        for piece, begin in zip(placed.pieces, placed.begins, strict=True):
            chunks.setdefault(piece.key, []).append(Chunk(rank, piece.offsets, piece.sizes, begin))
        body = placed.tensors_end + 2000
        nbytes = body + table_nbytes(body)
        records.append(
            ShardRecord(rank=rank, path=ATTEMPT.shard(rank), nbytes=nbytes, body_nbytes=body, digest="ab" * 16)
        )
    tensors = {name: Tensor.of("F32", shape, chunks[name]) for name, shape, _ in state()}
    manifest = Manifest(
        run_id="r1", step=1, attempt="1-cafecafe-0", created="2026-01-31T23:59:59Z", shards=tuple(records),
        layout=LayoutRef(digest="01" * 16, nbytes=99),
    )  # fmt: skip
    return manifest, Layout(tensors, {})


def fetched(saved_world, world, how="FSDP2"):
    """For so many ranks that wrote and that read: bytes fetched for each needed, by themselves and sharing."""
    manifest, layout = checkpoint(saved_world)
    asks, needed = [], 0
    for rank in range(world):
        saved = Saved(layout, {}, rank, saved_world, 1)
        cuts = ((name, box(shape, 0 if how == "FSDP2" else dim, rank, world)) for name, shape, dim in state())
        wants = [saved.want_box(name, *found) for name, found in cuts if found]
        needed += sum(want.out.nbytes for want in wants)
        found = {}
        reader.load(reader.CheckpointReader(manifest, layout, []), wants, found.update)
        asks.append(allotment.Ask(frozenset(), {shard: needs.runs() for shard, needs in found.items()}))
    alone = sum(map(_nbytes, (ask.needs for ask in asks)))
    units = allotment.allot(asks, {record.rank: record.body_nbytes for record in manifest.shards})
    left = functools.partial(allotment.alone, units=units)
    shared = sum(unit.nbytes for unit in units) + sum(_nbytes(left(ask, rank)) for rank, ask in enumerate(asks))
    return {
        "ranks": f"{saved_world} -> {world}{'' if how == 'FSDP2' else ' ' + how}",
        "each_by_itself": alone / needed, "from_root_when_shared": shared / needed,
    }  # fmt: skip


def _nbytes(needs):
    return sum(end - begin for runs in needs.values() for begin, end in runs)
