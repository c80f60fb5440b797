"""Token ids of reports, and the sentence of each token."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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


PIECES_SHARE = 0.25
"""Share of a vocabulary with subwords that is kept for pieces, even if there are words for all of it."""


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

    @property
    def continues_V(self) -> np.ndarray:
        """True for the entries that continue a word, such as `##ing`; bool (V,)."""
        continues_V = np.zeros(self.vocabulary_size, bool)
        prefix = getattr(self.pieces.model, "continuing_subword_prefix", None)
        if prefix:
            continues_V[[index for entry, index in self.pieces.get_vocab().items() if entry.startswith(prefix)]] = True
        return continues_V

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
    sentences: Iterable[tuple[str, str]],
    size: int,
    max_tokens: int,
    max_sentences: int,
    min_patients: int = 1,
    subwords: bool = False,
) -> ReportTokenizer:
    """A lower-cased WordPiece tokenizer of at most ``size`` entries: all letters, then the most frequent words, and with
    ``subwords`` pieces of the other words.

    ``sentences``: each with its patient. With ``min_patients`` above 1, only words and pieces of so many patients and without
    digits.

    Not trained by the tokenizers library, whose trainer breaks ties by hash order: two runs with one seed would differ.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    corpus = CountedWords(min_patients)
    for patient, sentence in sentences:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)):
            corpus.add(word, patient)
    letters = sorted({letter for word in corpus.counts for letter in word})
    entries = [*SPECIAL_TOKENS.values(), *letters, *(f"##{letter}" for letter in letters)]
    words, room = corpus.frequent_words(), max(size - len(entries), 0)
    entries += words_and_pieces(corpus, words, room) if subwords else words[:room]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    pieces.normalizer, pieces.pre_tokenizer, pieces.decoder = normalizer, splitter, decoders.WordPiece()
    trained = ReportTokenizer(pieces, max_tokens, max_sentences)
    pieces.post_processor = processors.BertProcessing(("[SEP]", trained.sep_id), ("[CLS]", trained.cls_id))
    return trained


class CountedWords:
    """The words of a corpus: how often each occurs, and which patients have it."""

    def __init__(self, min_patients: int) -> None:
        self.min_patients = min_patients
        self.counts, self.patients = Counter[str](), defaultdict[str, set[str]](set)

    def add(self, word: str, patient: str) -> None:
        """Count one occurrence."""
        self.counts[word] += 1
        if len(self.patients[word]) < self.min_patients:  # enough to decide on any union of them
            self.patients[word].add(patient)

    def may_be_entry(self, text: str, words: Iterable[str]) -> bool:
        """True if enough patients have one of the ``words``, in which ``text`` occurs, and it has no digit."""
        if self.min_patients == 1:
            return True
        return not any(map(str.isdigit, text)) and self._have_enough_patients(words)

    def _have_enough_patients(self, words: Iterable[str]) -> bool:
        found: set[str] = set()
        for word in words:
            found |= self.patients[word]
            if len(found) >= self.min_patients:
                return True
        return False

    def frequent_words(self) -> list[str]:
        """Words that may be entries, the most frequent first."""
        words = [w for w, count in self.counts.items() if len(w) > 1 and count > 1 and self.may_be_entry(w, [w])]
        return sorted(words, key=lambda word: (-self.counts[word], word))


def words_and_pieces(corpus: CountedWords, words: list[str], room: int) -> list[str]:
    """Entries for ``room``: the first ``words``, pieces of all other words, and if room is left the next words."""
    whole = words[: room - int(room * PIECES_SHARE)]
    pieces = PieceTrainer(corpus, set(whole)).train(room - len(whole))
    known = set(pieces)
    return [*whole, *pieces, *(word for word in words[len(whole) :] if word not in known)][:room]


Pair = tuple[str, str]
"""Two neighbouring pieces of a word; a piece that does not begin a word starts with ##."""


class PieceTrainer:
    """Merges neighbouring pieces of words, from letters on, the most frequent pair first (byte-pair encoding).

    A pair counts where it occurs in words without an entry; the patients of all words in which it occurs have it. Equally
    frequent pairs are merged in alphabetical order, so the result depends on nothing but the counted words.
    """

    def __init__(self, corpus: CountedWords, whole: set[str]) -> None:
        self.corpus, self.whole = corpus, whole
        self.split = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in corpus.counts}
        self.count_of, self.words_of = Counter[Pair](), defaultdict[Pair, set[str]](set)
        for word in self.split:
            self._add_pairs(word)
        self.queue = [(-count, pair) for pair, count in self.count_of.items()]
        heapq.heapify(self.queue)

    def train(self, most: int) -> list[str]:
        """At most ``most`` pieces that may be entries and occur twice, in the order of their merges."""
        made: dict[str, None] = {}
        while self.queue and len(made) < most:
            negative, pair = heapq.heappop(self.queue)
            if -negative != self.count_of[pair]:
                continue  # the count has changed since, and is in the queue again
            if -negative < 2:
                break
            piece = pair[0] + pair[1].removeprefix("##")
            if self.corpus.may_be_entry(piece, self.words_of[pair]):
                self._merge(pair, piece)
                if piece not in self.whole:
                    made[piece] = None
        return list(made)

    def _merge(self, pair: Pair, piece: str) -> None:
        changed: set[Pair] = set()
        for word in list(self.words_of[pair]):
            changed |= self._remove_pairs(word)
            self.split[word] = merged(self.split[word], pair, piece)
            changed |= self._add_pairs(word)
        for each in changed:
            heapq.heappush(self.queue, (-self.count_of[each], each))

    def _add_pairs(self, word: str) -> set[Pair]:
        pairs = list(pairwise(self.split[word]))
        for pair in pairs:
            self.count_of[pair] += self._weight(word)
            self.words_of[pair].add(word)
        return set(pairs)

    def _remove_pairs(self, word: str) -> set[Pair]:
        pairs = list(pairwise(self.split[word]))
        for pair in pairs:
            self.count_of[pair] -= self._weight(word)
            self.words_of[pair].discard(word)
        return set(pairs)

    def _weight(self, word: str) -> int:
        return 0 if word in self.whole else self.corpus.counts[word]


def merged(pieces: list[str], pair: Pair, piece: str) -> list[str]:
    """``pieces`` with ``piece`` for each occurrence of ``pair``, from the left."""
    found: list[str] = []
    for each in pieces:
        if found and (found[-1], each) == pair:
            found[-1] = piece
        else:
            found.append(each)
    return found
