"""Names and record numbers of single patients must not leave with an export or a pseudonymised set."""

from pathlib import Path

import pytest

from cmcgns.data.manifest import read_manifest
from cmcgns.data.prepare.check import read_shard
from cmcgns.data.prepare.shard import Pseudonyms
from cmcgns.data.tokenizer import train_tokenizer
from cmcgns.errors import UserError
from cmcgns.train.setup import make_tokenizer, open_corpus, sample_reports
from tests.security.sets import plain_rows, write_prepared_set
from tests.small import small_config


def vocabulary(sentences: list[tuple[str, str]], patients: int) -> set[str]:
    return set(train_tokenizer(sentences, 10_000, 64, 8, patients).pieces.get_vocab())


def test_words_of_few_patients_and_numbers_are_no_entries_of_the_vocabulary() -> None:
    common = [(f"patient {i}", "the lungs are clear of t12 and 1234567") for i in range(30)]
    named = [(f"patient {i // 5}", "smith was here") for i in range(45)]  # 45 reports of nine patients
    found = vocabulary([*common, *named], 10)
    assert {"the", "lungs", "are", "clear"} <= found
    assert not {"smith", "was", "here", "t12", "1234567"} & found
    assert "smith" in vocabulary([*common, *named, ("patient 9", "smith")], 10)
    assert {"smith", "1234567"} <= vocabulary([*common, *named], 1)


def test_a_text_of_left_out_words_is_still_read_letter_by_letter() -> None:
    tokenizer = train_tokenizer([("one", "smith"), ("two", "lungs clear")] * 5, 1000, 64, 8, 10)
    assert tokenizer.pieces.encode("smith").tokens[1:-1] == ["s", "##m", "##i", "##t", "##h"]


def test_a_corpus_of_files_is_held_to_the_setting_and_a_generated_one_is_not(tmp_path: Path) -> None:
    write_prepared_set(tmp_path / "set", plain_rows())
    config = small_config(data__phantom_studies=60)
    sample = sample_reports(open_corpus(config), 1000)
    assert len(sample.patients) == len(sample.reports)
    generated = make_tokenizer(config, sample)
    files = make_tokenizer(
        config.model_copy(update={"data": config.data.model_copy(update={"uri": str(tmp_path)})}), sample
    )
    assert files.vocabulary_size < generated.vocabulary_size
    words = [word for word in files.pieces.get_vocab() if len(word) > 1 and not word.startswith(("##", "["))]
    assert words
    holders = {
        word: {
            who
            for who, report in zip(sample.patients, sample.reports, strict=True)
            if word in " ".join(report.sentences).split()
        }
        for word in words
    }
    assert min(map(len, holders.values())) >= config.model.vocabulary_patients == 10


@pytest.mark.parametrize(
    ("key", "mode", "said"),
    [
        (b"0123456789abcdef", 0o644, "can be read by other users"),
        (b"0123456789abcdef", 0o640, "chmod 600"),
        (b"aaaaaaaaaaaaaaaaaaaaaaaa", 0o600, "only 1 different bytes and can be guessed"),
        (b"0123456789", 0o600, "has 10 bytes"),
    ],
)
def test_a_weak_key_file_is_refused(tmp_path: Path, key: bytes, mode: int, said: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(key)
    path.chmod(mode)
    with pytest.raises(UserError, match=said):
        Pseudonyms.from_file(str(path))


def test_the_check_names_rows_whose_reports_have_identifiers_but_not_the_identifiers(tmp_path: Path) -> None:
    rows = plain_rows()
    reports = ["Lungs are clear.", "Discussed with Dr. Smith on 3/14/2024.", "MRN 12345678."]
    named = rows.set_column(rows.schema.get_field_index("report"), "report", [reports])
    write_prepared_set(tmp_path / "set", named)
    uri = str(tmp_path / "set")
    _, findings = read_shard(uri, read_manifest(uri).shards[0])
    found = [(each.ids, each.what) for each in findings if each.kind == "identifier in report"]
    assert found == [
        (["study_id 1", "image_id 1"], "has date and name"),
        (["study_id 2", "image_id 2"], "has number"),
    ]
