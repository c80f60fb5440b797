"""A trained model in use: embeddings of films and texts, similarity, zero-shot scores and heat maps. Needs no Ray.

N films, T texts, S sentences of a text, P patches of a film (g x g), R side of the padded square, D embedding.
"""

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from cmcgns.data.batch import Batcher, ImageReportBatch, crop, normalise
from cmcgns.data.record import Block
from cmcgns.data.reports import ParsedReport
from cmcgns.data.tokenizer import EncodedReport
from cmcgns.data.views import ViewSettings
from cmcgns.errors import BadRow, UserError
from cmcgns.library.film_encoder import FilmEncoder
from cmcgns.library.films import FilmLike, film_list, read_squares
from cmcgns.library.hub import download, is_hub_name
from cmcgns.library.runs import LOAD, PretrainedRun, open_model
from cmcgns.library.texts import (
    Prompts,
    built_in_prompts,
    check_prompts,
    class_score,
    embed_encoded,
    read_texts,
    text_list,
)
from cmcgns.methods.base import ComparesParts, SentenceAttention
from cmcgns.methods.parts import CollectedParts
from cmcgns.models.device import autocast, unit_rows
from cmcgns.models.retrieval import centred, mean_over_sentences, with_global

Floats = NDArray[np.float32]
Precision = Literal["fp32", "bf16"]
By = Literal["global", "parts", "both"]
HEAT_SHARE = 0.45
"""Of the colour of a heat map's pixel; the rest is the film's."""
PROMPTS_LAYOUT = "{class: {present: [...], absent: [...]}}"
Item = TypeVar("Item")


