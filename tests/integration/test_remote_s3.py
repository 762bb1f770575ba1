"""An S3-compatible server: rows, media, patterns and folders in a bucket, credentials of the environment, and a run that is trained from it
in two parts."""

import logging

import pytest

from eagle_sampling import MediaError, MediaUnavailable
from eagle_train.config import ConfigError, RemoteConfig, dump_config
from eagle_train.data import remote
from tests.support.runs import colour_sources, colour_sources_run, outcome, train_in_parts

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

KEY, SECRET = "AKIAEAGLESTESTKEY", "s3cret-of-the-environment/never-written"


@pytest.fixture(scope="module")
def endpoint():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="eagle-test")
    yield client
    remote.enable(RemoteConfig())
    for one in client.list_objects_v2(Bucket="eagle-test").get("Contents", ()):
        client.delete_object(Bucket="eagle-test", Key=one["Key"])


def put(client, key, content):
    client.put_object(Bucket="eagle-test", Key=key, Body=content)


def test_names_ranges_and_failures(bucket, tmp_path, monkeypatch):
    content = bytes(range(256)) * 1000
    for key in ("data/a.bin", "data/shards/1.tar", "data/shards/0.tar", "data/shards/readme.txt"):
        put(bucket, key, content)
    settings = RemoteConfig(schemes=["s3"], cache=tmp_path / "cache", retries=0)
    remote.enable(settings)
    address = "s3://eagle-test/data/a.bin"
    file = remote.open_address(address)
    assert (file.size, file.read(70_000, 300)) == (256_000, content[70_000:70_300])
    shards = ["s3://eagle-test/data/shards/0.tar", "s3://eagle-test/data/shards/1.tar"]
    for pattern in ("s3://eagle-test/data/shards", "s3://eagle-test/data/shards/", "s3://eagle-test/data/sh*/?.tar"):
        assert remote.names_of(pattern) == shards
    for missing in ("s3://eagle-test/data/none.bin", "s3://no-bucket-of-this-name/a.bin"):
        with pytest.raises(MediaError, match="is not there"):
            remote.open_address(missing)
    with pytest.raises(ConfigError, match="matches no file"):
        remote.names_of("s3://eagle-test/none/*.tar")
    put(bucket, "data/a.bin", content[::-1])
    with pytest.raises(MediaError, match="changed while it was being read"):
        file.read(200_000, 10)
    assert remote.open_address(address).read(0, 5) == content[::-1][:5]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    remote.enable(settings.replaced(retries=1))
    with pytest.raises(MediaUnavailable, match="no credentials are found in the environment's standard places"):
        remote.open_address(address)
    remote.enable(settings.replaced(anonymous=True))
    with pytest.raises(MediaError, match=r"access is denied \(403\)"):
        remote.open_address(address)


def test_a_run_from_a_bucket_is_that_from_files_and_writes_no_credentials(bucket, tmp_path, caplog):
    colour_sources(tmp_path)
    local = colour_sources_run(tmp_path, "local", "rows.jsonl", "held_out.jsonl")
    for file in (*tmp_path.glob("*.png"), tmp_path / "clip.mp4", tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"):
        put(bucket, f"data/{file.name}", file.read_bytes())
    settings = {"schemes": ["s3"], "cache": str(tmp_path / "cache")}
    rows, held_out = (f"s3://eagle-test/data/{name}.jsonl" for name in ("rows", "held_out"))
    away = colour_sources_run(tmp_path, "away", rows, held_out, remote=settings)
    expected = outcome(local, train_in_parts(local, stop_at=None))
    assert outcome(away, train_in_parts(away, stop_at=2)) == expected
    assert "s3://eagle-test/data/gone.png: is not there" in (away.run.folder / "ledger.jsonl").read_text()

    # Credentials are in no file of the run, of the facts or of the cache, and in no message.
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("cache" in file.parts for file in written)
    assert not [file for file in written if KEY.encode() in file.read_bytes() or SECRET.encode() in file.read_bytes()]
    assert SECRET not in caplog.text + dump_config(away)
    assert KEY not in caplog.text + dump_config(away)
