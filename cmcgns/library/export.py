"""The export of a finished run as a folder to give away: encoders, heads, settings, and a model card written from the run."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cmcgns import __version__, storage
from cmcgns.config.sections import is_generated
from cmcgns.errors import UserError
from cmcgns.library.runs import EXPORT_SETTINGS, PretrainedRun, open_run, portable_settings
from cmcgns.run_folder import EXPORT_HASHES
from cmcgns.storage.integrity import write_hashes

CARD = "README.md"
"""Where the Hugging Face hub looks for a model card."""
OF_A_CLASS = ": "
"""In names of metrics of single classes, which the card leaves out."""


def export_run(
    run_uri: str, out: str, evaluation_uri: str | None = None, onnx: bool = False, transformers: bool = False
) -> str:
    """Write the export of the finished run in the folder ``run_uri`` to the new folder ``out``. Returns its URI.

    ``evaluation_uri``: the folder of an evaluation whose scores go into the model card. ``onnx``: also write both as ONNX.
    ``transformers``: also write both as one model of plain transformers.

    Raises:
        UserError: the run has no export, the evaluation is of another run, there are files at ``out``, or the model does not fit
            what was asked for.
    """
    out = storage.absolute("export", out)
    if storage.exists(out) and storage.list_files(out):
        raise UserError(f"export: {out} has files already; give a new folder")
    run = open_run("export", run_uri)
    card = model_card(run, read_result(run), read_scores(run, evaluation_uri), onnx, transformers)
    with storage.scratch_folder() as local:
        storage.download_folder(run.export, local)
        (local / EXPORT_SETTINGS).write_text(portable_settings(run.config))
        (local / CARD).write_text(card)
        if onnx:
            from cmcgns.library.onnx import write_onnx  # needs packages of its own

            write_onnx(run.load_model(), run.config, run.vocabulary_size, local)
        if transformers:
            from cmcgns.library.dual_encoder import write_dual_encoder  # torch is slow to import

            write_dual_encoder(run.load_model(), run.config, run.tokenizer, local)
        (local / EXPORT_HASHES).unlink(missing_ok=True)
        write_hashes(local, EXPORT_HASHES)
        storage.upload_folder(local, out)
    return out


def read_result(run: PretrainedRun) -> dict[str, Any]:
    """result.json of the run; empty if it is gone."""
    uri = storage.join(run.uri, "result.json")
    return dict(json.loads(storage.read_bytes(uri))) if storage.exists(uri) else {}


def read_scores(run: PretrainedRun, uri: str | None) -> list[dict[str, Any]]:
    """The scores of the run in the evaluation at ``uri``, without those of single classes."""
    if uri is None:
        return []
    uri = storage.absolute("export", uri)
    try:
        facts = json.loads(storage.read_bytes(storage.join(uri, "evaluation.json")))
    except storage.MissingFileError:
        raise UserError(
            f"export: {uri} contains no evaluation; give <run.storage>/<run.name> of a finished one"
        ) from None
    names = [name for name, origin in facts["encoders"].items() if origin == run.export]
    if not names:
        raise UserError(
            f"export: the evaluation {uri} is not of the run {run.uri}; evaluate it with --evaluate.run={run.uri}"
        )
    return [score for score in facts["scores"] if score["encoder"] == names[0] and OF_A_CLASS not in score["metric"]]


def model_card(
    run: PretrainedRun,
    result: dict[str, Any],
    scores: Sequence[dict[str, Any]],
    onnx: bool = False,
    transformers: bool = False,
) -> str:
    """The model card, in Markdown: data, settings, metrics and limits; nothing that tells where the data are."""
    environment = Environment(
        loader=PackageLoader("cmcgns.library", "."),
        autoescape=False,  # Markdown; no text in it comes from outside the run
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    card = environment.get_template("model_card.md.jinja")
    settings = json.loads(portable_settings(run.config))
    metrics = {name: value for name, value in result.get("metrics", {}).items() if "recall" in name}
    return card.render(
        run=run, config=run.config, settings=settings, result=result, metrics=metrics, scores=scores, version=__version__,
        data=describe_data(run), lines=list(setting_lines(settings)), onnx=onnx,
        transformers=transformers,
    )  # fmt: skip


def describe_data(run: PretrainedRun) -> str:
    """What the run was trained on, without its location."""
    data = run.config.data
    if is_generated(data.uri, data.format):
        return (
            f"{data.phantom_studies:,} generated studies (the phantom corpus, seed {data.seed}): drawings, no patients"
        )
    return f"a corpus in the layout `{Path(data.format).name}`, views {', '.join(data.views)}"


SHOWN = {
    "data": ("views", "image_size", "resize", "crop_borders", "max_tokens", "max_sentences", "seed"),
    "train": (
        "stage1_steps", "stage1_epochs", "stage2_steps", "stage2_epochs", "stage3_steps", "stage3_epochs", "global_batch_size",
        "learning_rate", "weight_decay", "precision", "seed",
    ),
}  # fmt: skip
"""Settings in the card besides all of `model` and `objective`."""


def setting_lines(settings: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Rows of a table with the settings that shape the model."""
    for section in ("data", "model", "objective", "train"):
        for key, value in settings[section].items():
            if key in SHOWN.get(section, (key,)) and value is not None:
                yield f"| `{section}.{key}` | {plain(value)} |"


def plain(value: Any) -> str:
    """A value without five digits in a row or around a point, which the check of exports takes for the number of a record."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
