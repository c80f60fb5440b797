"""Texts as the model reads them: whole reports as in pretraining, and the prompts of zero-shot classification."""

from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from cmcgns.data.batch import pad_reports
from cmcgns.data.reports import ParsedReport, as_parsed, normalised_words, parse_report
from cmcgns.data.tokenizer import EncodedReport, ReportTokenizer
from cmcgns.errors import BadRow, UserError
from cmcgns.library.films import FILM_SUFFIXES
from cmcgns.models.dual_encoder import DualEncoder

# T texts, D embedding

Prompts = dict[str, dict[str, list[str]]]
"""The `present` and `absent` sentences of each class."""


def text_list(texts: Iterable[str]) -> list[str]:
    """``texts`` as a list; raises ``UserError`` for a single text."""
    if isinstance(texts, str | bytes):
        raise UserError("texts: got one text; give a list of texts, such as [text]")
    return list(texts)


def read_texts(texts: Sequence[str], tokenizer: ReportTokenizer) -> list[tuple[ParsedReport, EncodedReport]]:
    """Each text as reports are read in pretraining; one that is too short for a report is read as one sentence.

    Raises:
        UserError: one of them cannot be read, by its number.
    """
    return [read_text(text, tokenizer, f"text {number}") for number, text in enumerate(texts)]


def read_text(text: str, tokenizer: ReportTokenizer, name: str = "text") -> tuple[ParsedReport, EncodedReport]:
    """The text, parsed and in tokens; messages call it ``name`` and never quote it."""
    if not isinstance(text, str):
        raise UserError(f"{name} is of type {type(text).__name__}; give a string. Films go to embed_films")
    if text.lower().endswith(FILM_SUFFIXES):
        raise UserError(f"{name} is the name of a film; give texts here, and films to embed_films")
    words = normalised_words(text)
    if not words:
        raise UserError(f"{name} has no word")
    try:
        try:
            parsed = parse_report(text)
        except BadRow:
            parsed = as_parsed([" ".join(words)])
        return parsed, tokenizer.encode(parsed.sentences)
    except BadRow as reason:
        raise UserError(f"{name} cannot be used: {reason}") from None


@torch.inference_mode()
def embed_encoded(model: DualEncoder, encoded: Sequence[EncodedReport], pad_id: int) -> Tensor:
    """Embedding of each text, rows of length 1, (T, D)."""
    device = next(model.parameters()).device
    counts = np.array([each.sentences for each in encoded])
    reports = pad_reports(
        [each.tokens_T for each in encoded], [each.sentence_of_token_T for each in encoded], counts, pad_id
    )
    rectangles = reports.token_BT, reports.token_mask_BT, reports.sentence_of_token_BT, reports.sentence_mask_BS
    _, report_BD = model.text_encoder(*(part.to(device) for part in rectangles))
    return report_BD


def embed_sentences(model: DualEncoder, tokenizer: ReportTokenizer, texts: Sequence[str]) -> NDArray[np.float64]:
    """Embedding of each text as one sentence and a separate report, rows of length 1, (T, D)."""
    encoded = [tokenizer.encode([" ".join(normalised_words(text))]) for text in texts]
    return np.asarray(embed_encoded(model, encoded, tokenizer.pad_id).float().cpu().numpy(), np.float64)


def class_score(
    model: DualEncoder, tokenizer: ReportTokenizer, image_ND: Any, sides: dict[str, list[str]]
) -> NDArray[np.float64]:
    """Each film's mean similarity to the ``present`` sentences of a class, minus that to its ``absent`` ones if it has any."""
    present_D = embed_sentences(model, tokenizer, sides["present"]).mean(0)
    absent_D = embed_sentences(model, tokenizer, sides["absent"]).mean(0) if sides.get("absent") else 0.0
    return np.asarray(image_ND @ (present_D - absent_D), np.float64)


def built_in_prompts() -> dict[str, Prompts]:
    """Prompts by kind of set (phantom, chexpert, nih, ...)."""
    return dict(yaml.safe_load((resources.files("cmcgns.library") / "prompts.yaml").read_bytes()))


def check_prompts(name: str, prompts: Any, layout: str) -> None:
    """Raise ``UserError`` if ``prompts`` are not sentences by class and side; ``layout`` shows how to write them."""
    for of_class, sides in (prompts if isinstance(prompts, dict) else {"?": None}).items():
        if not _are_prompts(sides):
            raise UserError(f"{name}: {of_class} needs sentences under `present`, optionally `absent`; write {layout}")


def _are_prompts(sides: Any) -> bool:
    are_sentences = lambda side: isinstance(side, list) and all(isinstance(text, str) for text in side)
    known = isinstance(sides, dict) and sides.keys() <= {"present", "absent"}
    return bool(known and sides.get("present") and all(map(are_sentences, sides.values())))
