"""Faulty object storage: transient errors are retried, permanent ones raise once, with the reason."""

import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cmcgns import storage
from cmcgns.data.readers import open_source
from cmcgns.errors import BadRow, UserError
from cmcgns.storage import errors as faults
from cmcgns.storage import parquet, s3
from tests.faulty_proxy import DENIED, EXPIRED, NO_BUCKET, NO_KEY, Faults, FaultyProxy, running_proxy
from tests.s3 import S3Server

pytestmark = pytest.mark.s3
LARGE = os.urandom(3_000_000)


@pytest.fixture(autouse=True)
def fresh_clients() -> None:
    for cache in (s3._arrow_filesystem, s3._client, s3._profile_value):
        cache.cache_clear()


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with running_proxy(s3_server.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        monkeypatch.setenv(faults.RETRY_LIMIT_VARIABLE, "30")
        yield running


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    uri = s3_server.make_bucket("misbehaving")
    storage.write_bytes(f"{uri}/films/large.bin", LARGE)
    for number in range(12):
        storage.write_bytes(f"{uri}/films/{number}.bin", bytes([number]) * 1000)
    return uri


def test_errors_and_cut_connections_are_retried_and_counted(bucket: str, proxy: FaultyProxy) -> None:
    proxy.faults = Faults(errors=0.25, cuts=0.1)
    before = storage.retries()
    for _ in range(2):
        assert storage.read_bytes(f"{bucket}/films/large.bin") == LARGE
        for number in range(12):
            assert storage.read_bytes(f"{bucket}/films/{number}.bin") == bytes([number]) * 1000
    assert len(storage.list_files(bucket)) == 13
    assert proxy.counts["error"] > 5
    assert proxy.counts["cut"] > 0
    assert storage.retries() - before == proxy.counts["error"] + proxy.counts["cut"]


def test_retried_deletions_succeed(bucket: str, proxy: FaultyProxy) -> None:
    proxy.faults = Faults(errors=0.4)
    for number in range(10):
        place = f"{bucket}/passing/{number}"
        storage.write_bytes(place, b"1")
        storage.delete_file(place)
        storage.delete_file(place)
    proxy.faults = Faults()
    assert not storage.exists(f"{bucket}/passing")


def test_uploads_in_parts_survive_errors_and_leave_nothing_behind(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(23_000_000)
    (tmp_path / "shard").write_bytes(data)
    proxy.faults = Faults(errors=0.3)
    storage.put_file(tmp_path / "shard", f"{bucket}/shards/one")
    proxy.faults = Faults()
    assert storage.read_bytes(f"{bucket}/shards/one") == data
    assert storage.clear_leftovers(f"{bucket}/shards") == 0
    assert proxy.counts["error"] > 0


def test_leftovers_of_killed_uploads_are_cleared(bucket: str, s3_server: S3Server) -> None:
    client = s3_server.client()
    for number in range(3):
        client.create_multipart_upload(Bucket="misbehaving", Key=f"killed/{number}")
    others = ["killed/by/1", "others/1"]
    for key in others:
        client.create_multipart_upload(Bucket="misbehaving", Key=key)
    assert storage.clear_leftovers(f"{bucket}/killed") == 3
    assert storage.clear_leftovers(bucket) == 0
    assert [each["Key"] for each in client.list_multipart_uploads(Bucket="misbehaving")["Uploads"]] == others
    assert storage.clear_leftovers(f"{bucket}/others") == storage.clear_leftovers(f"{bucket}/killed/by") == 1


def test_a_conditional_write_keeps_an_existing_file(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.write_bytes(f"{bucket}/once", b"first", if_absent=True)
    assert not storage.write_bytes(f"{bucket}/once", b"second", if_absent=True)
    assert storage.read_bytes(f"{bucket}/once") == b"first"
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(os.urandom(6_000_000))
    assert not storage.put_file(tmp_path / "large", f"{bucket}/once", if_absent=True)
    assert storage.read_bytes(f"{bucket}/once") == b"first"
    assert storage.clear_leftovers(bucket) == 0


def test_an_upload_in_parts_is_completed_conditionally(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the request, because Ceph ignores the condition when it completes an upload."""
    conditions = []
    s3.client(if_absent=True).meta.events.register(
        "before-send.s3.CompleteMultipartUpload",
        lambda request, **_: conditions.append(request.headers["If-None-Match"]),
    )
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    (tmp_path / "large").write_bytes(os.urandom(6_000_000))
    assert storage.put_file(tmp_path / "large", f"{bucket}/new", if_absent=True)
    assert conditions == [b"*"]


def test_a_failed_upload_in_parts_leaves_nothing_behind(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    (tmp_path / "shard").write_bytes(os.urandom(23_000_000))
    proxy.faults = Faults(refusal=DENIED, only="partNumber=3")
    with pytest.raises(storage.ForbiddenFileError, match="access is denied"):
        storage.put_file(tmp_path / "shard", f"{bucket}/shards/two")
    proxy.faults = Faults()
    assert not storage.exists(f"{bucket}/shards/two")
    assert storage.clear_leftovers(f"{bucket}/shards") == 0


def test_listings_have_all_pages(s3_server: S3Server, proxy: FaultyProxy) -> None:
    bucket = s3_server.make_bucket("manyfiles")
    client = s3_server.client()
    for number in range(1003):
        client.put_object(Bucket="manyfiles", Key=f"a/{number:04d}", Body=b"")
    proxy.faults = Faults(errors=0.3)
    assert storage.list_files(f"{bucket}/a") == [f"{number:04d}" for number in range(1003)]


def test_requests_without_an_answer_are_retried(
    bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "STALLED_SECONDS", 1.0)
    proxy.faults = Faults(silence=0.3)
    for number in range(4):
        assert storage.read_bytes(f"{bucket}/films/{number}.bin") == bytes([number]) * 1000
    assert proxy.counts["silence"] > 0


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (EXPIRED, "credentials have expired; renew them"),
        (NO_BUCKET, "bucket does not exist"),
        ((403, "InvalidAccessKeyId", "who are you"), "does not know the access key"),
        ((403, "SignatureDoesNotMatch", "no"), "secret key is wrong"),
        ((403, "RequestTimeTooSkewed", "no"), "clock is wrong"),
    ],
)
def test_permanent_errors_raise_at_once_with_the_reason(
    bucket: str, proxy: FaultyProxy, refusal: tuple[int, str, str], says: str
) -> None:
    """Also if the answer to HEAD, which Arrow sends first, has no reason: a reader must not report a bad row."""
    source = open_source(bucket, format="pairs-csv")
    proxy.faults = Faults(refusal=refusal)
    began = time.monotonic()
    for request in (
        lambda: storage.read_bytes(f"{bucket}/films/1.bin"),
        lambda: source.read_image("films/1.bin"),
        lambda: storage.list_files(bucket),
        lambda: storage.write_bytes(f"{bucket}/x", b"1"),
    ):
        with pytest.raises(UserError, match=says):
            request()
    if refusal != NO_BUCKET:  # a HEAD request gets 404, so the file does not exist
        with pytest.raises(UserError, match=says):
            storage.exists(f"{bucket}/films/1.bin")
    assert time.monotonic() - began < 5


def test_one_missing_or_forbidden_object_is_a_bad_row(bucket: str, proxy: FaultyProxy) -> None:
    source = open_source(bucket, format="pairs-csv")
    with pytest.raises(BadRow, match="film file is missing"):
        source.read_image("films/nothing.png")
    proxy.faults = Faults(errors=0.4)
    for number in range(10):
        with pytest.raises(BadRow, match="film file is missing"):
            source.read_image(f"films/nothing{number}.png")
    assert proxy.counts["error"] > 0
    proxy.faults = Faults(refusal=NO_KEY, only="^GET .*/2[.]bin")  # deleted after Arrow's HEAD request
    with pytest.raises(BadRow, match="film file is missing"):
        source.read_image("films/2.bin")
    proxy.faults = Faults(refusal=DENIED, only="1[.]bin")
    with pytest.raises(BadRow, match="access to the film file is denied"):
        source.read_image("films/1.bin")


AWAY = {"silent": Faults(silence=1.0), "refusing": Faults(errors=1.0)}


@pytest.mark.parametrize("kind", AWAY)
def test_what_is_read_and_written_while_storage_is_away_for_a_while_is_whole_afterwards(
    kind: str, bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"STALLED_SECONDS": 2.0, "PART_BYTES": 5 * 2**20}.items():
        monkeypatch.setattr(s3, name, value)
    files = {"metrics.jsonl": b'{"step": 1}\n', "checkpoint/weights": os.urandom(12_000_000), "checkpoint/empty": b""}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    storage.read_bytes(f"{bucket}/films/1.bin")
    proxy.faults = AWAY[kind]
    back = threading.Timer(8.0, lambda: setattr(proxy, "faults", Faults()))
    back.start()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(storage.read_bytes(f"{bucket}/films/large.bin")))
    reader.start()
    # as Ray Train's controller gets it
    kept, path = pickle.loads(pickle.dumps(storage.lasting_filesystem(f"{bucket}/{kind}")))

    def write() -> None:
        with kept.open_output_stream(f"{path}/snapshot") as file:
            file.write(b"of the controller")

    writer = threading.Thread(target=write)
    writer.start()
    storage.upload_folder(tmp_path, f"{bucket}/{kind}")
    reader.join()
    writer.join()
    files["snapshot"] = b"of the controller"
    assert back.finished.is_set()
    assert {name: storage.read_bytes(f"{bucket}/{kind}/{name}") for name in files} == files
    assert sorted(storage.list_files(f"{bucket}/{kind}")) == sorted(files)
    assert read == [LARGE]
    assert storage.clear_leftovers(f"{bucket}/{kind}") == 0


def test_retries_stop_after_the_time_limit(bucket: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.RETRY_LIMIT_VARIABLE, "2")
    proxy.faults = Faults(errors=1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="keeps failing"):
        storage.read_bytes(f"{bucket}/films/1.bin")
    assert 1 < time.monotonic() - began < 12


def test_retries_stop_sooner_before_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.RETRY_LIMIT_VARIABLE, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert faults.retry_limit_s() == faults.FIRST_RETRY_LIMIT_S


def test_a_truncated_shard_is_distinguished_from_a_cut_connection(
    bucket: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    table = pa.table({"a": [os.urandom(50) for _ in range(5000)]})
    pq.write_table(table, tmp_path / "whole.parquet", row_group_size=500)
    data = (tmp_path / "whole.parquet").read_bytes()
    storage.write_bytes(f"{bucket}/whole.parquet", data)
    storage.write_bytes(f"{bucket}/short.parquet", data[: len(data) // 2])
    proxy.faults = Faults(cuts=0.2)
    read = pq.ParquetFile.read
    assert parquet.read(f"{bucket}/whole.parquet", read).equals(table)
    with pytest.raises(storage.BrokenFileError, match="truncated"):
        parquet.read(f"{bucket}/short.parquet", read)
    footer = parquet.read(f"{bucket}/whole.parquet", lambda file: file.metadata)
    with pytest.raises(storage.BrokenFileError, match="truncated"):
        parquet.read(f"{bucket}/short.parquet", lambda file: file.read_row_group(9), footer=footer)
