"""The README's blocks run as they stand, and its links lead to what they name."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
