"""How many bytes a checkpoint of a LoRA adapter takes, beside one with its base, and one of training everything.

    python -m benchmarks.bench_adapter --out benchmarks/results/adapter.json

GPT-2 with 124M random parameters and LoRA of rank 4 on its attention, and the small model of examples/train_lora.py;
AdamW that has stepped once, one process. Counted: all that a commit has at the run root below ``data/``.
"""

import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from rich.table import Table

import dcpsvc
from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write

MODELS = {
    "the example": {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 16},
    "GPT-2, 124M": {},
}
WAYS = {
    "the adapter": {"only": "trainable"},
    "the adapter and its PEFT folder": {"only": "trainable", "adapter_folder": "model"},
    "the adapter and its base": {},
    "everything is trained": {},
}


def adapted(terms):
    """A frozen base and its adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(**terms))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def stepped(model):
    """AdamW with state for all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def measure(folder, terms, way):
    """Bytes of one commit."""
    model = adapted(terms)
    if way == "everything is trained":
        model = model.unload().requires_grad_()
    state = {"model": model, "optim": stepped(model)}
    try:
        with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", save_last=False, **WAYS[way]) as ckpt:
            ckpt.save(1).wait(600)
        return sum(path.stat().st_size for path in (folder / "root" / "data").rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--small", action="store_true", help="the model of the example alone")
    made.add_argument("--dir", default=None, help="where files are (default: the temporary directory)")
    options = made.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name, terms in list(MODELS.items())[: 1 if options.small else None]:
        for way in WAYS:
            folder = Path(tempfile.mkdtemp(prefix="adapter-", dir=options.dir))
            rows.append({"model": name, "way": way, "nbytes": measure(folder, terms, way)})
    for row in rows:
        whole = next(each for each in rows if (each["model"], each["way"]) == (row["model"], "everything is trained"))
        row["of_everything"] = row["nbytes"] / whole["nbytes"]
    write(options, {"facts": facts("/", {}), "rows": rows}, lambda console: draw(console, rows))


def draw(console, rows):
    table = Table(title="bytes of a checkpoint", box=None)
    for heading in ("model", "what is stored", "bytes", "of everything"):
        table.add_column(heading, justify="left" if heading in ("model", "what is stored") else "right")
    for row in rows:
        table.add_row(row["model"], row["way"], f"{row['nbytes']:,}", f"{row['of_everything']:.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