def load(
    where: str | os.PathLike[str],
    device: str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 32,
    trusted: Collection[str] = (),
    progress: bool = True,
    revision: str | None = None,
) -> "Model":
    """The model of the finished run, or of the export of one, in the folder or at the `s3://` URI ``where``, or OWNER/NAME on the
    Hugging Face hub, there at the branch, tag or commit ``revision``.

    ``device``: `cpu`, `cuda` or `cuda:1`. ``batch_size``: films or texts of one forward. ``trusted``: modules that the run's
    settings name, besides ours, and that may be executed. ``progress``: show a bar in a terminal or notebook.

    Raises:
        UserError: there is no model, it is damaged, or the device is missing.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision {precision!r}: choose fp32 or bf16")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: give at least 1")
    on_hub = is_hub_name(where)
    if revision is not None and not on_hub:
        raise UserError(
            f"revision {revision!r} is for OWNER/NAME on the Hugging Face hub, not for {where}; leave it out"
        )
    uri = download(LOAD, str(where), revision, progress) if on_hub else str(where)
    return Model(open_model(LOAD, uri, trusted), device_named(device), precision, batch_size, progress)


def device_named(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `cuda:1`; raises ``UserError`` if this machine has none of that name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: choose cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; choose another, or cpu"
        )
    return device


@dataclass(frozen=True)
class Heatmap:
    """Where each sentence of a text looks on a film."""

    sentences: list[str]
    """Normalised, as the model read them."""
    weight_Sgg: Floats
    """Attention of each sentence to each patch."""
    film_HW: NDArray[np.uint8]
    """The film as the model saw it, resized and center-cropped."""

    def picture(self, sentence: int = 0, size: int | None = None) -> Image.Image:
        """The film with the attention of one sentence over it, dark where it is least, yellow where it is most; ``size`` pixels
        wide and high, by default as the model saw the film."""
        from cmcgns.plotting import colormaps  # matplotlib is slow to import

        weight_gg = self.weight_Sgg[sentence]
        sides = (size or len(self.film_HW),) * 2
        level_gg = (weight_gg - weight_gg.min()) / max(float(np.ptp(weight_gg)), 1e-12)
        heat = Image.fromarray(np.rint(colormaps["magma"](level_gg)[..., :3] * 255).astype(np.uint8))
        film = Image.fromarray(self.film_HW).convert("RGB").resize(sides, Image.Resampling.BICUBIC)
        film_HW3, heat_HW3 = np.asarray(film), np.asarray(heat.resize(sides, Image.Resampling.NEAREST))
        return Image.fromarray(np.rint((1 - HEAT_SHARE) * film_HW3 + HEAT_SHARE * heat_HW3).astype(np.uint8))


class Model:
    """A trained dual encoder. It takes films as ``FilmLike``, and reads films and texts as pretraining does."""

    def __init__(
        self,
        run: PretrainedRun,
        device: torch.device,
        precision: Precision = "fp32",
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        self.run, self.method, self.config = run, run.method, run.config
        self.device, self.precision = device, precision
        self.batch_size, self.progress = batch_size, progress
        self.network = run.load_model().to(device)
        self.film_encoder = FilmEncoder(self.network.image_encoder, self.network.image_projection).to(device).eval()

    def __repr__(self) -> str:
        return (
            f"<cmcgns.Model {self.run.uri}: {self.config.method.name}, D {self.dim}, {self.config.data.image_size} pixels, "
            f"{self.precision} on {self.device}>"
        )

    @property
    def dim(self) -> int:
        """Dimension D of the embeddings."""
        return self.config.model.embed_dim

    def embed_films(self, films: Iterable[FilmLike]) -> Floats:
        """Embeddings of films, rows of length 1, (N, D)."""
        films = film_list(films)
        return self._embed_squares(self._squares(films), len(films))

    def embed_squares(self, squares: Sequence[NDArray[np.uint8]]) -> Floats:
        """The same of padded squares, which ``films.read_square`` or a reader has read."""
        return self._embed_squares(squares, len(squares))

    @torch.inference_mode()
    def _embed_squares(self, squares_of_films: Iterable[NDArray[np.uint8]], number: int) -> Floats:
        rows = [np.zeros((0, self.dim), np.float32)]
        for squares in self._batches(squares_of_films, number, "films"):
            with self._precision():
                _, image_BD = self.film_encoder(self._seen(np.stack(squares)))
            assert image_BD is not None
            rows.append(self._rows(image_BD))
        return np.concatenate(rows)

    @torch.inference_mode()
    def embed_reports(self, texts: Iterable[str]) -> Floats:
        """Embeddings of reports or sentences, rows of length 1, (T, D)."""
        rows, pad_id = [np.zeros((0, self.dim), np.float32)], self._tokenizer.pad_id
        encoded = [each for _, each in self._read(text_list(texts))]
        for some in self._batches(encoded, len(encoded), "texts"):
            with self._precision():
                rows.append(self._rows(embed_encoded(self.network, some, pad_id)))
        return np.concatenate(rows)

    def similarity(self, films: Iterable[FilmLike], texts: Iterable[str], by: By = "global") -> Floats:
        """How well each text fits each film, (N, T); larger is better.

        ``by``: `global`, cosines of whole films and whole texts; `parts`, each sentence finds itself on the film, without what a
        text has in common with all films; `both`, combined as in the evaluation's retrieval. `parts` and `both` compare the films
        that are given with each other, and hold the patches of all in memory: give some thousand at most.

        Raises:
            UserError: the method compares no parts, or there are fewer than two films for it.
        """
        films, texts = film_list(films), text_list(texts)
        if by == "global":
            return np.asarray(self.embed_films(films) @ self.embed_reports(texts).T)
        if by not in ("parts", "both"):
            raise UserError(f"by {by!r}: choose global, parts or both")
        if not isinstance(self.method, ComparesParts):
            raise UserError(
                f"by {by!r}: method {self.config.method.name} compares no parts of films; choose by='global'"
            )
        if len(films) < 2:
            raise UserError(f"by {by!r} compares films with each other: give at least two, or choose by='global'")
        if not len(texts):
            return np.zeros((len(films), 0), np.float32)
        score_TN, image_ND, report_TD = self._part_scores(self.method, films, texts)
        found_TN = with_global(score_TN, image_ND, report_TD) if by == "both" else score_TN
        return np.asarray(found_TN.T.cpu().numpy())

    @torch.inference_mode()
    def zero_shot(self, films: Iterable[FilmLike], prompts: str | Prompts) -> dict[str, NDArray[np.float64]]:
        """A score per film for each class, larger if the finding is likelier: mean similarity to the ``present`` sentences of the
        class minus that to its ``absent`` ones.

        ``prompts``: `{class: {present: [...], absent: [...]}}`, or the name of built-in ones (chexpert, nih, rsna, siim, covidx,
        phantom).
        """
        if isinstance(prompts, str):
            known = built_in_prompts()
            if prompts not in known:
                raise UserError(
                    f"prompts {prompts!r}: there are built-in ones for {', '.join(known)}; or give {PROMPTS_LAYOUT}"
                )
            prompts = known[prompts]
        check_prompts("prompts", prompts, PROMPTS_LAYOUT)
        image_ND = self.embed_films(films)
        scores = dict[str, NDArray[np.float64]]()
        for name, sides in prompts.items():
            try:
                with self._precision():
                    scores[name] = class_score(self.network, self._tokenizer, image_ND, sides)
            except BadRow as reason:
                raise UserError(f"prompts: a sentence of {name} cannot be used: {reason}") from None
        return scores

    @torch.inference_mode()
    def heatmap(self, film: FilmLike, text: str) -> Heatmap:
        """Where each sentence of ``text`` looks on the film. Sentences are read in the context of their whole text.

        Raises:
            UserError: the method has no attention.
        """
        if not self.method.has_attention:
            raise UserError(
                f"heatmap: method {self.config.method.name} attends to no patches (docs/methods.md says which do)"
            )
        return self.heatmaps(list(self._squares([film])), self._read([text]))[0]

    @torch.inference_mode()
    def heatmaps(
        self, squares: Sequence[NDArray[np.uint8]], texts: Sequence[tuple[ParsedReport, EncodedReport]]
    ) -> list[Heatmap]:
        """The heat map of each padded square with its own text, which ``texts.read_text`` or a reader has read."""
        found = list[Heatmap]()
        for rows in self._batches(range(len(squares)), len(squares), "heat maps"):
            some, read = [squares[row] for row in rows], [texts[row] for row in rows]
            with self._precision():
                attention = self.method.attention(self.network, self.network(self.batch(some, read)))
            assert isinstance(attention, SentenceAttention)
            grid = int(attention.weight_BSP.shape[2] ** 0.5)
            for square_RR, (parsed, encoded), weight_SP in zip(some, read, attention.weight_BSP, strict=True):
                weight_Sgg = weight_SP[: encoded.sentences].float().cpu().numpy().reshape(-1, grid, grid)
                found.append(Heatmap(parsed.sentences[: encoded.sentences], weight_Sgg, self.seen(square_RR)))
        return found

    def seen(self, square_RR: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The part of a padded square that the model sees, (H, W)."""
        return crop(torch.from_numpy(square_RR.copy())[None, None], self.config.data.image_size, None)[0, 0].numpy()

    @torch.inference_mode()
    def _part_scores(self, method: ComparesParts, films: Sequence[FilmLike], texts: Sequence[str]) -> Any:
        """Centred scores by parts (T, N), and the embeddings of films and texts, on the device."""
        squares, read = list(self._squares(films)), self._read(texts)
        sentences, patches = CollectedParts(len(read)), CollectedParts(len(squares))
        images, reports = list[torch.Tensor](), list[torch.Tensor]()
        number = max(len(squares), len(read))
        for rows in self._batches(range(number), number, "films and texts"):
            # films and texts go through the model together; the fewer of both begin again from the first
            batch = self.batch([squares[i % len(squares)] for i in rows], [read[i % len(read)] for i in rows])
            with self._precision():
                outputs = self.network(batch)
            found = method.parts(outputs, batch)
            for collected, vectors, embedded_BD, total in (
                (sentences, reports, outputs.report_BD, len(read)),
                (patches, images, outputs.image_BD, len(squares)),
            ):
                new = min(max(total - rows[0], 0), len(rows))
                if new:
                    collected.add(found, new)
                    vectors.append(embedded_BD[:new].float())
        of_texts = sentences.joined()
        score_nN = method.part_scores(of_texts.sentences, patches.joined().films)
        score_TN = centred(mean_over_sentences(score_nN, of_texts.study_n, len(read)))
        return score_TN, torch.cat(images), torch.cat(reports)

    def batch(
        self,
        squares: Sequence[NDArray[np.uint8]],
        texts: Sequence[tuple[ParsedReport, EncodedReport]],
        views: tuple[int, ViewSettings] | None = None,
    ) -> ImageReportBatch:
        """Films with their texts as the model takes them; ``views``: of ``Method.views``, where they are trained with."""
        block = Block(
            positions=np.arange(len(squares)),
            draw_keys=np.zeros(len(squares), np.int64),
            images_BRR=np.stack(squares),
            tokens=[encoded.tokens_T for _, encoded in texts],
            sentence_of_token=[encoded.sentence_of_token_T for _, encoded in texts],
            sentence_hashes=[np.array(parsed.sentence_hashes[: encoded.sentences]) for parsed, encoded in texts],
            report_hashes=np.array([parsed.report_hash for parsed, _ in texts]),
        )
        words = self.method.continuations(self._tokenizer)
        batcher = Batcher(self.config, self._tokenizer.pad_id, self.device, views, words)
        return batcher(block, (int(block.sentence_counts.sum()),), training=False)

    def _squares(self, films: Sequence[FilmLike]) -> Iterator[NDArray[np.uint8]]:
        return read_squares(films, self.config.data, ahead=2 * self.batch_size)

    def _seen(self, square_BRR: NDArray[np.uint8]) -> torch.Tensor:
        """Squares as the image encoder sees them, (B, 1, H, W)."""
        squares_B1RR = torch.from_numpy(square_BRR)[:, None].to(self.device)
        return normalise(crop(squares_B1RR, self.config.data.image_size, None))

    @property
    def _tokenizer(self) -> Any:
        if not self.config.data.reports:
            raise UserError(f"{self.run.uri} was trained on films alone (data.reports false): it reads no texts")
        return self.run.tokenizer

    def _read(self, texts: Sequence[str]) -> list[tuple[ParsedReport, EncodedReport]]:
        return read_texts(texts, self._tokenizer)

    def _rows(self, values_BD: torch.Tensor) -> Floats:
        return unit_rows(values_BD, self.precision)

    def _precision(self) -> Any:
        return autocast(self.device, self.precision)

    def _batches(self, items: Iterable[Item], number: int, what: str) -> Iterator[list[Item]]:
        """``items`` in lists of ``batch_size``; with a progress bar if there is more than one."""
        console = Console(stderr=True)
        shown = self.progress and number > self.batch_size and (console.is_terminal or console.is_jupyter)
        ordered = iter(track(items, what, number, console=console, transient=True, disable=not shown))
        while some := list(itertools.islice(ordered, self.batch_size)):
            yield some
