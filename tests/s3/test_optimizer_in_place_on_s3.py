"""An optimizer that has moments already gets those of an object store where its own are, and no second copy of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc.errors import NoValidCheckpointError
from tests.unit.test_optimizer_in_place import everything, moments

if TYPE_CHECKING:
    from tests.s3.servers import Server

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

MIB = 2**20
WIDTH = 6144
"""144 MiB of weights, 288 MiB of moments: much more than what is under way at a time."""

SOURCE = Path(dcpsvc.__file__).parents[1]
TESTS = Path(__file__).parents[2]

RESUME = """
import json, sys
from pathlib import Path
import torch, dcpsvc
from tests.s3.test_optimizer_in_place_on_s3 import drawn
from tests.unit.test_optimizer_in_place import everything, moments, resident

root, options, local = sys.argv[1:]
model, optimizer = drawn(seed=2)
places = [moment.data_ptr() for moment in moments(model, optimizer)]
told = []
with dcpsvc.Checkpointer(
    root, {"model": model, "optim": optimizer}, local=local, storage_options=json.loads(options), save_last=False,
    staging_nbytes=2**20, on_event=told.append,
) as ckpt:
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = resident("VmRSS")
    assert ckpt.resume() == 1
    grown = resident("VmHWM") - before
stayed = [moment.data_ptr() for moment in moments(model, optimizer)] == places
right = all(map(torch.equal, everything(model, optimizer), everything(*drawn(seed=1))))
print(json.dumps([grown, stayed, right, next(event.detail for event in told if event.name == "resumed")]))
"""


def drawn(seed: int) -> tuple[torch.nn.Linear, torch.optim.Adam]:
    """After one step, with numbers of which none fits in the place of another."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run root with one commit."""
    root = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/run"
    model, optimizer = drawn(seed=1)
    with dcpsvc.Checkpointer(
        root, {"model": model, "optim": optimizer}, local=tmp_path_factory.mktemp("writer"), save_last=False,
        storage_options=s3_server.storage_options, staging_nbytes=MIB,
    ) as ckpt:  # fmt: skip
        ckpt.save(1).wait(200)
    return root


def test_moments_come_from_s3_to_where_they_are_with_the_saved_values_and_no_second_copy_of_them_is_held(
    s3_server: Server, saved: str, tmp_path: Path
) -> None:
    argv = [sys.executable, "-c", RESUME, saved, json.dumps(s3_server.storage_options), str(tmp_path)]
    done = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": f"{SOURCE}:{TESTS}"}, timeout=200, check=True, stdout=subprocess.PIPE
    )
    grown, stayed, right, detail = json.loads(done.stdout)
    print(f"{grown / MIB:.0f} MiB more than the state")
    assert stayed
    assert right
    assert "from the run root" in detail
    assert "from local disks" not in detail
    assert grown < 144 * MIB


@pytest.mark.parametrize("way", ["resume", "load"])
def test_a_damaged_block_of_the_moments_at_the_server_leaves_model_and_optimizer_as_they_were_to_the_bit(
    s3_server: Server, saved: str, tmp_path: Path, way: str
) -> None:
    client, bucket, prefix = s3_server.client(), s3_server.bucket, saved.split("/", 3)[3] + "/data/"
    (shard,) = client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
    data = client.get_object(Bucket=bucket, Key=shard["Key"])["Body"].read()
    at = inside_the_moments(data)
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    model, optimizer = drawn(seed=2)
    before = [tensor.clone() for tensor in everything(model, optimizer)]
    client.put_object(Bucket=bucket, Key=shard["Key"], Body=damaged)
    try:
        with pytest.raises(NoValidCheckpointError, match="do not match their checksum"):
            take(way, saved, {"model": model, "optim": optimizer}, s3_server.storage_options, tmp_path)
    finally:
        client.put_object(Bucket=bucket, Key=shard["Key"], Body=data)
    assert all(map(torch.equal, everything(model, optimizer), before))
    places = [moment.data_ptr() for moment in moments(model, optimizer)]
    take(way, saved, {"model": model, "optim": optimizer}, s3_server.storage_options, tmp_path)
    assert [moment.data_ptr() for moment in moments(model, optimizer)] == places
    assert all(map(torch.equal, everything(model, optimizer), everything(*drawn(seed=1))))


def inside_the_moments(data: bytes) -> int:
    """A byte of the second of the large ones."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (begin, end) = next(header[key]["data_offsets"] for key in header if key.endswith("weight.exp_avg_sq"))
    return 8 + length + (begin + end) // 2


def take(way: str, root: str, state: dict[str, Any], options: dict[str, Any], local: Path) -> None:
    """What is not in the state yet waits on the local tier's disk, or, where there is none, in memory."""
    if way == "load":
        dcpsvc.load(root, state, storage_options=options)
        return
    with dcpsvc.Checkpointer(
        root, state, local=local, storage_options=options, save_last=False, staging_nbytes=MIB
    ) as ckpt:
        ckpt.resume()
