"""The same calls on a local folder and on the real S3 server."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from cmcgns import storage
from cmcgns.data.readers import open_source
from cmcgns.errors import UserError
from cmcgns.storage import s3
from tests.s3 import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture(autouse=True)
def fresh_clients() -> None:
    for cache in (s3._arrow_filesystem, s3._client, s3._profile_value):
        cache.cache_clear()


def test_written_files_are_listed_and_read(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket("written")
    storage.write_bytes(f"{bucket}/a/b.bin", b"one")
    storage.write_bytes(f"{bucket}/a/c d/é.bin", b"two")
    assert storage.list_files(bucket) == ["a/b.bin", "a/c d/é.bin"]
    assert storage.list_files(f"{bucket}/a", recursive=False) == ["b.bin"]
    assert storage.list_folders(f"{bucket}/a") == ["c d"]
    assert storage.read_bytes(f"{bucket}/a/c d/é.bin") == b"two"
    assert storage.exists(f"{bucket}/a/b.bin")
    assert not storage.exists(f"{bucket}/nothing")


def test_a_file_is_one_get(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket("counted")
    storage.write_bytes(f"{bucket}/films/1.bin", b"1" * 300_000)
    for _ in range(3):
        storage.read_bytes(f"{bucket}/films/1.bin")
    storage.list_files(bucket)
    assert s3_server.gets("counted") == 3
    assert s3_server.gets("counted/films/1.bin") == 3
    assert s3_server.gets("counted/other") == 0


def test_folders_travel_in_pieces_there_within_s3_and_back(s3_server: S3Server, tmp_path: Path) -> None:
    bucket, content = s3_server.make_bucket("pieces"), bytes(range(256)) * 80_000  # 20 MB: several parts
    (tmp_path / "there" / "in").mkdir(parents=True)
    (tmp_path / "there" / "in" / "big").write_bytes(content)
    (tmp_path / "there" / "empty").touch()
    storage.upload_folder(tmp_path / "there", f"{bucket}/there")
    storage.copy_folder(f"{bucket}/there", f"{bucket}/copy")
    assert storage.list_files(f"{bucket}/copy") == ["empty", "in/big"]
    with storage.local_copy(f"{bucket}/copy/in/big") as path:
        assert path.read_bytes() == content
    assert not path.exists()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://no-such-bucket/films", "bucket does not exist"),
        ("s3://", "names no bucket"),
    ],
)
def test_a_wrong_bucket_is_named(s3_server: S3Server, uri: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        storage.list_files(uri)
    assert uri in str(error.value)


def test_a_missing_file_is_distinguished_from_a_missing_bucket(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket("sparse")
    with pytest.raises(storage.MissingFileError):
        storage.read_bytes(f"{bucket}/nothing.png")
    with pytest.raises(UserError, match="bucket does not exist"):
        storage.write_bytes("s3://no-such-bucket/x", b"1")


def test_wrong_keys_raise(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_server.make_bucket("guarded")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY"):
        storage.list_files(bucket)


def test_missing_keys_raise(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3_server.make_bucket("keyless")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="credentials"):
        storage.list_files(bucket)


def test_an_unreachable_endpoint_raises(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        storage.list_files("s3://anything")


def test_the_endpoint_of_a_profile_is_used(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.make_bucket("profiled")
    config = tmp_path / "config"
    config.write_text(
        f"[profile hospital]\nendpoint_url = {s3_server.endpoint}\nregion = us-east-1\n"
        f"aws_access_key_id = {s3_server.environment['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {s3_server.environment['AWS_SECRET_ACCESS_KEY']}\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "hospital")
    storage.write_bytes(f"{bucket}/x", b"1")
    assert storage.list_files(bucket) == ["x"]


def test_real_pairs_are_equal_from_s3_and_from_disk(s3_server: S3Server, realdata: Path, tmp_path: Path) -> None:
    bucket = s3_server.make_bucket("realpairs")
    s3_server.upload(realdata / "images", f"{bucket}/corpus/images")
    storage.write_bytes(f"{bucket}/corpus/pairs.csv", (realdata / "pairs.csv").read_bytes())
    here, there = open_source(str(realdata)), pickle.loads(pickle.dumps(open_source(f"{bucket}/corpus")))
    assert there.format == "pairs-csv"
    assert there.index().table.equals(here.index().table)
    for study in there.index().table.slice(0, 12).to_pylist():
        path = study["films"][0]["path"]
        assert np.array_equal(there.read_image(path).grey_HW, here.read_image(path).grey_HW)
    assert s3_server.gets("realpairs/corpus/images") == 12
