"""Everything that goes wrong in real data ends in the ledger with source, line and reason, and the rest is used."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib

import lmdb
import numpy as np
import pytest
from PIL import Image

from eagle_model.visual import VisualSpec
from eagle_train.config import ConfigError, StageConfig, dump_config, load_config
from eagle_train.data.ledger import Ledger
from eagle_train.data.prepare import prepare
from eagle_train.planning.stages import plan_stage

SPEC = VisualSpec(tile_size=64, tokens_per_tile=4)


def png_of(width, height):
    """A valid PNG of zeros that is written in a few kB whatever its size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    line = b"\0" * (1 + (width + 7) // 8)
    data = b"".join(compressor.compress(line) for _ in range(height)) + compressor.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def eagle(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "eagle_train.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture
def folder(tmp_path, picture, write_video):
    (tmp_path / "good.png").write_bytes(picture())
    jpeg = picture(400, 300, "JPEG")
    (tmp_path / "good.jpg").write_bytes(jpeg)
    (tmp_path / "trailing.jpg").write_bytes(jpeg + b"appended by a camera" * 50)
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "cut.png").write_bytes(picture(400, 300)[:-2000])
    (tmp_path / "cut.webp").write_bytes(picture(400, 300, "WEBP")[:-500])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"not an image")
    (tmp_path / "thin.png").write_bytes(png_of(1, 20000))
    (tmp_path / "huge.png").write_bytes(png_of(30000, 30000))
    (tmp_path / "bomb.png").write_bytes(picture()[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + picture()[24:])
    video = write_video(tmp_path / "good.mp4", frames=30).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(video[: len(video) // 2])
    dds = io.BytesIO()
    Image.new("RGB", (8, 8)).save(dds, "DDS")
    (tmp_path / "foreign.dds").write_bytes(dds.getvalue()[:80] + b"\4\0\0\0WHAT" + dds.getvalue()[88:])
    (tmp_path / "text.mp4").write_bytes(b"no video" * 100)
    with lmdb.open(str(tmp_path / "images.lmdb"), map_size=1 << 24) as store, store.begin(write=True) as write:
        write.put(b"here", picture())
        write.put(b"cut", jpeg[:-1000])
    return tmp_path


def test_every_bad_row_is_in_the_ledger(folder, row, make_config, write_jsonl, tokenizer):
    def stored(key, file="images.lmdb"):
        return row(image={"lmdb_file": file, "lmdb_key": key})

    answerless = {"conversations": [{"from": "human", "value": "?"}]}
    cases = [
        (row(), None),
        (row(image="good.jpg"), None),
        (row(image="trailing.jpg"), None),
        (row(image="thin.png"), None),
        (row(video="good.mp4"), None),
        (stored("here"), None),
        (row("<image>", image="good.png"), None),
        (row("<image-2><image-1>", image=["good.png", "good.jpg"]), None),
        (row(image="missing.png"), "media-missing"),
        (row(video="missing.mp4"), "media-missing"),
        (stored("not there"), "media-missing"),
        (stored("here", "missing.lmdb"), "media-missing"),
        (row(image="cut.jpg"), "bad-image"),
        (row(image="cut.png"), "bad-image"),
        (row(image="cut.webp"), "bad-image"),
        (row(image="empty.png"), "bad-image"),
        (row(image="text.png"), "bad-image"),
        (row(image="huge.png"), "bad-image"),
        (row(image="bomb.png"), "bad-image"),
        (stored("cut"), "bad-image"),
        (row(video="cut.mp4"), "bad-video"),
        (row(video="text.mp4"), "bad-video"),
        (row(video={"path": "good.mp4", "start": 100, "end": 110}), "bad-clip"),
        (row(document="missing.pdf"), "media-missing"),
        (row(document="text.pdf"), "bad-document"),
        (b'{"conversations": [', "broken-json"),
        (b"[1, 2]", "broken-json"),
        (b'{"id": 1, "conversations": [{"from": "human", "value": "a", "value": "b"}]}', "broken-json"),
        (b"\xff\xfe\x00", "broken-json"),
        (b"[" * 60_000, "broken-json"),
        (answerless, "no-assistant-turn"),
        (row(answer=""), "no-labels"),
        (row("<image-2>", image="good.png"), "placeholders"),
        (row("<image> and <image>", image="good.png"), "placeholders"),
        (row("<image>"), None),
        (row("<image-1>"), "placeholders"),
        (row("<image>", image=None), "bad-media"),
        (row("<video-1> <video-1>", video="good.mp4"), "placeholders"),
        ({"id": 1}, "bad-row"),
        ({"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "x"}]}, "bad-row"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "bad-row"),
        (row(image=5), "bad-media"),
        (row(image="http://example.org/a.png"), "bad-media"),
        (row(video={"path": "good.mp4", "start": 2, "end": 1}), "bad-media"),
        (b'{"x": "' + b"y" * 70_000 + b'"}', "line-too-long"),
        (row("half of a pair: \ud83d"), "bad-row"),
        *(
            (row(**{kind: "x" * 300 + ending}), "media-missing")
            for kind, ending in (("image", ""), ("video", ".mp4"), ("document", ".pdf"))
        ),
        (stored("\ud800"), "media-missing"),  # legal in JSON, no key
        (row(image="foreign.dds"), "bad-image"),  # Pillow: NotImplementedError
    ]
    (folder / "text.pdf").write_bytes(b"not a PDF")
    lines = [content for content, _ in cases]
    lines.insert(5, b"  ")  # an empty line is not a row
    write_jsonl(folder / "rows.jsonl", lines)
    limits = {"max_line_bytes": "64KiB"}
    report = prepare(make_config({"s": {"annotation": "rows.jsonl"}}, data={"limits": {**limits, "max_bad_fraction": 1}}), tokenizer)
    entries = {entry.line: entry for entry in Ledger(folder / "runs/test/ledger.jsonl")}
    for index, (content, reason) in enumerate(cases):
        line = index + 1 + (index >= 5)
        found = entries[line].reason if line in entries else None
        assert found == reason, f"line {line}: {content if len(str(content)) < 200 else '...'}: {entries.get(line)}"
        if reason is not None:
            assert entries[line].source == "s"
            assert 0 < len(entries[line].detail.encode()) < 1000, "it can be printed"
    bad = sum(reason is not None for _, reason in cases)
    assert (report.rows, report.good_rows, report.bad_rows, report.blank_lines) == (len(cases), len(cases) - bad, bad, 1)
    assert sum(report.reasons.values()) == bad
    for line, name in ((10, "missing.png"), (14, "cut.jpg"), (19, "huge.png"), (22, "cut.mp4")):
        assert name in entries[line].detail
    assert "not there" in entries[12].detail
    assert "30000 x 30000" in entries[19].detail
    # The rest goes on: it can be planned, and every good row is in a pack.
    plan = plan_stage(report.facts, StageConfig(name="s", max_tokens=4096), SPEC)
    assert len(np.unique(plan.pack_rows)) == report.good_rows


@pytest.mark.parametrize(("level", "caught"), [("header", False), ("ends", True), ("decode", True)])
def test_levels_of_checking_a_cut_jpeg(folder, row, make_config, write_jsonl, tokenizer, level, caught):
    write_jsonl(folder / "rows.jsonl", [row(image="good.jpg"), row(image="cut.jpg")])
    report = prepare(make_config({"s": {"annotation": "rows.jsonl"}}, data={"verify": level}), tokenizer)
    assert report.bad_rows == caught


def test_only_decoding_sees_a_damaged_middle(folder, row, picture, make_config, write_jsonl, tokenizer):
    data = bytearray(picture(200, 200))
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (folder / "middle.png").write_bytes(bytes(data))
    write_jsonl(folder / "rows.jsonl", [row(), row(image="middle.png")])
    bad = [
        prepare(make_config({"s": {"annotation": "rows.jsonl"}}, data={"verify": level}), tokenizer).bad_rows
        for level in ("ends", "decode")
    ]
    assert bad == [0, 1]


def test_text_longer_than_the_budget_is_the_stages_drop(tmp_path, row, make_config, write_jsonl, tokenizer, picture):
    (tmp_path / "a.png").write_bytes(picture())
    write_jsonl(tmp_path / "rows.jsonl", [row(), row("x" * 5000), row("y" * 950, image=["a.png"] * 20)])
    facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).facts
    short = plan_stage(facts, StageConfig(name="short", max_tokens=1024), SPEC)
    drops = list(short.drops())
    assert [(drop.source, drop.line, drop.reason, drop.where) for drop in drops] == [
        ("s", 2, "text_too_long", "stage short"),
        ("s", 3, "text_too_long" if "text alone" in drops[1].detail else "images_too_long", "stage short"),
    ]
    assert plan_stage(facts, StageConfig(name="long", max_tokens=8192), SPEC).drop_rows.tolist() == []
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for _ in range(2):  # planning again replaces what the stage wrote before
        ledger.replace(drops, where="stage short")
    assert ledger.counts() == {("stage short", drop.reason): sum(d.reason == drop.reason for d in drops) for drop in drops}


def test_exif_thumbnail_does_not_hide_a_cut_jpeg(folder, row, picture, make_config, write_jsonl, tokenizer):
    """A small JPEG inside the first kilobytes has an end of its own."""
    inner, outer = picture(32, 32, "JPEG"), picture(400, 300, "JPEG", seed=1)
    block = b"Exif\0\0" + inner
    whole = outer[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + outer[2:]
    (folder / "outer.jpg").write_bytes(whole[:-20000])
    write_jsonl(folder / "rows.jsonl", [row(), row(image="outer.jpg")])
    assert prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).reasons == {"bad-image": 1}


def test_unknown_recipe_key_stops_with_the_right_one(tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row()])
    (tmp_path / "recipe.json").write_text(json.dumps({"s": {"annotation": "rows.jsonl", "repeat_times": 2}}))
    with pytest.raises(ConfigError, match=r"recipe.json: s: unknown key 'repeat_times'; did you mean 'repeat_time'\?"):
        prepare(make_config({}, data={"recipe": "recipe.json"}), tokenizer)
    (tmp_path / "config.yaml").write_text("data: {sources: {s: {anotation: rows.jsonl}}}")
    with pytest.raises(ConfigError, match=r"data.sources.s.anotation'; did you mean 'annotation'\?"):
        load_config(tmp_path / "config.yaml")


def test_the_command_line_trains_on_the_rest_and_accounts_for_every_row(folder, row, colour_run, write_jsonl):
    """As a user sees it: one command, all of it bad in another way, and the sums at the end."""
    cases = [
        (row(image="missing.png"), "media-missing"),
        (row(image="cut.jpg"), "bad-image"),
        (row(video="cut.mp4"), "bad-video"),
        (b'{"conversations": [', "broken-json"),
        (row("<image> and <image>", image="good.png"), "placeholders"),
        (row(image="huge.png"), "bad-image"),
        (row(image="bomb.png"), "bad-image"),
        (row("x" * 5000), "text_too_long"),
        ({"conversations": [{"from": "human", "value": "?"}]}, "no-assistant-turn"),
        (row(image={"lmdb_file": "images.lmdb", "lmdb_key": "not there"}), "media-missing"),
        (row(answer=""), "no-labels"),
    ]
    good = [row(image="thin.png"), row(image="good.jpg"), row(video="good.mp4"), row()]
    sources = {"s": {"annotation": "bad.jsonl"}}
    stage = {"name": "one", "max_tokens": 640, "packs_per_step": 1, "epochs": 1}
    config = colour_run(data={"sources": sources, "workers": 1, "limits": {"max_bad_fraction": 1}}, stages=[stage])
    write_jsonl(folder / "bad.jsonl", [*(content for content, _ in cases), *good])
    path = folder / "run.yaml"
    path.write_text(dump_config(config))
    done = eagle("train", path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "15 rows: 4 planned, 10 unusable, 1 too long for every stage\n" in done.stdout
    entries = {entry.line: entry for entry in Ledger(config.run.folder / "ledger.jsonl")}
    assert {line: entry.reason for line, entry in entries.items()} == {line: reason for line, (_, reason) in enumerate(cases, start=1)}
    assert all(entry.source == "s" and entry.detail for entry in entries.values())
    assert "eagle_train" not in done.stderr  # no traceback, no module names

    # With the default limits the same rows stop the run, which names them.
    strict = eagle("prepare", path, "--set", "data.limits.max_bad_rows=5", "--set", "run.name=strict")
    assert strict.returncode == 3
    assert "Traceback" not in strict.stderr
    assert "max_bad_rows" in strict.stderr
    wrong = eagle("prepare", path, "--set", "data.sources.s.repeat_times=2")
    assert wrong.returncode == 2
    assert "did you mean 'repeat_time'?" in wrong.stderr
