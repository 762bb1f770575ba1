"""Remote files over HTTP: what is transferred, what is kept, what fails and how, and that rows of every format are those of local files."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eagle_model.prompt import CachedEncoder
from eagle_model.visual import VisualSpec
from eagle_sampling import Limits, MediaError, MediaUnavailable, image_size, open_image, page_count, probe, read_frames
from eagle_sampling.video.probe import read_track
from eagle_train.config import ConfigError, RemoteConfig, StageConfig, parse_config
from eagle_train.data import remote
from eagle_train.data.ledger import Ledger
from eagle_train.data.prepare import load_facts, prepare
from eagle_train.data.remote import storage
from eagle_train.data.remote.cache import BLOCK
from eagle_train.data.sample import RowError, load_sample, normalise
from eagle_train.evaluation.text_only import training_pairs
from eagle_train.loading.loader import Loader, Reading, Task
from eagle_train.loading.pack import load_pack
from eagle_train.planning.stages import pack_tokens, plan_stage
from eagle_train.watching.show import to_html, view_sample
from tests.support import media
from tests.support.http_files import FileServer
from tests.support.models import byte_tokenizer, save_tiny_model
from tests.support.tables import tables, talk

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
SPEC = VisualSpec(tile_size=32, tokens_per_tile=4, min_frames=2)
STAGE = StageConfig(name="s", max_tokens=900, packs_per_step=1)


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    remote.enable(RemoteConfig())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.01)


@pytest.fixture
def served(tmp_path):
    (tmp_path / "served").mkdir()
    with FileServer(tmp_path / "served") as server:
        yield server


def enable(tmp_path, **changes):
    remote.enable(RemoteConfig(**{"schemes": ["http"], "cache": tmp_path / "cache", "retries": 2, "check_after": 600.0} | changes))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """20 s of noise, 4 MB: a group of pictures of 1 s each."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    frames = (media.random_pixels(number, (320, 240)) for number in range(200))
    return media.write_video(path, frames, 10, {"g": "10", "preset": "ultrafast", "qp": "38"}, {})


def test_only_headers_and_wanted_groups_of_a_video_are_transferred(tmp_path, served, film):
    shutil.copy(film, served.folder / "film.mp4")
    size, address = film.stat().st_size, f"{served.address}/film.mp4"
    assert size > 40 * BLOCK
    enable(tmp_path)
    info, local = probe(address), probe(film)
    assert np.array_equal(info.times.times(), local.times.times())
    # The first box and the index at the end of the file, in whole blocks.
    assert served.sent["/film.mp4"] <= 4 * BLOCK
    served.forget()
    track = read_track(str(film))
    times = [7.25, 7.85, 15.05]
    found = read_frames(address, times, 64)
    assert np.array_equal(found.pixels, read_frames(film, times, 64).pixels)
    groups = [(70, 79), (150, 151)]  # samples that are decoded
    wanted = sum(int(track.offsets[last] + track.sizes[last] - track.offsets[first]) for first, last in groups)
    assert wanted < size / 10
    assert served.sent["/film.mp4"] <= wanted + 2 * len(groups) * BLOCK
    assert len(served.requests) <= 2 * len(groups)
    served.forget()
    read_frames(address, times, 64)
    enable(tmp_path, retries=3)  # another process, as far as what it holds goes
    read_frames(address, times, 64)
    assert not served.sent
    assert [method for method, _ in served.requests] == ["HEAD"]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi", "webm"])
def test_every_container_gives_the_frames_of_the_local_file(tmp_path, served, suffix):
    path = served.folder / f"v.{suffix}"
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(suffix, "libx264")
    options = {"g": "5"} if codec == "libx264" else {}
    media.write_video(path, (media.random_pixels(number, (64, 48)) for number in range(12)), 10, options, {}, codec=codec)
    enable(tmp_path)
    address = f"{served.address}/v.{suffix}"
    times = probe(path).times.times()
    assert np.array_equal(probe(address).times.times(), times)
    chosen = times[[1, 7, 11]]
    assert np.array_equal(read_frames(address, chosen).pixels, read_frames(path, chosen).pixels)


