"""The command line: files, overrides, help, and one clear message for wrong input."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cmcgns.cli import STATUS_WRONG_INPUT, load_config, run_job
from cmcgns.config import Config
from cmcgns.errors import UserError
from cmcgns.sweep.config import SweepJobConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "jobs" / "configs"
DEFAULT = CONFIGS / "phantom-tiny.yaml"


def load(*arguments: str) -> Config:
    return load_config(arguments, Config, DEFAULT)


def test_the_command_line_goes_over_the_file_which_goes_over_the_defaults() -> None:
    config = load("--train.learning_rate=3e-4", "--data.seed", "7", "--train.use_gpu", "true")
    assert config.train.learning_rate == 3e-4
    assert config.data.seed == 7
    assert config.train.use_gpu
    assert config.train.microbatch_size == yaml.safe_load(DEFAULT.read_text())["train"]["microbatch_size"]
    assert load("--config", str(CONFIGS / "published.yaml")).train.seed == 42


def test_steps_on_the_command_line_replace_epochs_of_the_file_and_the_other_way_round() -> None:
    published = str(CONFIGS / "published.yaml")
    config = load("--config", published, "--train.stage1_steps=7", "--train.warmup_steps=3")
    assert (config.train.stage1_steps, config.train.stage1_epochs) == (7, None)
    assert (config.train.warmup_steps, config.train.warmup_epochs) == (3, None)
    assert config.train.stage2_epochs == 20
    assert load("--train.stage1_epochs=2").train.stage1_steps is None
    with pytest.raises(UserError, match=r"give exactly one of train.stage1_steps and train.stage1_epochs, not 7 and 2"):
        load("--train.stage1_steps=7", "--train.stage1_epochs=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.microbatch_siz=3"], "there is no setting 'train.microbatch_siz'; did you mean train.microbatch_size?"),
        (["--trian.seed=3"], "there is no setting 'trian'; did you mean train?"),
        (["--train=3"], "--train is a whole section; write --train.<key>=value"),
        (["--train.seed"], "--train.seed has no value"),
        (["train.seed=3"], "'train.seed=3' is not a setting; write --section.key=value"),
        (["--objective.mask_ratio=1.5"], "objective.mask_ratio = 1.5 .*less than 1"),
        (["--train.precision=fp64"], "train.precision = 'fp64' .*fp32.*bf16"),
        (["--train.global_batch_size=33"], r"global_batch_size 33 is not a multiple .* \(16 x 2 = 32\); nearest: 32 and 64"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory; check the path"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_would_do(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {sed: 3}", "there is no setting 'train.sed'; did you mean train.seed?"),
        ("trains: {seed: 3}", "there is no setting 'trains'; did you mean train?"),
        ("train: 5", "section 'train' must contain keys, not 5"),
        ("[1, 2]", "has no sections"),
        ("{", "is not YAML"),
    ],
)
def test_a_file_with_a_misspelt_key_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load("--config", str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("text", ["train: 5", "train:"])
def test_an_override_on_a_section_that_holds_no_keys_is_refused_too(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match="section 'train' must contain keys"):
        load("--config", str(tmp_path / "my.yaml"), "--train.seed=3")


def test_names_stay_words() -> None:
    config = load("--run.name=007", "--run.storage=2024-01-01", "--data.uri=1e5")
    assert (config.run.name, config.run.storage, config.data.uri) == ("007", "2024-01-01", "1e5")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_printed_settings_give_the_same_settings_again(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(path), "--print-config", "--train.learning_rate=0.003"]
    assert run_job(lambda _: 1, Config, DEFAULT, arguments) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load("--config", str(printed)) == load("--config", str(path), "--train.learning_rate=0.003")


def test_help_lists_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(lambda _: 1, Config, DEFAULT, ["--help"]) == 0
    text = capsys.readouterr().out
    for section, info in Config.model_fields.items():
        for name, key in info.annotation.model_fields.items():  # type: ignore[union-attr]
            line = next(line for line in text.splitlines() if line.startswith(f"  --{section}.{name} ("))
            assert f"default {key.default!r})" in line
            assert " ".join((key.description or "").split()) in text
    assert "None (" not in text


def test_a_job_gets_its_settings_and_gives_its_status() -> None:
    seen: list[int] = []

    def main(config: Config) -> int:
        seen.append(config.train.seed)
        return 1

    assert run_job(main, Config, DEFAULT, ["--train.seed=9"]) == 1
    assert seen == [9]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--train.lerning_rate=1", "error: there is no setting 'train.lerning_rate'; did you mean train.learning_rate?"),
        ("--train.global_batch_size=7", "error: train.global_batch_size 7 is not a multiple of microbatch_size x num_workers"),
    ],
)  # fmt: skip
def test_a_wrong_setting_ends_the_job_with_status_2_and_no_traceback(
    argument: str, message: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), argument]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == STATUS_WRONG_INPUT
    assert ended.stderr.startswith(message)
    assert len(ended.stderr.splitlines()) == 1
    assert not ended.stdout
    assert not list(tmp_path.iterdir())


def test_a_run_that_names_a_module_is_not_resumed_without_saying_so_again(tmp_path: Path) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"method: {{name: {evil}}}")
    for name in ("run.resume", "sweep.resume"):
        kind = Config if name == "run.resume" else SweepJobConfig
        with pytest.raises(
            UserError, match=rf"names? the module {evil}, which would be executed.*repeat --method.name="
        ):
            load_config([f"--{name}=run", f"--run.storage={tmp_path}"], kind, None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "meant"),
    [("own_pair", "own_pairs"), ("jobs/configs/phantom-tny.yaml", "phantom-tiny"), ("open_i", "openi")],
)
def test_a_misspelt_config_gets_the_name_that_was_meant(given: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"--config {given}: No such file or directory; did you mean {meant}\?"):
        load_config(["--config", given], Config, None)
