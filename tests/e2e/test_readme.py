"""The README's blocks run as they stand, and its links lead to what they name."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dcpsvc
from tests.ranks.parallelisms import KINDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_blocks_run_one_after_the_other_and_then_the_commands_do(tmp_path):
    script = "\n".join(blocks("python"))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=50)
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    ours = [command[1:] for command in commands if command and command[0] == "dcpsvc"]
    assert [command[0] for command in ours] == ["ls", "show", "verify"]
    for command in ours:
        done = subprocess.run(
            [sys.executable, "-m", "dcpsvc", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=50,
        )
        assert "50" in done.stdout


LINEAR = "import torch, dcpsvc; torch.manual_seed(0); model = torch.nn.Linear(3, 1)\n"
SCRIPTS = {
    "Hugging Face Trainer": (
        "transformers accelerate",
        LINEAR
        + """
import transformers
tiny = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
model, ids = transformers.GPT2LMHeadModel(tiny), torch.arange(6)
data = [{"input_ids": ids, "labels": ids}] * 8
arguments = transformers.TrainingArguments("out", max_steps=4, save_steps=2, use_cpu=True, report_to=[])
""",
        [2, 4],
    ),
    "Lightning": (
        "lightning torchdata",
        LINEAR
        + """
import lightning.pytorch
class Model(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
model, loader = Model(), torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2)
""",
        [2, 4],
    ),
    "Accelerate": (
        "accelerate torchdata",
        LINEAR
        + """
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
loading = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True)
accelerator = Accelerator(cpu=True, dataloader_config=loading)
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters()), torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2)
)
""",
        [2, 4],
    ),
    "PEFT": (
        "peft",
        LINEAR
        + "import peft; model = peft.get_peft_model(torch.nn.Sequential(model), peft.LoraConfig(target_modules=['0']))",
        [2],
    ),
    "A model that has changed": (
        "torch",
        LINEAR
        + """
import pathlib
class Old(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
class New(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.more = torch.nn.Linear(3, 3), torch.nn.Linear(3, 5), torch.nn.Linear(3, 1)
old, model = Old(), New()
optimizer = torch.optim.AdamW(model.parameters())
if not pathlib.Path("runs").exists():
    with dcpsvc.Checkpointer("runs/exp42", {"model": old, "optim": torch.optim.AdamW(old.parameters())}) as ckpt:
        ckpt.save(7).wait()
""",
        [7],
    ),
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("title", SCRIPTS)
def test_what_a_library_takes_to_adopt_runs_as_it_stands_and_a_second_time_from_its_end(tmp_path, title):
    libraries, script, steps = SCRIPTS[title]
    for library in libraries.split():
        pytest.importorskip(library)
    text = (ROOT / "docs/states.md").read_text()
    (block,) = re.findall(rf"```python\n# {title}\n(.*?)```", text, flags=re.DOTALL)
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", f"{script}\n{block}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "runs/exp42")] == steps


def test_each_adoption_is_run():
    section = (ROOT / "docs/states.md").read_text().partition("## Two lines to adopt")[2].partition("\n## ")[0]
    assert re.findall(r"```python\n# (.+)", section) == list(SCRIPTS)


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks("sh")), flags=re.MULTILINE))
    assert named == {"demo", "test"}
    assert named <= targets


def leads_somewhere(folder, link):
    path, _, anchor = link.partition("#")
    if not anchor:
        return (folder / path).exists()
    headings = re.findall(r"^#+ (.+)$", (folder / path).read_text(), flags=re.MULTILINE)
    return anchor in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", ["README.md", "DESIGN.md", "docs/states.md", "docs/requirements.md"])
def test_every_link_leads_to_a_file_and_every_named_test_exists(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if not leads_somewhere((ROOT / document).parent, link)]
    named = re.findall(r"`(test_\w+)`", text)
    assert named or document == "README.md"
    assert not set(named) - defined_tests()


def test_the_matrix_has_every_parallelism():
    text = (ROOT / "docs/states.md").read_text()
    lines = re.findall(r"^\| (.+?) \| (\d) \| exact \| exact \|$", text, flags=re.MULTILINE)
    assert lines == [(kind, str(max(world, 1))) for kind, (world, _) in KINDS.items()]


def test_every_requirement_is_proven_by_a_test():
    text = (ROOT / "docs/requirements.md").read_text()
    proven = re.findall(r"^\| (R\d+) \| .+ \| .*`test_\w+`.* \|$", text, flags=re.MULTILINE)
    assert proven == [f"R{number}" for number in range(1, 44)]


def defined_tests():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
