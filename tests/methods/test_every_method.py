"""What holds for every method: its settings, resuming, its configs, and that nothing outside its module names it."""

import ast
import re
from pathlib import Path

import pytest

from cmcgns.cli import load_config, resolve
from cmcgns.config import METHODS, Config, MethodConfig, method_settings
from cmcgns.errors import UserError
from tests.jobs import REPOSITORY
from tests.train.test_trainer import HostReads, config_of, start

DEFAULT = MethodConfig().name
PHANTOM = REPOSITORY / "jobs" / "configs" / "phantom.yaml"
PACKAGE = REPOSITORY / "cmcgns"


def later_lengths(name: str) -> list[str]:
    """Settings of the lengths of the stages after the first."""
    return [f"stage{stage}_steps" for stage in range(2, max(method_settings(name).stages, 2) + 1)]


@pytest.mark.parametrize("name", METHODS)
def test_a_misspelt_key_is_refused_with_the_nearest_one(name: str) -> None:
    key = next(iter(method_settings(name).model_fields))
    with pytest.raises(UserError, match=rf"there is no setting 'objective.{key}x'; did you mean objective.{key}\?"):
        resolve({"method": {"name": name}, "objective": {f"{key}x": 1}}, {}, Config)


@pytest.mark.parametrize("name", METHODS)
def test_a_key_of_another_method_is_refused_with_the_methods_that_have_it(name: str) -> None:
    own = method_settings(name).model_fields
    theirs = {key for other in METHODS for key in method_settings(other).model_fields} - own.keys()
    assert theirs
    for key in sorted(theirs):
        owners = ", ".join(other for other in METHODS if key in method_settings(other).model_fields)
        refusal = rf"objective.{key} is a setting of method {owners}, but method.name is {name}; remove it"
        with pytest.raises(UserError, match=refusal):
            resolve({"method": {"name": name}, "objective": {key: 1}}, {}, Config)


@pytest.mark.parametrize("name", [name for name in METHODS if name != DEFAULT])  # that one: tests/train/test_trainer.py
def test_a_resumed_run_of_every_method_matches_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    config = config_of(
        method__name=name, microbatch_size=8, global_batch_size=16, stage1_steps=6, checkpoint_every=3, validate_every=3,
        **dict.fromkeys(later_lengths(name), 0),
    )  # fmt: skip
    whole = start(config, tmp_path / "whole")
    assert whole.trainer.train()
    resumed = start(config, tmp_path / "resumed", 3, tmp_path / "whole")
    assert resumed.trainer.train()
    for ours, theirs in zip(resumed.rows() + resumed.rows("val"), whole.rows() + whole.rows("val"), strict=True):
        for term in ("step", "loss", "studies_digest", "temperature", "i2t_recall_at_1"):
            assert ours.get(term) == theirs.get(term), (ours["step"], term)
    assert [row["step"] for row in resumed.rows()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", [name for name in METHODS if name != DEFAULT])
def test_a_steady_step_of_every_method_reads_nothing_back_from_the_device(name: str, tmp_path: Path) -> None:
    drawn = {"objective__caption": "sentence"} if "caption" in method_settings(name).model_fields else {}
    config = config_of(
        method__name=name, microbatch_size=8, global_batch_size=8, **dict.fromkeys(later_lengths(name), 0), **drawn
    )
    trainer = start(config, tmp_path / "run").trainer
    trainer.train_step(1, trainer.reader.next_step())
    data = trainer.reader.next_step()
    # Adam's step counts are on the host, also on a GPU
    with HostReads({slot["step"].data_ptr() for slot in trainer.engine.optimizer.state.values()}) as reads:
        trainer.train_step(2, data)
    assert reads.found == []


@pytest.mark.parametrize("name", [name for name in METHODS if name != DEFAULT])
def test_the_phantom_config_of_every_method_differs_from_the_default_in_the_method_alone(name: str) -> None:
    base, own = load_config([], Config, PHANTOM), load_config(["--config", f"phantom-{name}"], Config, None)
    assert own.method.name == name
    for section in ("data", "model", "clustering", "run"):
        assert getattr(own, section) == getattr(base, section)
    lengths = [f"stage{stage}_steps" for stage in (1, 2, 3)]
    steps = [getattr(own.train, length) or 0 for length in lengths]
    assert sum(steps) == base.train.stage1_steps + base.train.stage2_steps
    assert sum(length > 0 for length in steps) == method_settings(name).stages
    # the default's short stage 2 trains new parts almost alone
    theirs = dict.fromkeys([*lengths, *(["stage2_learned_rate"] if method_settings(name).stages > 1 else [])])
    assert own.train.model_copy(update=theirs) == base.train.model_copy(update=theirs)


def named_methods(path: Path) -> set[str]:
    """Methods that a Python file names as a string or imports."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = set(re.findall(r"[\w.-]+", node.value))
            whole = {name for name in METHODS if node.value == name or METHODS[name] in words}
            found |= whole | {name for name in METHODS if f"`{name}`" in node.value}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{module}" for module in modules] + [str(node.module)]
            found |= {
                name for name, module in METHODS.items() if any(f"{each}.".startswith(f"{module}.") for each in modules)
            }
    return found


def test_only_methods_name_methods() -> None:
    files = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "jobs").glob("*.py")]
    named = {str(path.relative_to(REPOSITORY)): named_methods(path) for path in files}
    elsewhere = {path: names for path, names in named.items() if names and not path.startswith("cmcgns/methods/")}
    assert elsewhere == {"cmcgns/config/sections.py": {DEFAULT}}  # the default of method.name
    assert named["cmcgns/methods/__init__.py"] == set(METHODS)  # the table: the search finds what it looks for
    for name, module in METHODS.items():
        shared = {"base", "contrastive", "loss_weights", "pairs", "parts"}
        assert module.rpartition(".")[2] not in shared, name
