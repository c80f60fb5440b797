"""An evaluation, embeddings and the library in one process without Ray: on the CPU, then on a stand-in for a GPU.

`python -m tests.evaluate.on_stand_in FOLDER` prints a JSON line for each of both: scores and embeddings, and for every
Ray function that was called how many GPUs it reserved, and how many heavy operators ran where. Ray is replaced by calls in this
process, because a stand-in lives in one; ``tests/evaluate/test_evaluate_job.py`` shows the same with Ray on CPUs.
"""

# ruff: noqa: E402
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.remote_function import RemoteFunction

torch.inference_mode = torch.no_grad  # type: ignore[assignment,misc]  # a backend in Python has no inference tensors

from cmcgns.cluster import ray_private
from cmcgns.data import stream
from cmcgns.evaluate import embed, features, films, pairs, tasks
from cmcgns.evaluate.config import EvaluateConfig, EvaluateJobConfig
from cmcgns.evaluate.embed import EmbedSentences, open_split
from cmcgns.evaluate.run import EvaluateJob, measure_all
from cmcgns.library.model import Model
from cmcgns.library.runs import open_run
from cmcgns.search.build import EmbedFilms as SearchFilms
from cmcgns.search.config import SearchConfig
from tests.evaluate.test_embed_job import write_run
from tests.small import small_config
from tests.stand_in_device import StandIn, register

QUICK: dict[str, Any] = {
    "draws": 1, "fractions": (1.0,), "resamples": 100, "head_steps": 2, "head_batch": 4, "batch_size": 64,
    "segmentation_fractions": (1.0,), "encoder": ("frozen", "tuned"), "beside": (),
}  # fmt: skip


class Reference:
    """What Ray's object store would hold."""

    def __init__(self, value: Any) -> None:
        self.value = value


def get(reference: Any) -> Any:
    return reference.value if isinstance(reference, Reference) else reference


class Rows:
    """As much of a Ray dataset as the evaluation uses."""

    def __init__(self, tables: list[pa.Table], log: list[dict[str, Any]]) -> None:
        self.tables, self.log = tables, log

    def map_batches(self, function: Any, batch_size: int | None = None, **options: Any) -> "Rows":
        given, own = options.get("fn_constructor_args", ()), options.get("fn_kwargs", {})
        with StandIn() as device:
            call = function(*given) if isinstance(function, type) else function
            made = [call(table, **own) for table in self.tables]
        name = f"{function.__module__}.{function.__name__}" if isinstance(function, type) else "reading"
        self.log.append({"name": name, "gpus": options.get("num_gpus", 0), "heavy": dict(device.heavy)})
        tables = [part for each in made for part in ([each] if isinstance(each, pa.Table) else each)]
        return Rows(tables, self.log)

    def iter_batches(self, **options: Any) -> Iterator[pa.Table]:
        yield from self.tables


class Called:
    """In place of a Ray function: calls it in this process, and logs what it reserved and where it computed."""

    def __init__(self, function: RemoteFunction, log: list[dict[str, Any]], gpus: float = 0) -> None:
        self.function, self.log, self.gpus = function, log, gpus

    def options(self, num_gpus: float) -> "Called":
        return Called(self.function, self.log, num_gpus)

    def remote(self, *arguments: Any) -> Reference:
        name = self.function._function.__name__
        task = arguments[1] if name in ("run_pair_task", "run_feature_task") else arguments[0]
        with StandIn() as device:
            made = self.function._function(*map(get, arguments))
        described = name if not isinstance(task, str) else f"{name} {task}"
        self.log.append({"name": described, "gpus": self.gpus, "heavy": dict(device.heavy)})
        return Reference(made)


