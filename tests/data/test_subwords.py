"""A vocabulary with pieces of words: what they are, who has them, and that every process trains the same one."""

import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from cmcgns.data.batch import Batcher
from cmcgns.data.record import Block
from cmcgns.data.tokenizer import SPECIAL_TOKENS, CountedWords, PieceTrainer, merged, train_tokenizer
from cmcgns.errors import UserError
from cmcgns.methods.base import load_method
from cmcgns.train.setup import ReportSample, make_tokenizer
from tests.small import small_config

STEMS = ("cardio", "pneumo", "thorac", "hepat", "atelect", "effus", "consolid", "granulom")
ENDINGS = ("megaly", "thorax", "ion", "ation", "asis", "atous", "ing", "ed")
Sentences = list[tuple[str, str]]


def reports() -> Sentences:
    """Each compound is rare, its parts are common; names and numbers belong to single patients."""
    draw = random.Random(0)
    found = []
    for patient in range(60):
        for _ in range(4):
            compound = draw.choice(STEMS) + draw.choice(ENDINGS)
            found.append((f"patient {patient}", f"the {compound} is seen"))
        found.append((f"patient {patient}", f"t{patient} level"))
    found += [("patient 0", "quixwozzle quixwozzles")] * 20
    return found


def entries(sentences: Sentences, size: int, patients: int, subwords: bool = True) -> list[str]:
    vocabulary = train_tokenizer(sentences, size, 64, 8, patients, subwords).pieces.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    return sorted(vocabulary, key=vocabulary.__getitem__)


def pieces_of(found: list[str]) -> list[str]:
    return [each for each in found if len(each.removeprefix("##")) > 1 and each not in SPECIAL_TOKENS.values()]


def test_without_subwords_the_vocabulary_is_letters_and_words() -> None:
    plain = entries(reports(), 10_000, 10, subwords=False)
    with_pieces = entries(reports(), 10_000, 10)
    assert not any(each.startswith("##") for each in pieces_of(plain))
    assert set(plain) < set(with_pieces)
    assert with_pieces[: len(plain)] == plain  # with room enough words keep their place


def test_the_pieces_that_continue_a_word_are_known_and_reach_the_batch() -> None:
    tokenizer = train_tokenizer(reports(), 10_000, 64, 8, 20, subwords=True)
    encoded = tokenizer.encode(["the cardiomegaly is seen", "effusation is seen"])
    spelled = [tokenizer.pieces.id_to_token(token) for token in encoded.tokens_T]
    expected = [each.startswith("##") for each in spelled]
    assert sum(expected) >= 2
    assert tokenizer.continues_V[encoded.tokens_T].tolist() == expected
    config = small_config()
    block = Block(
        positions=np.arange(1), draw_keys=np.zeros(1, np.int64), images_BRR=np.zeros((1, 40, 40), np.uint8),
        tokens=[encoded.tokens_T], sentence_of_token=[encoded.sentence_of_token_T],
        sentence_hashes=[np.arange(2)], report_hashes=np.zeros(1, np.int64),
    )  # fmt: skip
    for name, whole_words in (("gloria", True), ("mgca", True), ("gloria", False), ("cm-cgns", None)):
        more = {} if whole_words is None else {"method__name": name, "objective__whole_words": whole_words}
        words = load_method(small_config(**more)).continuations(tokenizer)
        batch = Batcher(config, tokenizer.pad_id, torch.device("cpu"), continues_V=words)(block, (2,), training=False)
        if whole_words:
            assert batch.continues_BT is not None
            assert batch.continues_BT[0, : len(expected)].tolist() == expected
        else:
            assert batch.continues_BT is None


def test_rare_words_are_read_in_pieces_that_many_patients_have() -> None:
    tokenizer = train_tokenizer(reports(), 10_000, 64, 8, 20, subwords=True).pieces
    for stem in STEMS:
        for ending in ENDINGS:
            tokens = tokenizer.encode(stem + ending, add_special_tokens=False).tokens
            assert len(tokens) <= 5, tokens
            assert "".join(token.removeprefix("##") for token in tokens) == stem + ending