def test_pictures_and_documents(tmp_path, served):
    picture = media.random_image(1, (700, 500))
    for name in ("a.png", "a b%20.jpg", "a.webp", "a.bmp"):
        picture.save(served.folder / name)
    pages = [media.random_image(number, (40, 30)) for number in range(3)]
    pages[0].save(served.folder / "pages.tiff", save_all=True, append_images=pages[1:])
    enable(tmp_path)
    for name, written in (("a.png", "a.png"), ("a b%20.jpg", "a%20b%2520.jpg"), ("a.webp", "a.webp"), ("a.bmp", "a.bmp")):
        served.forget()
        address = f"{served.address}/{written}"
        assert image_size(address) == (700, 500)
        size = (served.folder / name).stat().st_size
        assert served.sent[f"/{name}"] <= min(2 * BLOCK, size)  # of a PNG also the end, where its orientation may be
        assert open_image(address).tobytes() == open_image(served.folder / name).tobytes()
    assert page_count(f"{served.address}/pages.tiff") == 3


def reason_of(address):
    with pytest.raises((MediaError, MediaUnavailable)) as caught:
        remote.open_address(address).read(0, 10)
    return type(caught.value), str(caught.value)


def test_failures_are_named_and_those_that_pass_are_tried_again(tmp_path, served):
    (served.folder / "a.bin").write_bytes(bytes(range(256)) * 1000)
    address = f"{served.address}/a.bin"
    enable(tmp_path)
    kind, said = reason_of(f"{served.address}/none.bin")
    assert (kind, "is not there (404)" in said) == (MediaError, True)
    for fault, kind, words in (
        (403, MediaError, "access is denied (403)"),
        (401, MediaError, "access is denied (401)"),
        (400, MediaError, "the server answers 400"),
        (500, storage.StorageError, "can't be reached (the server answers 500) after 3 attempts"),
        ("cut", MediaError, "is cut off, in each of 3 attempts"),
    ):
        enable(tmp_path, check_after=0.0)
        served.faults = {"/a.bin": [fault] * 20}
        found, said = reason_of(address)
        assert found is kind, said
        assert words in said
        assert said.startswith(address)
    for faults in ([503, 503, 429, 503], ["", "cut", "cut"]):
        enable(tmp_path, check_after=0.0, cache=tmp_path / f"cache{len(faults)}")
        served.faults = {"/a.bin": list(faults)}
        assert remote.open_address(address).read(300, 10) == (bytes(range(256)) * 2)[300:310]
        assert not served.faults["/a.bin"]
    served.faults = {}
    served.ranges = False
    enable(tmp_path, cache=tmp_path / "cache5")
    with pytest.raises(MediaError, match="doesn't send ranges of bytes"):
        remote.open_address(address).read(BLOCK, 10)
    with pytest.raises(MediaUnavailable, match="the connection is refused"):
        remote.open_address("http://127.0.0.1:9/a.bin")


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changes_is_another_file(tmp_path, served, etags):
    served.etags = etags
    path, address = served.folder / "a.bin", f"{served.address}/a.bin"
    path.write_bytes(b"a" * 3 * BLOCK)
    enable(tmp_path)
    first = remote.open_address(address)
    assert first.read(0, 3) == b"aaa"
    path.write_bytes(b"b" * (3 * BLOCK + (not etags)))
    if etags:
        with pytest.raises(MediaError, match="changed while it was being read"):
            first.read(2 * BLOCK, 3)
    else:
        assert remote.version_of(address, fresh=True)[0] == 3 * BLOCK + 1
    assert remote.open_address(address).read(0, 3) == b"bbb"


def test_what_is_not_enabled_is_refused(tmp_path, served):
    address = f"{served.address}/a.png"
    row = {"image": address, "messages": talk("<image>?", "a")}
    with pytest.raises(RowError, match=r"is an address; .* download it first, or add http to data\.remote\.schemes"):
        normalise(row, "s", root=tmp_path, line=1)
    with pytest.raises(MediaError, match="is an address"):
        image_size(address)
    data = {"sources": {"s": {"annotation": address}}}
    with pytest.raises(ConfigError, match=r"http:// is not read; add http to data\.remote\.schemes"):
        prepare(parse_config({"data": data}, base=tmp_path), byte_tokenizer())
    assert not served.requests
    enable(tmp_path)
    normalise(row, "s", root=tmp_path, line=1)
    for secret in (
        "http://me:hunter2@host/a.png",
        "http://host/a.png?X-Amz-Signature=hunter2",
        "http://host/a.png?x=1&access_token=hunter2",
    ):
        with pytest.raises(RowError, match="carries credentials") as caught:
            normalise({**row, "image": secret}, "s", root=tmp_path, line=1)
        with pytest.raises(ConfigError, match="carries credentials") as refused:
            parse_config({"data": {"sources": {"s": {"annotation": secret}}}})
        assert "hunter2" not in f"{caught.value}{refused.value}"
    with pytest.raises(ConfigError, match="is not a scheme that fsspec knows"):
        remote.enable(RemoteConfig(schemes=["qq"]))
    with pytest.raises(ConfigError, match="is not a scheme of remote files"):
        parse_config({"data": {"remote": {"schemes": ["S3://"]}}})
    for key in ({"lmdb_file": f"{served.address}/a.lmdb", "lmdb_key": "a"},):
        with pytest.raises(MediaError, match="mapped into memory; copy it"):
            image_size(key)


