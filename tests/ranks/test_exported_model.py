"""R33: a model of transformers that two ranks had sharded is loaded by ``from_pretrained``, and computes the same."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from dcpsvc.reading import open_root
from dcpsvc.tools.exporting import Source, export_hf
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import checkpointer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the library


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=15, n_positions=8))


def save_it(rank, world, root):
    model = gpt2()
    for block in model.transformer.h:
        fully_shard(block)
    with checkpointer(root, {"model": fully_shard(model)}, save_last=False) as ckpt:
        ckpt.save(1).wait()


def test_from_pretrained_loads_what_two_ranks_had_sharded_and_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    values(run_ranks(2, save_it, tmp_path / "run"))
    source = Source(open_root(tmp_path / "run"), 1, "model")
    assert {chunk.rank for chunk in source.layout.find("model.transformer.wte.weight").chunks} == {0, 1}
    export_hf(source, tmp_path / "out", max_shard_nbytes=2000)
    again, ids = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval(), torch.arange(6)[None]
    assert torch.equal(again(ids).logits, gpt2().eval()(ids).logits)
    assert again.lm_head.weight is again.transformer.wte.weight