@pytest.mark.parametrize("patients", [2, 10, 30])
def test_every_piece_occurs_in_words_of_so_many_patients_and_has_no_digit(patients: int) -> None:
    found = pieces_of(entries(reports(), 10_000, patients))
    assert any(each.startswith("##") for each in found)
    for piece in found:
        letters = piece.removeprefix("##")
        holders = {
            patient
            for patient, sentence in reports()
            for word in sentence.split()
            if (letters in word[1:] if piece.startswith("##") else word.startswith(letters))
        }
        assert len(holders) >= patients, piece
        assert not any(map(str.isdigit, piece))


def test_a_name_of_one_patient_leaves_no_piece_of_its_own() -> None:
    found = " ".join(pieces_of(entries(reports(), 10_000, 10)))
    for part in ("qu", "ix", "wo", "oz", "zz", "zl"):
        assert part not in found
    assert "quixwozzle" in entries(reports(), 10_000, 1)


def test_merges_match_a_slow_byte_pair_encoding() -> None:
    """Counts everything anew at each merge; no word has an entry, no rule for patients."""
    corpus = CountedWords(1)
    for patient, sentence in reports():
        for word in sentence.split():
            corpus.add(word, patient)
    split = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in corpus.counts}
    expected: list[str] = []
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                counts[pair] += corpus.counts[word]
        best = min(counts, key=lambda each: (-counts[each], each))
        if counts[best] < 2:
            break
        expected.append(best[0] + best[1][2:])
        split = {word: merged(parts, best, expected[-1]) for word, parts in split.items()}
    assert len(expected) > 100
    assert PieceTrainer(corpus, set()).train(1000) == list(dict.fromkeys(expected))


def test_words_with_an_entry_take_no_room_with_their_pieces() -> None:
    sentences = [(f"patient {i}", "cardiomegaly") for i in range(50)] + [(f"patient {i}", "cardiac") for i in range(3)]
    corpus = CountedWords(10)
    for patient, word in sentences:
        corpus.add(word, patient)
    assert corpus.frequent_words() == ["cardiomegaly"]
    # counted in `cardiac` alone, which three patients have; `cardi` is in words of fifty
    assert PieceTrainer(corpus, {"cardiomegaly"}).train(100) == ["##ar", "##ard", "##ardi", "cardi"]


def test_a_small_vocabulary_keeps_a_quarter_for_pieces_and_never_exceeds_its_size() -> None:
    letters = len(entries(reports(), 0, 5))
    assert letters == len(entries(reports(), 0, 5, subwords=False))
    for size in (letters, letters + 1, letters + 8, letters + 40, letters + 400):
        found = entries(reports(), size, 5)
        assert len(found) <= size
        assert len(found) == len(set(found))
    found = pieces_of(entries(reports(), letters + 40, 5))
    words = {word for _, sentence in reports() for word in sentence.split()}
    assert len([each for each in found if each not in words]) >= 8


def test_pieces_never_overlap() -> None:
    assert merged(["a", "##a", "##a", "##a"], ("##a", "##a"), "##aa") == ["a", "##aa", "##a"]
    assert merged(["a", "##b"], ("a", "##b"), "ab") == ["ab"]
    assert merged(["x"], ("a", "##b"), "ab") == ["x"]


def test_every_process_and_every_order_of_reports_gives_the_same_vocabulary() -> None:
    code = "from tests.data.test_subwords import entries, reports; print(entries(reports(), 300, 5))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert printed == {f"{entries(reports(), 300, 5)}\n"}
    shuffled = reports()
    random.Random(1).shuffle(shuffled)
    assert entries(shuffled, 300, 5) == entries(reports(), 300, 5)


def test_subwords_need_a_vocabulary_that_is_trained_on_the_corpus() -> None:
    config = small_config(model__subwords=True, model__text_encoder="someone/bert")
    with pytest.raises(
        UserError, match=r"model.subwords needs a vocabulary that is trained .* someone/bert .*bert-tiny"
    ):
        make_tokenizer(config, ReportSample([], [], 0))
