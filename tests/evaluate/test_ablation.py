"""Ablations: their file, intervals over seeds and studies, and one whose runs have already finished."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from cmcgns.errors import UserError
from cmcgns.evaluate.ablation import gains, over_seeds, read_ablation, run_name
from cmcgns.evaluate.scores import Score
from cmcgns.methods import METHODS
from cmcgns.run_folder import RunFolder
from tests.evaluate.test_embed_job import write_run
from tests.jobs import REPOSITORY, run_here
from tests.small import small_config

LENGTH = {"train.stage1_steps": 4, "train.stage2_steps": 0, "train.warmup_steps": 0, "train.global_batch_size": 32}


def score(encoder: str, value: float, shift: float = 0.0) -> Score:
    resampled_R = value + shift + np.linspace(-0.1, 0.1, 201)
    return Score("retrieval", "phantom", "film to report", "recall@1", encoder, value, 50, resampled_R)


def test_the_file_that_we_ship_holds_the_parts_of_the_method_in_turn() -> None:
    ablation = read_ablation(str(REPOSITORY / "jobs" / "ablation.yaml"))
    assert len(ablation.seeds) == 3
    lengths = {config.train.stage1_steps + config.train.stage2_steps for config in ablation.variants.values()}  # type: ignore[operator]
    assert len(lengths) == 1  # all variants train for the same number of steps
    first, *others = ablation.variants.values()
    assert first.objective.local_image_weight == first.objective.local_film_weight == first.train.stage2_steps == 0
    assert (first.objective.local_negatives, first.clustering.start_step) == ("films", 1000000)
    assert all(other.objective.local_film_weight > 0 for other in others)
    assert {other.objective.film_guidance for other in others} == {"exclude", "soft", "hard"}
    assert [bool(other.train.stage2_steps) for other in others] == [False] * (len(others) - 1) + [True]


def test_the_comparison_of_methods_has_every_method_on_the_same_data_for_the_same_steps() -> None:
    ablation = read_ablation(str(REPOSITORY / "jobs" / "methods.yaml"))
    assert {name: config.method.name for name, config in ablation.variants.items()} == {name: name for name in METHODS}
    assert set(ablation.compared_with.values()) == {"infonce"}
    first, *others = ablation.variants.values()
    for other in others:
        assert (other.data, other.model) == (first.data, first.model)
    trains = [config.train.model_dump() for config in ablation.variants.values()]
    steps = [sum(train.pop(f"stage{stage}_steps") or 0 for stage in (1, 2, 3)) for train in trains]
    assert set(steps) == {830}
    for train in trains:
        del train["stage2_learned_rate"]  # of methods with several stages
        assert train == trains[0]


def test_a_variant_may_start_from_another_config_than_the_base(tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    tiny = {"extends": "phantom-tiny"}
    written: dict[str, Any] = {"seeds": [0], "variants": {"A": tiny, "B": tiny | LENGTH}}
    path.write_text(yaml.safe_dump(written))
    first, second = read_ablation(str(path)).variants.values()
    assert first.data == second.data
    assert (first.train.stage1_steps, second.train.stage1_steps) == (40, LENGTH["train.stage1_steps"])
    written["variants"]["B"]["extends"] = "phantom-tinny"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(UserError, match=r"variant B: extends phantom-tinny: .*did you mean phantom-tiny\?"):
        read_ablation(str(path))


def test_a_run_goes_on_where_it_has_begun(tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    path.write_text(
        yaml.safe_dump({"seeds": [3], "variants": {"A": LENGTH, "A, more": LENGTH | {"train.weight_decay": 0.5}}})
    )
    ablation, folder = read_ablation(str(path)), RunFolder(str(tmp_path), "ablation", resumed=False)
    new = ablation.config(folder, "A, more", 3)
    assert (new.run.name, new.run.resume, new.train.seed, new.train.weight_decay) == ("a-more-3", None, 3, 0.5)
    begun = tmp_path / "ablation" / "runs" / "a-more-3"
    begun.mkdir(parents=True)
    (begun / "config.yaml").write_text("")
    again = ablation.config(folder, "A, more", 3)
    assert (again.run.name, again.run.resume) == (None, "a-more-3")


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"seeds": [0], "variants": {"A": {}}}, "variants: Dictionary should have at least 2 items"),
        ({"variants": {"A": {}, "B": {}}}, "seeds: Field required"),
        ({"seeds": ["a"], "variants": {"A": {}, "B": {}}}, "seeds.0: Input should be a valid integer"),
        ({"seeds": [0], "variants": {"A": ["x"], "B": {}}}, "variants.A: Input should be a valid dictionary"),
        ({"seeds": [0, 0], "variants": {"A": LENGTH, "B": LENGTH}}, "a seed appears twice"),
        (
            {"seeds": [0], "variants": {"A": LENGTH, "B": LENGTH | {"data.seed": 1}}},
            "data.seed differs between variants",
        ),
        ({"seeds": [0], "variants": {"A": {}, "B": {}}, "variant": {}}, "variant: Extra inputs are not permitted"),
        (
            {"seeds": [0], "variants": {"A": LENGTH, "B": {"train.sed": 1}}},
            "variant B: there is no setting 'train.sed'",
        ),
        ({"seeds": [0], "variants": {"A +": LENGTH, "a": LENGTH}}, "two variants would have the same folder"),
        ({"seeds": [0], "variants": {"A": {}, "B": {}}, "compare_with": "A"}, "compare_with: Input should be"),
        (
            {"seeds": [0], "variants": {"A": LENGTH, "B": LENGTH}, "compare_with": {"B": "C"}},
            "compare_with: there is no variant C; the variants are: A; B",
        ),
        ({"seeds": [0], "base": "none.yaml", "variants": {"A": {}, "B": {}}}, "none.yaml"),
    ],
)
def test_a_file_that_is_laid_out_otherwise_is_refused(written: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(UserError) as error:
        read_ablation(str(path))
    assert words in str(error.value)


def test_an_interval_over_seeds_is_wider_where_seeds_differ() -> None:
    alike = over_seeds([score("a-0", 0.5), score("a-1", 0.5)], {"A": ["a-0", "a-1"]})
    apart = over_seeds([score("a-0", 0.3), score("a-1", 0.7)], {"A": ["a-0", "a-1"]})
    assert alike[0].value == apart[0].value == pytest.approx(0.5)
    assert alike[0].interval is not None
    assert apart[0].interval is not None
    widths = [found.interval[1] - found.interval[0] for found in (alike[0], apart[0]) if found.interval]
    assert widths[1] > 2 * widths[0]
    assert apart[0].note == "2 seeds, standard deviation 0.2828"


def test_differences_are_paired_by_seed_in_whatever_order_runs_were_evaluated() -> None:
    by_chance = [score("b-1", 0.8), score("a-0", 0.3), score("a-1", 0.7), score("b-0", 0.4)]
    [found] = gains(over_seeds(by_chance, {"A": ["a-0", "a-1"], "B": ["b-0", "b-1"]}), {"B": "A"})
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1, 0.1))


def test_a_variant_is_compared_with_the_one_before_it_or_with_one_that_the_file_names(tmp_path: Path) -> None:
    path = tmp_path / "ablation.yaml"
    content = {"seeds": [0], "variants": dict.fromkeys("ABCD", LENGTH), "compare_with": {"C": "A"}}
    path.write_text(yaml.safe_dump(content))
    compared_with = read_ablation(str(path)).compared_with
    assert compared_with == {"B": "A", "C": "A", "D": "C"}
    found = gains([score("A", 0.2), score("B", 0.5), score("C", 0.4)], compared_with)
    assert [(each.first.encoder, each.second.encoder) for each in found] == [("B", "A"), ("C", "A")]
    assert [each.value for each in found] == pytest.approx([0.3, 0.2])
    assert found[0].interval == pytest.approx((0.3, 0.3))  # paired: the same resamples


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_runs_that_have_finished_are_evaluated_and_not_run_again(tmp_path: Path) -> None:
    config, runs = (
        small_config(data__phantom_studies=160, cpus_per_worker=0.25),
        tmp_path / "runs" / "ablation" / "runs",
    )
    path = tmp_path / "ablation.yaml"
    base = config.model_dump(mode="json", exclude={"run"})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    content = {
        "base": "base.yaml",
        "seeds": [0],
        "compare_with": {"B": "A"},
        "variants": {"A": {}, "B": {"train.seed": 5}},
    }
    path.write_text(yaml.safe_dump(content))
    for variant in "AB":
        folder = runs / run_name(variant, 0)
        write_run(folder, config)
        (folder / "result.json").write_text(json.dumps({"status": "finished"}))
    done = run_here(
        tmp_path, "evaluate", f"--evaluate.ablation={path}", "--run.name=ablation",
        "--evaluate.tasks=[retrieval, segmentation, grounding]", "--evaluate.head_steps=2",
        "--evaluate.fractions=[1.0]", "--evaluate.resamples=100", "--evaluate.cpus_per_worker=0.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1" not in done.stdout
    found = json.loads((tmp_path / "runs" / "ablation" / "ablation.json").read_text())
    scores = pd.DataFrame(found["scores"])
    assert set(scores["task"]) == {"retrieval", "segmentation", "grounding"}
    assert set(scores["encoder"]) == {"A", "B"}
    # write_run gives both the same weights: the gain and its interval are 0
    assert all(gain["gain"] == 0 and gain["interval"] == [0, 0] for gain in found["gains"])
    assert (tmp_path / "runs" / "ablation" / "ablation.png").stat().st_size > 10_000
