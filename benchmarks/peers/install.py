"""Make a virtual environment for each peer that is not part of torch: ``make peers``.

Most see the packages of the environment this runs in, so torch is neither downloaded again nor another one. A peer
that does not install leaves its reason behind, and the benchmarks skip it with that.
"""

import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

HOME = Path(__file__).parents[2] / ".venv-peers"

PACKAGES = {
    "torchsnapshot": ["torchsnapshot==0.1.0"],
    "torch_checkpointing": ["torch_checkpointing==0.1.1"],
    "nvrx": ["nvidia-resiliency-ext==0.4.1"],
    "dlrover": ["dlrover[torch]==0.6.1", "grpcio", "protobuf"],  # it imports them, and does not say so
    "awscli": ["awscli"],
}
_ALONE = {"awscli"}
"""They bring all they need, and other versions of it than ours."""
_FIXED = ("torch", "numpy")
_LAST_LINES = 3


def python_of(name):
    """The interpreter a peer runs in; None where its environment was not made."""
    python = HOME / name / "bin" / "python"
    return python if (HOME / name / "ready").exists() else None


def reason(name, home=HOME):
    """Why a peer cannot be measured here."""
    failed = home / f"{name}.failed"
    return failed.read_text().strip() if failed.exists() else "not installed: make peers"


def install(name):
    """One environment. Says what went wrong, or nothing."""
    place = HOME / name
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    if name not in _ALONE:
        purelib = next(place.glob("lib/python*/site-packages"))
        (purelib / "main.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    fixed = HOME / "fixed.txt"
    fixed.write_text("".join(f"{package}=={metadata.version(package)}\n" for package in _FIXED))
    pip = [place / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    done = subprocess.run([*pip, "install", *PACKAGES[name], "-c", fixed], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return " ".join(errors[-_LAST_LINES:]) or f"pip ended with {done.returncode}"
    (place / "ready").touch()
    return ""


def main():
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    for name in sys.argv[1:] or PACKAGES:
        if python_of(name):
            continue
        failed = HOME / f"{name}.failed"
        failed.unlink(missing_ok=True)
        if problem := install(name):
            failed.write_text(problem + "\n")
        print(f"{name}: {problem or 'ready'}")