def used(folder):
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def test_the_cache_stays_within_its_limit(tmp_path, served):
    limit = 40 * BLOCK
    content = {}
    for number in range(6):
        content[number] = random.Random(number).randbytes(20 * BLOCK + number)
        (served.folder / f"{number}.bin").write_bytes(content[number])
    enable(tmp_path, cache_bytes=limit)
    for turn in range(3):
        for number in range(6):
            file = remote.open_address(f"{served.address}/{number}.bin")
            assert file.read(turn, 20 * BLOCK) == content[number][turn : turn + 20 * BLOCK]
            assert used(tmp_path / "cache") <= limit + limit // 32 + 20 * BLOCK
            file.close()
    served.forget()
    remote.open_address(f"{served.address}/5.bin").read(0, 10 * BLOCK)
    assert not served.sent, "what was used last stays"
    enable(tmp_path, cache_bytes=5 * BLOCK)  # a smaller limit, and a file larger than it
    assert remote.open_address(f"{served.address}/0.bin").read(0, 20 * BLOCK) == content[0][: 20 * BLOCK]
    assert used(tmp_path / "cache") <= 20 * BLOCK + 5 * BLOCK


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, served, caplog):
    (served.folder / "a.bin").write_bytes(b"abc")
    (tmp_path / "cache").write_bytes(b"a file in its place")
    enable(tmp_path)
    assert remote.open_address(f"{served.address}/a.bin").read(0, 3) == b"abc"
    assert remote.open_address(f"{served.address}/a.bin").read(1, 1) == b"b"
    assert caplog.text.count("can't keep what was fetched") == 1


def test_damage_in_the_cache_is_fetched_again(tmp_path, served):
    content = random.Random(0).randbytes(4 * BLOCK)
    (served.folder / "a.bin").write_bytes(content)
    enable(tmp_path)
    address = f"{served.address}/a.bin"
    assert remote.open_address(address).read(0, 4 * BLOCK) == content
    [kept] = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.name != ".lock"]
    with open(kept, "r+b") as file:  # as a disk that lost power leaves it: the table says that a block is there, and it is not
        file.seek(4096 + 2 * BLOCK)
        file.write(bytes(BLOCK))
    served.forget()
    assert remote.open_address(address).read(0, 4 * BLOCK) == content
    assert served.sent["/a.bin"] == BLOCK


def read_for_ever(address, folder, content, seed):
    """Random ranges, checked; ends only by a wrong one, or a kill."""
    remote.enable(RemoteConfig(schemes=["http"], cache=folder, cache_bytes=24 * BLOCK))
    choose = random.Random(seed)
    while True:
        start = choose.randrange(len(content))
        size = choose.randrange(6 * BLOCK)
        file = remote.open_address(address)
        if file.read(start, size) != content[start : start + size]:
            os._exit(3)
        (folder.parent / f"read-{seed}").touch()
        file.close()


