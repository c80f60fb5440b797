"""Token ids of reports, and the sentence of each token."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cmcgns.errors import BadRow, UserError

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

CACHED_SENTENCES = 50_000
"""Sentences whose token ids each process caches."""


@dataclass(frozen=True)
class EncodedReport:
    """One report as [CLS] sentence ... sentence [SEP]."""

    tokens_T: np.ndarray
    """Token ids, int32."""
    sentence_of_token_T: np.ndarray
    """Sentence of each token, -1 for [CLS] and [SEP], int16."""
    sentences: int
    """Number of sentences that fit completely."""


class ReportTokenizer:
    """A word-piece tokenizer that never splits a sentence. It is pickled into Ray tasks, so it has no transformers object."""

    def __init__(
        self, pieces: Tokenizer, max_tokens: int, max_sentences: int, names: dict[str, str] | None = None
    ) -> None:
        self.pieces = pieces
        self.max_tokens, self.max_sentences = max_tokens, max_sentences
        self.names = names or SPECIAL_TOKENS
        cls, sep, pad = (pieces.token_to_id(self.names[name]) for name in ("cls_token", "sep_token", "pad_token"))
        if cls is None or sep is None or pad is None:
            raise UserError(f"the tokenizer lacks one of {', '.join(self.names.values())}; give a BERT tokenizer")
        self.cls_id, self.sep_id, self.pad_id = int(cls), int(sep), int(pad)
        self._cache: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}}  # the cache is not pickled

    @property
    def vocabulary_size(self) -> int:
        """Number of entries, including special tokens."""
        return int(self.pieces.get_vocab_size())

    def encode(self, sentences: Sequence[str]) -> EncodedReport:
        """``sentences`` in order up to the first that does not fit completely; ``BadRow`` if none fits."""
        tokens, owners, kept = [self.cls_id], [-1], 0
        for ids in self._ids(sentences[: self.max_sentences]):
            if not ids or len(tokens) + len(ids) + 1 > self.max_tokens:
                break
            tokens += ids
            owners += [kept] * len(ids)
            kept += 1
        if not kept:
            raise BadRow(f"first sentence of the report does not fit into {self.max_tokens} tokens")
        return EncodedReport(np.array([*tokens, self.sep_id], np.int32), np.array([*owners, -1], np.int16), kept)

    def _ids(self, sentences: Sequence[str]) -> list[list[int]]:
        """The token ids of each sentence, with a cache of ``CACHED_SENTENCES``, because reports repeat sentences."""
        cache = self._cache
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in cache]
        if len(cache) + len(new) > CACHED_SENTENCES:  # a new dict, since other threads may still use the old one
            cache = self._cache = {}
            new = list(dict.fromkeys(sentences))
        if new:
            encoded = self.pieces.encode_batch(new, add_special_tokens=False)
            cache.update({sentence: each.ids for sentence, each in zip(new, encoded, strict=True)})
        return [cache[sentence] for sentence in sentences]

    def save(self, folder: Path) -> None:
        """Save as a Hugging Face tokenizer folder."""
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_object=self.pieces, model_max_length=self.max_tokens, **self.names)
        fast.save_pretrained(folder)


def load_tokenizer(tokenizer: str, text_encoder: str, max_tokens: int, max_sentences: int) -> ReportTokenizer:
    """The tokenizer of a local folder or hub name; `auto` is the text encoder's."""
    from transformers import AutoTokenizer

    name = text_encoder if tokenizer == "auto" else tokenizer
    try:
        fast = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.tokenizer '{name}' is not a tokenizer folder and cannot be downloaded from the hub: {reason}"
        ) from None
    names = {key: str(getattr(fast, key)) for key in SPECIAL_TOKENS}
    pieces = fast.backend_tokenizer
    pieces.no_truncation()
    pieces.no_padding()
    return ReportTokenizer(pieces, max_tokens, max_sentences, names)


def train_tokenizer(
    sentences: Iterable[tuple[str, str]], size: int, max_tokens: int, max_sentences: int, min_patients: int = 1
) -> ReportTokenizer:
    """A lower-cased WordPiece tokenizer of at most ``size`` entries: all letters, then the most frequent words.

    ``sentences``: each with its patient. With ``min_patients`` above 1, only words of so many patients and without digits.

    Not trained by the tokenizers library, whose trainer breaks ties by hash order: two runs with one seed would differ.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts, patients = Counter[str](), defaultdict[str, set[str]](set)
    for patient, sentence in sentences:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)):
            counts[word] += 1
            if len(patients[word]) < min_patients:
                patients[word].add(patient)
    letters = sorted({letter for word in counts for letter in word})
    entries = [*SPECIAL_TOKENS.values(), *letters, *(f"##{letter}" for letter in letters)]
    shared = {
        word
        for word in counts
        if min_patients == 1 or (len(patients[word]) >= min_patients and not any(map(str.isdigit, word)))
    }
    words = sorted(
        (word for word in shared if len(word) > 1 and counts[word] > 1), key=lambda word: (-counts[word], word)
    )
    entries += words[: max(size - len(entries), 0)]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    pieces.normalizer, pieces.pre_tokenizer, pieces.decoder = normalizer, splitter, decoders.WordPiece()
    trained = ReportTokenizer(pieces, max_tokens, max_sentences)
    pieces.post_processor = processors.BertProcessing(("[SEP]", trained.sep_id), ("[CLS]", trained.cls_id))
    return trained