@contextmanager
def without_ray(device: torch.device, log: list[dict[str, Any]]) -> Iterator[None]:
    """Ray's functions called in this process; a GPU is ``device``."""
    coordinator = SimpleNamespace(add_bad_rows=SimpleNamespace(remote=lambda rows: None))
    replaced: list[tuple[Any, str, Any]] = [
        (ray, "put", Reference),
        (ray, "get", get),
        (ray, "wait", lambda references: (references[:1], references[1:])),
        (ray.data, "from_arrow", lambda tables: Rows(tables, log)),
        (ray.data, "range", lambda number, **_: Rows([pa.table({"id": list(range(number))})], log)),
        (ray_private, "set_num_cpus", lambda rows, cpus: rows),
        (pairs, "start_coordinator", lambda *_: coordinator),
    ]
    replaced += [(module, "ordered_context", lambda *_: nullcontext()) for module in (stream, features, films)]
    replaced += [
        (module, "device_of", lambda use_gpu: device if use_gpu else torch.device("cpu"))
        for module in (embed, features, tasks)
    ]
    replaced += [
        (tasks, name, Called(value, log)) for name, value in vars(tasks).items() if isinstance(value, RemoteFunction)
    ]
    with ExitStack() as stack:
        for module, name, other in replaced:
            stack.enter_context(patch.object(module, name, other))
        yield


def evaluated(folder: Path, use_gpu: bool, device: torch.device) -> dict[str, Any]:
    """Scores, failures and log of one evaluation of the run in ``folder``."""
    settings = EvaluateConfig(run=str(folder / "run"), use_gpu=use_gpu, **QUICK)
    where = {"storage": str(folder), "name": f"gpu-{use_gpu}"}
    evaluation = EvaluateJob(
        EvaluateJobConfig.model_validate({"evaluate": settings.model_dump(), "run": where})
    ).evaluation
    log: list[dict[str, Any]] = []
    with without_ray(device, log):
        measure_all(evaluation, str(folder / f"features-{use_gpu}"))
    scores = {f"{each.task} {each.setting} {each.metric}": each.value for each in evaluation.scores}
    return {"scores": scores, "failures": evaluation.failures, "log": log}


def embedded(folder: Path, use_gpu: bool, device: torch.device) -> dict[str, Any]:
    """Vectors that the actors of `cmcgns embed` and of a search build make, and their log."""
    settings = SearchConfig(run=str(folder / "run"), index=str(folder), use_gpu=use_gpu, split="test", pictures=False)
    opened = open_run("embed.run", settings.run)
    split, log, vectors = open_split(opened, settings), list[dict[str, Any]](), dict[str, Any]()
    coordinator = SimpleNamespace(add_bad_rows=None)
    with without_ray(device, log):
        for actor in (EmbedSentences, SearchFilms):
            with embed.embedded(actor, opened, settings, split, coordinator, split.studies) as rows:
                made = pa.concat_tables(rows.iter_batches())
            for name in {"vector", "sentence_vector", "film", "report"} & set(made.column_names):
                vectors[f"{actor.__qualname__} {name}"] = made[name].to_pylist()
    return {"vectors": vectors, "log": log}


def of_library(folder: Path, device: torch.device) -> dict[str, Any]:
    """What the library makes of two films and two texts."""
    shown = [np.full((48, 40), level, np.uint8) for level in (30, 200)]
    texts = ["The heart is enlarged. No effusion.", "There is a left effusion."]
    with StandIn():
        model = Model(open_run("run", str(folder / "run")), device, progress=False)
        return {
            "films": model.embed_films(shown).tolist(),
            "texts": model.embed_reports(texts).tolist(),
            "parts": model.similarity(shown, texts, "both").tolist(),
            "prompts": np.stack(list(model.zero_shot(shown, "phantom").values())).tolist(),
            "heat map": model.heatmap(shown[0], texts[0]).weight_Sgg.tolist(),
        }


def main() -> None:
    device, folder = register(), Path(sys.argv[1])
    torch.set_num_threads(1)
    write_run(folder / "run", small_config(data__phantom_studies=100))
    for use_gpu in (False, True):
        found, more = evaluated(folder, use_gpu, device), embedded(folder, use_gpu, device)
        found["log"] += more["log"]
        found["vectors"] = more["vectors"] | of_library(folder, device if use_gpu else torch.device("cpu"))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