def test_processes_share_the_cache_and_may_be_killed(tmp_path, served):
    content = random.Random(0).randbytes(30 * BLOCK + 77)  # more than the cache holds
    (served.folder / "a.bin").write_bytes(content)
    context = multiprocessing.get_context("fork")
    address = f"{served.address}/a.bin"
    processes = [context.Process(target=read_for_ever, args=(address, tmp_path / "cache", content, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("read-*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in processes:
        time.sleep(0.3)
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    enable(tmp_path)
    assert remote.open_address(address).read(0, len(content)) == content


def test_threads_share_a_file(tmp_path, served):
    content = random.Random(0).randbytes(20 * BLOCK)
    (served.folder / "a.bin").write_bytes(content)
    enable(tmp_path)
    file = remote.open_address(f"{served.address}/a.bin")
    wrong = []

    def read(seed):
        choose = random.Random(seed)
        for _ in range(30):
            start, size = choose.randrange(len(content)), choose.randrange(3 * BLOCK)
            if file.read(start, size) != content[start : start + size]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert served.sent["/a.bin"] == len(content)


# Rows of every format


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, size in enumerate([(64, 48), (300, 20), (30, 90)]):
        media.random_image(number, size).save(folder / f"{number}.png")
    media.write_video(folder / "v.mp4", (media.random_pixels(number, (64, 48)) for number in range(30)), 10, {"g": "10"}, {})
    rows = [
        {"image": "0.png", "messages": talk("<image>What?", "A square.")},
        {"images": ["0.png", "1.png"], "messages": talk("<image-2><image-1>?", 'Say "no", then\tgo.')},
        {"messages": talk("Only text, with a comma; no media", "Yes")},
        {"video": "v.mp4", "start": 0.5, "end": 1.5, "messages": talk("What happens?", "Noise")},
        {"image": "missing.png", "messages": talk("What?", "Nothing")},
        {"image": "2.png", "system": "Be brief.", "messages": talk("Last?", "Ja, größer.")},
    ]
    return folder, tables(folder, rows)


def run_on(folder, annotation, tokenizer, **sections):
    source = {"s": {"annotation": annotation}}
    settings = {"sources": source, "eval_sources": source, "workers": 1, "shard_rows": 2, "remote": sections.pop("remote", {})}
    return parse_config({"run": {"name": "run"}, "data": settings, **sections}, base=folder)


def seen_of(config, tokenizer):
    """All that the parts of a run make of a source."""
    report = prepare(config, tokenizer)
    facts = report.facts
    assert load_facts(config, tokenizer).table.equals(facts.table)
    assert prepare(config, tokenizer).rows_reused == 6
    samples = [load_sample(facts.address(row)) for row in range(len(facts))]
    root = str(facts.sources[0].root).rstrip("/")
    assert all(str(image).startswith(root) for sample in samples for image in sample.images)
    plan = plan_stage(facts, STAGE, SPEC)
    encoder = CachedEncoder(tokenizer)
    packs = [load_pack(plan.samples(pack), encoder, SPEC) for pack in range(plan.packs)]
    planned = [one for pack in range(plan.packs) for one in plan.samples(pack)]
    shown = [view_sample(load_sample(one.address), one.plan, SPEC, encoder, budget=900) for one in planned]
    return {
        "counts": (report.good_rows, report.bad_rows, report.reasons),
        "ledger": [(entry.line, entry.reason) for entry in Ledger(config.run.folder / "ledger.jsonl")],
        "messages": [sample.messages for sample in samples],
        "facts": facts.table.drop_columns(["offset", "size", "media_group"]).to_pydict(),
        "fingerprint": facts.sources[0].fingerprint,
        "plan": [pack_tokens(plan.samples(pack)) for pack in range(plan.packs)],
        "shown": to_html(shown, title="rows"),
        "packs": [(pack.batch.input_ids.tolist(), pack.batch.tiles.tolist(), pack.failed) for pack in packs],
        "pairs": list(training_pairs(facts)),
        "name": facts.sources[0].name_of(2, facts.address(1).offset).rpartition("-")[2],  # without what copies have in front
    }


QUICK = ("jsonl", "json", "csv", "parquet", "arrow", "tar", "jsonl.zst")
ALIKE = ("compact.json", "tsv", "jsonl.gz", "jsonl.bz2", "json.xz")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)])
def test_rows_of_every_format_are_those_of_the_local_file(tmp_path, data, name):
    folder, files = data
    tokenizer = byte_tokenizer()
    expected = seen_of(run_on(tmp_path / "local", str(files[name]), tokenizer), tokenizer)
    with FileServer(folder) as server:
        settings = {"schemes": ["http"], "cache": str(tmp_path / "cache"), "retries": 0}
        config = run_on(tmp_path / "remote", f"{server.address}/{files[name].name}", tokenizer, remote=settings)
        assert seen_of(config, tokenizer) == expected
        assert expected["counts"] == (5, 1, {"media-missing": 1})
        # Reading processes get the settings too.
        facts = load_facts(config, tokenizer)
        if name == "parquet":
            plan = plan_stage(facts, STAGE, SPEC)
            tokenizer.save_pretrained(tmp_path / "tokenizer")
            tasks = [Task(pack, tuple(plan.samples(pack)), STAGE.loss_weighting) for pack in range(plan.packs)]
            reading = Reading(str(tmp_path / "tokenizer"), SPEC, Limits(), remote=config.data.remote)
            with Loader(tasks, reading, workers=1) as loader:
                assert [(pack.batch.input_ids.tolist(), pack.batch.tiles.tolist(), pack.failed) for _, pack in loader] == expected["packs"]
        # A change of the file is seen, and shards that stay are found again.
        if name == "jsonl":
            more = files[name].read_bytes() + json.dumps({"messages": talk("One more?", "Yes")}).encode() + b"\n"
            (folder / "rows.jsonl").write_bytes(more)
            remote.enable(RemoteConfig())
            report = prepare(config, tokenizer)
            assert (report.rows_reused, report.good_rows) == (4, 6)  # two rows are looked at again, for the missing image
            assert report.facts.sources[0].fingerprint != expected["fingerprint"]


def test_a_network_that_fails_makes_no_row_bad(tmp_path, data):
    folder, _ = data
    tokenizer = byte_tokenizer()
    with FileServer(folder) as server:
        settings = {"schemes": ["http"], "cache": str(tmp_path / "cache"), "retries": 1}
        config = run_on(tmp_path, f"{server.address}/rows.json", tokenizer, remote=settings)
        server.faults = {"/1.png": [500] * 100}
        with pytest.raises(storage.StorageError, match=r"1\.png: can't be reached .* what is done is kept"):
            prepare(config, tokenizer)
        assert not list(Ledger(config.run.folder / "ledger.jsonl"))
        server.faults = {}
        assert prepare(config, tokenizer).good_rows == 5


def test_patterns_and_roots(tmp_path, served):
    Image.new("RGB", (8, 8)).save(served.folder / "a.png")
    rows = served.folder / "rows.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "messages": talk("?", "a")}) + "\n")
    tokenizer = byte_tokenizer()
    (tmp_path / "rows.jsonl").write_bytes(rows.read_bytes())
    settings = {"schemes": ["http"], "cache": str(tmp_path / "cache"), "retries": 0}
    source = {"s": {"annotation": "rows.jsonl", "root": served.address}}
    config = parse_config({"data": {"sources": source, "workers": 1, "remote": settings}}, base=tmp_path)
    facts = prepare(config, tokenizer).facts
    assert load_sample(facts.address(0)).images == (f"{served.address}/a.png",)
    for name, path in (
        ("b/../a 1#2.png", f"{served.address}/a%201%232.png"),
        ("/data/a.png", "/data/a.png"),
        (f"{served.address}/x/c.png", f"{served.address}/x/c.png"),
    ):
        row = {"image": name, "messages": talk("?", "a")}
        assert normalise(row, "s", root=served.address, line=1).images == (path,)
    for annotation, problem in ((f"{served.address}/no.jsonl", r"annotation file .*no\.jsonl: is not there \(404\)"),):
        config = parse_config({"data": {"sources": {"s": {"annotation": annotation}}, "remote": settings}}, base=tmp_path)
        with pytest.raises(ConfigError, match=problem):
            prepare(config, tokenizer)
    assert Path(config.data.remote.cache) == tmp_path / "cache"


def test_eval_takes_the_address_of_the_rows(tmp_path, data):
    """Named on the command line, an address needs no entry in data.remote.schemes; its images are those at the same place."""
    folder, files = data
    save_tiny_model(tmp_path / "model")

    def evaluate(address, *options):
        command = [sys.executable, "-m", "eagle_train.cli", "eval", tmp_path / "model", "--device", "cpu", "--data", address, *options]
        return subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)

    with FileServer(folder) as server:
        done = evaluate(f"{server.address}/{files['json'].name}", "--json")
        assert done.returncode == 0, done.stderr
        assert server.sent["/1.png"]
    answers = [json.loads(line) for line in Path(json.loads(done.stdout)["files"]["answers"]).read_text().splitlines()]
    assert len(answers) == 5
    secret = evaluate("https://host/rows.json?X-Amz-Signature=123")
    assert secret.returncode == 2
    assert "carries credentials" in secret.stderr
    assert "123" not in secret.stderr
