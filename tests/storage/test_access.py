"""Ways to an S3 server that hospitals have: a proxy, and a role that an AWS profile takes on. boto3 and Arrow both take them."""

import secrets
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cmcgns import storage
from cmcgns.errors import UserError
from cmcgns.storage import s3
from tests.faulty_proxy import running_proxy
from tests.s3 import S3Server

pytestmark = pytest.mark.s3
INTERNAL = "http://s3.hospital.invalid:9000"
"""An endpoint that only the proxy can resolve."""


@pytest.fixture(autouse=True)
def fresh_sessions() -> Iterator[None]:
    """Sessions are cached by what the environment says, not by the content of AWS's files."""
    yield
    for cached in (s3._cached_session, s3._boto3_session, s3._client, s3._profile_value, s3._arrow_filesystem):
        cached.cache_clear()


def check_both_libraries(uri: str) -> None:
    """What boto3 writes and lists, Arrow reads; and the other way round."""
    storage.write_bytes(f"{uri}/film", b"by boto3")
    assert storage.read_bytes(f"{uri}/film") == b"by boto3"
    files, path = storage.lasting_filesystem(uri)
    with files.open_output_stream(f"{path}/checkpoint") as file:
        file.write(b"by Arrow")
    assert storage.list_files(uri) == ["checkpoint", "film"]
    assert storage.read_bytes(f"{uri}/checkpoint") == b"by Arrow"


def test_a_proxy_of_the_environment_is_used_by_both(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3_server.make_bucket("behind-a-proxy")
    with running_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", INTERNAL)
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        check_both_libraries(uri)
        assert proxy.counts["passed"] >= 5
        used = proxy.counts.total()
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
        assert storage.read_bytes(f"{uri}/film") == b"by boto3"
        assert proxy.counts.total() == used


class RoleServer(BaseHTTPRequestHandler):
    """AWS's service for roles: it gives the S3 server's own keys, which are valid for ``seconds``."""

    server: "Roles"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls += 1
        end = datetime.now(UTC) + timedelta(seconds=self.server.seconds)
        body = (
            "<AssumeRoleResponse xmlns='https://sts.amazonaws.com/doc/2011-06-15/'><AssumeRoleResult><Credentials>"
            f"<AccessKeyId>{self.server.key}</AccessKeyId><SecretAccessKey>{self.server.secret}</SecretAccessKey>"
            f"<SessionToken></SessionToken><Expiration>{end.isoformat()}</Expiration></Credentials></AssumeRoleResult>"
            "</AssumeRoleResponse>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Roles(ThreadingHTTPServer):
    calls, seconds, key, secret, bucket = 0, 3600.0, "", "", ""


@pytest.fixture
def roles(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Roles]:
    """The service, and AWS's files with a role that the profile `films` takes on; no keys in the environment."""
    bucket = s3_server.make_bucket(f"by-role-{secrets.token_hex(2)}")
    (tmp_path / "config").write_text(
        "[profile films]\nrole_arn = arn:aws:iam::123456789012:role/films\nsource_profile = person\nregion = us-east-1\n"
    )
    (tmp_path / "credentials").write_text("[person]\naws_access_key_id = nobody\naws_secret_access_key = knows\n")
    for name in s3.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "films")
    with Roles(("127.0.0.1", 0), RoleServer) as service:
        service.bucket = bucket
        service.key = s3_server.environment["AWS_ACCESS_KEY_ID"]
        service.secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"]
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{service.server_port}")
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield service
        service.shutdown()


def test_a_role_of_a_profile_is_taken_on_once_for_both(roles: Roles) -> None:
    check_both_libraries(roles.bucket)
    assert roles.calls == 1


def test_a_role_that_expires_is_renewed_also_for_a_file_system_that_is_kept(roles: Roles) -> None:
    roles.seconds = 60.0  # botocore renews what ends within ten minutes
    files, path = storage.lasting_filesystem(roles.bucket)
    before = roles.calls
    with files.open_output_stream(f"{path}/checkpoint") as file:
        file.write(b"later")
    assert roles.calls > before
    assert storage.read_bytes(f"{roles.bucket}/checkpoint") == b"later"


def test_a_profile_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(UserError, match="AWS profile no-such-profile"):
        storage.read_bytes("s3://bucket/film")
