"""docker/ and examples/: what they name exists, and the programs they start take the arguments they are given."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import get_args_parser

from dcpsvc.cli import cli
from dcpsvc.config import LOCAL_VARIABLE
from dcpsvc.demo import train

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
BATCH = ROOT / "examples" / "slurm" / "train.sbatch"
SERVICE, ACCOUNT, JOB = yaml.safe_load_all((ROOT / "examples" / "kubernetes" / "job.yaml").read_text())
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def instructions() -> list[tuple[str, str]]:
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line and not line.startswith("#")]


def of(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in of("ENV") for pair in line.split())


def launched(command: list[str]) -> Any:
    """What torchrun makes of its arguments; it refuses those it does not know."""
    assert command[0] == "torchrun"
    return get_args_parser().parse_args(command[1:])


def demo_arguments(monkeypatch: pytest.MonkeyPatch, arguments: list[str], options: str = "{}") -> Any:
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    monkeypatch.setenv("DCPSVC_DEMO_STORAGE_OPTIONS", options)
    return train.parse_args()


def test_the_image_is_built_from_files_that_are_there_and_installs_extras_that_exist() -> None:
    sources = [name for line in of("COPY") for name in line.split()[:-1]]
    assert {"src", "pyproject.toml"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(sources), "the build needs them"
    (extras,) = (re.findall(r'"\.\[(.+?)\]"', line) for line in of("RUN") if '".[' in line)
    assert set(extras) <= project["optional-dependencies"].keys()


def test_the_image_starts_the_demo_s_training_under_torchrun_as_a_user_who_owns_the_local_tier() -> None:
    (entry,) = of("ENTRYPOINT")
    options = launched(json.loads(entry))
    assert options.module
    assert importlib.util.find_spec(options.training_script)
    (user,) = of("USER")
    place = environment()[LOCAL_VARIABLE]
    made = " ".join(of("RUN"))
    assert f"-o {user} {place}" in made
    assert made.index("useradd") < made.index("install -d")


def test_the_composed_job_trains_on_the_bucket_of_the_composed_server(monkeypatch: pytest.MonkeyPatch) -> None:
    job, server = COMPOSE["services"]["job"], COMPOSE["services"]["s3"]["environment"]
    folder = ROOT / "docker" / job["build"]["context"]
    assert (folder / job["build"]["dockerfile"]).samefile(DOCKERFILE)
    told = demo_arguments(monkeypatch, job["command"], job["environment"]["DCPSVC_DEMO_STORAGE_OPTIONS"])
    assert told.root.startswith(f"s3://{server['CEPH_DEMO_BUCKET']}/")
    options = json.loads(job["environment"]["DCPSVC_DEMO_STORAGE_OPTIONS"])
    assert (options["key"], options["secret"]) == (server["CEPH_DEMO_ACCESS_KEY"], server["CEPH_DEMO_SECRET_KEY"])
    host, port = options["endpoint_url"].removeprefix("http://").split(":")
    assert host in COMPOSE["services"]
    assert f":{port}/" in " ".join(COMPOSE["services"][host]["healthcheck"]["test"])
    assert job["depends_on"] == {host: {"condition": "service_healthy"}}


def test_the_composed_job_s_local_tier_outlives_its_container_and_the_ranks_have_time_to_stop() -> None:
    job = COMPOSE["services"]["job"]
    assert f"nvme:{environment()[LOCAL_VARIABLE]}" in job["volumes"]
    used = {volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service.get("volumes", [])}
    assert used == COMPOSE["volumes"].keys()
    assert int(job["stop_grace_period"].removesuffix("s")) > 30


@pytest.mark.parametrize("script", ["docker/without_docker.sh", "examples/slurm/train.sbatch"])
def test_a_script_parses_and_names_files_of_this_checkout(script: str) -> None:
    subprocess.run(["/bin/bash", "-n", str(ROOT / script)], check=True, timeout=20)
    named = re.findall(r"\btests/[\w$/]+\.sh\b", (ROOT / script).read_text())
    whole = [re.sub(r"\$\w+", server, name) for name in named for server in ("ceph", "swift")]
    assert [name for name in whole if not (ROOT / name).exists()] == []
    assert named or script.startswith("examples")


SRUN = '#!/bin/bash\necho srun "$@" >>"$LOG"\nexit "$STATUS"\n'
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo node-1 && echo node-2\necho scontrol "$@" >>"$LOG"\n'


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (1, 0, True), (1, 19, True), (1, 20, False)]
)
def test_the_batch_script_starts_every_node_and_is_queued_again_only_if_it_did_not_end_well(
    tmp_path: Path, status: int, restarts: int, *, requeued: bool
) -> None:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "STATUS": str(status), "USER": "me",
        "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    done = subprocess.run(["/bin/bash", str(BATCH)], env=given, check=False, timeout=20)
    assert done.returncode == status
    log = (tmp_path / "log").read_text().splitlines()
    assert ("scontrol requeue 77" in log) is requeued
    (started,) = (shlex.split(line) for line in log if line.startswith("srun "))
    options = launched(started[started.index("torchrun") :])
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("2", "node-1:20077", "77")
    assert options.training_script == "train.py"


def test_the_batch_script_asks_for_a_signal_to_its_own_shell_and_leaves_ranks_and_torchrun_their_time() -> None:
    script = BATCH.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script, re.MULTILINE))
    assert "requeue" in asked
    signalled = re.fullmatch(r"B:(\w+)@(\d+)", asked["signal"])
    assert signalled, "torchrun would hear it"
    assert f"""trap 'touch "$STOP"' {signalled[1]}""" in script
    assert grace_s(script) < kill_s(script) < int(signalled[2])
    assert f"export {LOCAL_VARIABLE}=" in script


def grace_s(text: str) -> int:
    """What the training is told."""
    (found,) = re.findall(r"--grace-s[ =](\d+)", text)
    return int(found)


def kill_s(text: str) -> int:
    """What torchrun is told, as it reads it."""
    (found,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT\D+(\d+)", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", found)
        read = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout
    assert str(read) == found
    return int(found)


def test_the_kubernetes_job_is_indexed_and_its_pods_meet_at_the_first_one() -> None:
    spec, name = JOB["spec"], JOB["metadata"]["name"]
    options = launched([*CONTAINER["command"], *CONTAINER["args"]])
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(options.nnodes)
    assert options.nproc_per_node == str(CONTAINER["resources"]["limits"]["nvidia.com/gpu"])
    assert options.rdzv_endpoint.startswith(f"{name}-0.{POD['subdomain']}:")
    assert (SERVICE["metadata"]["name"], SERVICE["spec"]["clusterIP"]) == (POD["subdomain"], "None")
    assert SERVICE["spec"]["selector"] == {"job-name": name}


def test_a_kubernetes_pod_stops_before_it_is_killed_has_a_role_and_keeps_its_local_tier_on_the_node() -> None:
    command, name, *arguments = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "dcpsvc"
    asked = cli.commands[name].make_context(name, list(arguments))
    assert asked.params["timeout_s"] < POD["terminationGracePeriodSeconds"]
    job = (ROOT / "examples" / "kubernetes" / "job.yaml").read_text()
    assert grace_s(job) < kill_s(job) < POD["terminationGracePeriodSeconds"]
    assert f"--root={asked.params['root']}" in CONTAINER["args"]
    assert POD["serviceAccountName"] == ACCOUNT["metadata"]["name"]
    assert "eks.amazonaws.com/role-arn" in ACCOUNT["metadata"]["annotations"]
    (mount,), (volume,) = CONTAINER["volumeMounts"], POD["volumes"]
    assert (volume["name"], "emptyDir" in volume) == (mount["name"], True)
    place = {one["name"]: one["value"] for one in CONTAINER["env"]}[LOCAL_VARIABLE]
    assert place.startswith(mount["mountPath"] + "/")


@pytest.mark.parametrize("example", ["slurm", "kubernetes"])
def test_an_example_is_explained_in_ten_points(example: str) -> None:
    text = (ROOT / "examples" / example / "README.md").read_text()
    assert re.findall(r"^(\d+)\. ", text, re.MULTILINE) == [str(number) for number in range(1, 11)]
