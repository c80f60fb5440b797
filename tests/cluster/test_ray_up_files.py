"""The files for ``ray up``: Ray's schema, versions, and what their commands do in Ray's shell."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cluster.files import CONTAINERS, RAY_UP, load, ray_of_image, requirement
from tests.jobs import REPOSITORY


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The file with Ray's defaults, validated by Ray's schema, as ``ray up`` reads it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(config)
    validate_config(config)
    return config


@pytest.mark.parametrize("name", RAY_UP)
def test_rays_schema_takes_the_file(name: str) -> None:
    prepared(load(name))


@pytest.mark.parametrize("name", CONTAINERS)
def test_rays_schema_refuses_a_misspelt_key(name: str) -> None:
    config = load(name)
    config["available_node_types"]["cpu"]["label"] = {}
    with pytest.raises(jsonschema.ValidationError, match="label"):
        prepared(config)


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_image_has_the_ray_and_the_python_of_the_project(name: str) -> None:
    image = load(name)["docker"]["image"]
    assert ray_of_image(image) in requirement("ray")
    assert "-py311-" in image  # jobs are pickled: the cluster's Python has to be the one that submits


@pytest.mark.parametrize("name", CONTAINERS)
def test_workers_start_at_zero_and_stop_when_idle(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != config["head_node_type"]}
    assert {kind["min_workers"] for kind in workers.values()} == {0}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert not config["provider"]["cache_stopped_nodes"]
    assert {name: kind["labels"] for name, kind in workers.items() if "labels" in kind} == {
        "cpu": {"cmcgns.io/role": "data"}
    }
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"].get("priority", 0)
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_node_gets_everything_that_it_needs_of_the_repository(name: str) -> None:
    mounts = load(name)["file_mounts"]
    travelling = {local for local in mounts.values() if not local.startswith("~")}
    assert travelling == {"cmcgns", "constraints", "jobs", "pyproject.toml", "README.md"}
    assert all((REPOSITORY / local).exists() for local in travelling)
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"


@dataclass(frozen=True)
class Start:
    """A call of ``ray start`` on a node: program, folder, arguments and variables."""

    program: Path
    folder: Path
    arguments: list[str]
    variables: dict[str, str]


class Node:
    """A home folder in which a file's commands run as on a node, with programs that record their calls."""

    def __init__(self, name: str, folder: Path) -> None:
        self.home, self.record = folder / "home", folder / "called"
        self.repository = folder / "srv" / "cmcgns" if name == "on_prem" else self.home / "cmcgns"
        self.programs = self.repository / ".venv" / "bin" if name == "on_prem" else self.home / "anaconda3" / "bin"
        for made in (self.home, self.repository, self.programs):
            made.mkdir(parents=True, exist_ok=True)
        (self.home / ".ray").mkdir()
        (self.home / ".ray" / "auth_token").write_text("secret")
        (self.home / ".bashrc").touch()
        for program in ("ray", "pip", "python", "sudo"):
            self.add(program)
        self.config = prepared(json.loads(json.dumps(load(name)).replace("/srv/cmcgns", str(self.repository))))

    def add(self, program: str) -> None:
        """A program that appends its call to the record, as one JSON object."""
        script = (
            "import json, os, sys; print(json.dumps({'program': sys.argv[1], 'folder': os.getcwd(), "
            "'arguments': sys.argv[2:], 'variables': dict(os.environ)}))"
        )
        file = self.programs / program
        file.write_text(f'#!/bin/bash\n/usr/bin/env python3 -c "{script}" "$0" "$@" >> {self.record}\n')
        if program == "python":  # it would call itself
            file.write_text("#!/bin/bash\n")
        file.chmod(0o755)

    def run(self, commands: list[str], **variables: str) -> None:
        """Run commands in the shell that ``ray up`` runs them in, with the variables that it exports."""
        from ray.autoscaler._private.command_runner import _with_interactive
        from ray.autoscaler._private.util import with_envs

        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "TERM": "dumb"}
        for command in with_envs(commands, variables):
            line = " ".join(_with_interactive(command))
            subprocess.run(line, shell=True, executable="/bin/bash", env=environment, check=True, capture_output=True)

    def start(self, kind: str) -> Start:
        """Set up and start the node. Returns its call of ``ray start``."""
        self.run(self.config["setup_commands"])
        autoscaler = {"RAY_enable_autoscaler_v2": "1"} if kind == "head" else {}
        self.run(
            self.config[f"{kind}_start_ray_commands"], RAY_HEAD_IP="10.0.0.1", RAY_USAGE_STATS_ENABLED="1", **autoscaler
        )
        called = [json.loads(line) for line in self.record.read_text().splitlines()]
        (start,) = [call for call in called if call["program"].endswith("/ray") and call["arguments"][0] == "start"]
        return Start(Path(start["program"]), Path(start["folder"]), start["arguments"], start["variables"])


@pytest.mark.parametrize("kind", ["head", "worker"])
@pytest.mark.parametrize("name", RAY_UP)
def test_ray_starts_in_the_repository_with_its_environment_and_a_token(name: str, kind: str, tmp_path: Path) -> None:
    node = Node(name, tmp_path)
    start = node.start(kind)
    assert start.folder == node.repository
    assert start.program.parent == node.programs
    assert start.variables["RAY_AUTH_MODE"] == "token"
    assert start.variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "OMP_NUM_THREADS" not in start.variables
    if name == "on_prem":
        assert start.variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
        assert "--labels=" in start.arguments
    if kind == "worker":
        assert "--address=10.0.0.1:6379" in start.arguments
    else:
        assert f"--autoscaling-config={node.home}/ray_bootstrap_config.yaml" in [
            argument.replace("=~", f"={node.home}") for argument in start.arguments
        ]
        assert start.variables["RAY_enable_autoscaler_v2"] == ("0" if name == "on_prem" else "1")


def test_a_node_set_up_twice_has_its_lines_once(tmp_path: Path) -> None:
    node = Node("on_prem", tmp_path)
    for _ in range(2):
        node.run(node.config["setup_commands"])
    assert (node.home / ".bashrc").read_text().count(".cmcgns.sh") == 1
    assert (node.home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_an_on_prem_machine_may_be_kept_for_data(tmp_path: Path) -> None:
    node = Node("on_prem", tmp_path)
    (node.home / ".cmcgns.labels").write_text("cmcgns.io/role=data\n")
    assert "--labels=cmcgns.io/role=data" in node.start("worker").arguments


def test_a_login_on_an_on_prem_machine_finds_the_environment_and_requires_the_token(tmp_path: Path) -> None:
    node = Node("on_prem", tmp_path)
    node.run(node.config["setup_commands"])
    node.run(["ray status"])  # as `ray exec` and `ray attach` do
    called = json.loads(node.record.read_text().splitlines()[-1])
    assert Path(called["program"]).parent == node.programs
    assert called["variables"]["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_and_their_machines_require_the_token(name: str, tmp_path: Path) -> None:
    config = load(name)
    wanted = ("RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "RAY_JOB_STOP_SIGNAL=SIGINT")
    assert {f"-e {variable}" for variable in wanted} <= set(config["docker"]["run_options"])
    node = Node(name, tmp_path)
    for _ in range(2):
        node.run(config["initialization_commands"])
    assert (node.home / ".bashrc").read_text() == "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0\n"
