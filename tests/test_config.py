"""Settings that conflict, and their messages."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cmcgns.cli import read_yaml, validate
from cmcgns.config import Config
from cmcgns.errors import UserError
from tests.small import small_config, small_model

CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = validate(read_yaml(str(path)), Config)
    train = config.train
    assert train.accumulation * train.microbatch_size * train.num_workers == train.global_batch_size
    assert all(config.clustering.bank_size >= max(4 * bank.num_clusters, 1024) for bank in config.banks)


def test_the_published_settings_are_those_of_the_paper() -> None:
    config = validate(read_yaml(str(CONFIGS[0].parent / "published.yaml")), Config)
    objective, train, clustering = config.objective, config.train, config.clustering
    assert (objective.num_clusters, clustering.start_cosine, clustering.momentum) == (128, 0.4, 1e-3)
    assert (objective.sentence_temperature, objective.temperature, objective.learn_temperature) == (1.0, 0.1, True)
    assert (train.optimizer, train.learning_rate, train.weight_decay) == ("adam", 1e-5, 1e-6)
    assert (train.warmup_epochs, train.warmup_learning_rate) == (1, 1e-7)
    assert (train.stage1_epochs, train.stage2_epochs, train.seed) == (10, 20, 42)
    assert (train.microbatch_size, train.num_workers, train.precision) == (64, 2, "fp16")
    assert (config.data.resize, config.data.image_size, config.data.max_tokens) == (256, 224, 256)
    assert (objective.false_negatives, objective.reconstruct, objective.margin_weight) == ("margin", "all", 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"global_batch_size": 16, "microbatch_size": 1, "num_workers": 1},
            "train.microbatch_size 1 x num_workers 1: cm-cgns compares .* Set train.microbatch_size to 2 or more",
        ),
        (
            {"global_batch_size": 10, "microbatch_size": 4},
            r"train.global_batch_size 10 is not a multiple of microbatch_size x num_workers \(4 x 2 = 8\); nearest: 8 and 16",
        ),
        ({"global_batch_size": 4}, r"nearest: 8"),
        (
            {"global_batch_size": 16, "min_workers": 3, "num_workers": 4},
            r"16 is not a multiple of microbatch_size x min_workers \(4 x 3 = 12\); nearest: 12 and 24",
        ),
        ({"min_workers": 3, "num_workers": 2}, "train.min_workers 3 is more than train.num_workers 2; lower it"),
        (
            {"global_batch_size": 16, "microbatch_size": 1, "num_workers": 2, "min_workers": 1},
            "train.microbatch_size 1 x min_workers 1: cm-cgns compares",
        ),
        ({"data__image_size": 64}, r"data.image_size 64 is larger than data.resize 40"),
        (
            {"objective__num_clusters": 300},
            r"objective.num_clusters 300 needs clustering.bank_size of at least max\(4 x 300, 1024\) = 1200, not 1024",
        ),
        ({"stage1_epochs": 3}, r"exactly one of train.stage1_steps and train.stage1_epochs, not 10 and 3"),
        ({"stage2_steps": None}, r"exactly one of train.stage2_steps and train.stage2_epochs, not neither"),
        ({"precision": "fp16"}, r"fp16 needs train.use_gpu=true"),
        ({"overlap_comm": True, "zero_stage": 0}, r"train.overlap_comm needs ZeRO"),
        ({"sync_batchnorm": True}, r"train.sync_batchnorm needs train.use_gpu=true"),
        ({"engine": "torch"}, r"train.engine torch does not support ZeRO: set train.zero_stage=0"),
        ({"clustering__device": "gpu"}, r"clustering.device gpu conflicts with clustering.gpus_per_actor 0.0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_together_are_refused_with_numbers(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small_config(**values)


def test_a_run_goes_on_under_its_own_name() -> None:
    settings = small_config().model_dump()
    with pytest.raises(ValidationError, match=r"run.resume a .*; remove run.name b"):
        Config.model_validate(settings | {"run": {"name": "b", "resume": "a"}})


def test_accumulation_follows_from_the_sizes() -> None:
    assert small_config(global_batch_size=24, microbatch_size=4, num_workers=3).train.accumulation == 2


def test_every_key_says_what_it_means() -> None:
    for section, info in Config.model_fields.items():
        assert info.annotation is not None
        for name, key in info.annotation.model_fields.items():
            assert len(key.description or "") > 15, f"{section}.{name}"


def test_the_config_of_an_earlier_run_is_read_and_builds_the_model_of_its_weights() -> None:
    """Its config.yaml has every key of its time, also those that nobody set."""
    earlier = Path(__file__).parent / "golden" / "config_of_an_earlier_version.yaml"
    config = validate(read_yaml(str(earlier)), Config)
    shapes = {name: tuple(value.shape) for name, value in small_model(config).named_parameters()}
    assert shapes["decoder.entry.weight"] == (256, 2 * config.model.embed_dim, 1, 1)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_config_may_extend_another_one_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        ours="extends: theirs.yaml\ntrain: {stage1_epochs: 2, seed: 3}",
        theirs="extends: phantom-tiny\ntrain: {seed: 5, weight_decay: 0.5}\nobjective: {mask_ratio: 0.25}",
    )
    tiny, found = read_yaml("phantom-tiny"), read_yaml(str(tmp_path / "ours.yaml"))
    assert found["data"] == tiny["data"]
    assert found["objective"] == tiny["objective"] | {"mask_ratio": 0.25}
    train = tiny["train"] | {"seed": 3, "weight_decay": 0.5, "stage1_epochs": 2}
    del train["stage1_steps"]  # the same length in the other unit
    assert found["train"] == train
    assert validate(found, Config).train.seed == 3


def test_an_extended_config_of_another_method_leaves_its_objective_behind(tmp_path: Path) -> None:
    write(
        tmp_path,
        ours="extends: phantom\nmethod: {name: infonce}\nobjective: {temperature: 0.2}\ntrain: {stage2_steps: 0}",
    )
    found = read_yaml(str(tmp_path / "ours.yaml"))
    assert found["objective"] == {"temperature": 0.2}
    write(tmp_path, next="extends: ours.yaml\ntrain: {seed: 4}")
    config = validate(read_yaml(str(tmp_path / "next.yaml")), Config)
    assert (config.method.name, config.objective.temperature, config.train.seed) == ("infonce", 0.2, 4)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("phantomm", r"ours.yaml: extends phantomm: No such file or directory; did you mean phantom\?"),
        ("other.yaml", r"ours.yaml: extends .*other.yaml: No such file or directory"),
        ("ours.yaml", r"ours.yaml: extends: these extend each other: .*ours.yaml -> .*ours.yaml; remove one"),
        ("back.yaml", r"back.yaml: extends: these extend each other: .*ours.yaml -> .*back.yaml -> .*ours.yaml; remove one"),
        ("[phantom]", r"ours.yaml: extends: \['phantom'\] is no name; give a config that we ship, or a .yaml file"),
    ],
)  # fmt: skip
def test_a_config_that_extends_nothing_or_itself_is_refused(base: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, ours=f"extends: {base}", back="extends: ../" + tmp_path.name + "/ours.yaml")
    with pytest.raises(UserError, match=message):
        read_yaml(str(tmp_path / "ours.yaml"))
