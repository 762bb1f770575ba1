"""Split, embed and select: rows and ledger add up, killed work is found again, bad input is named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eagle_train.cli.main import main
from eagle_train.config import ConfigError
from eagle_train.curate import encoders
from eagle_train.curate.embed import embed, vectors_of
from eagle_train.curate.encoders import GROUP, fingerprint, load_encoder
from eagle_train.curate.folder import CurateError, Folder
from eagle_train.curate.select import select
from eagle_train.curate.settings import load_curation, parse_curation
from eagle_train.curate.split import split, split_video
from eagle_train.errors import BAD_DATA
from eagle_train.watching.curation import write_page
from tests.train.curate.conftest import ENCODER, film


def curation(base, **sections):
    sections.setdefault("embed", {"encoder": ENCODER})
    return parse_curation({"folder": "out", "videos": ["videos"], "workers": 1, **sections}, base=base)


def reasons(config):
    return {f"{where.split()[1]} {reason}": number for (where, reason), number in Folder(config.folder).ledger.counts().items()}


def test_clips_are_the_scenes(tmp_path, three_videos):
    rows = split(curation(tmp_path)).to_pylist()
    spans = [(Path(row["video"]).name, round(row["start"], 3), round(row["end"], 3)) for row in rows]
    assert spans == [
        ("a.mp4", 0, 3), ("a.mp4", 3, 5), ("a.mp4", 5, 9), ("b.mp4", 0, 2.5), ("b.mp4", 2.5, 6), ("c.mp4", 0, 5)
    ]  # fmt: skip
    assert [row["begins"] for row in rows] == ["start", "cut", "cut", "start", "cut", "start"]
    assert len({row["clip"] for row in rows}) == len(rows)


def test_bad_videos_go_to_the_ledger_and_nothing_is_lost(tmp_path, three_videos):
    whole = (three_videos / "a.mp4").read_bytes()
    (three_videos / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (three_videos / "empty.mp4").write_bytes(b"")
    (three_videos / "text.mp4").write_text("not a video")
    (three_videos / "z-copy.mp4").write_bytes(whole)
    film(three_videos / "short.mp4", [5])
    Image.new("RGB", (32, 32)).save(three_videos / "picture.gif")
    config = curation(tmp_path, videos=["videos", "gone.mp4"])
    table = split(config)
    assert table.num_rows == 6
    assert reasons(config) == {"split bad-video": 4, "split same-file": 1, "split too-short": 1, "split no-times": 1}
    entries = {Path(entry.source).name: entry for entry in Folder(config.folder).ledger}
    assert set(entries) == {"cut.mp4", "empty.mp4", "text.mp4", "gone.mp4", "z-copy.mp4", "short.mp4", "picture.gif"}
    assert "is a picture" in entries["picture.gif"].detail
    again = split(config)
    assert again.equals(table)


def test_fixed_clips_and_chapters(tmp_path, three_videos):
    fixed = split(curation(tmp_path, split={"method": "fixed", "seconds": 4}))
    assert list(zip(fixed["start"].to_pylist(), fixed["end"].to_pylist()))[:3] == [(0, 4), (4, 8), (8, 9)]
    vitt = {"id": "a", "annotations": [{"timestamp": 0, "tag": "Начало"}, {"timestamp": 4500, "tag": "終わり"}]}
    (tmp_path / "vitt.json").write_text(json.dumps([vitt], ensure_ascii=False), encoding="utf-8")
    (three_videos / "b.chapters.json").write_text(json.dumps({"timestamps": [[1, 3], [3, 99]], "sentences": ["one", "two"]}))
    config = curation(tmp_path, split={"method": "chapters"}, chapters="vitt.json")
    rows = split(config).to_pylist()
    assert [(row["title"], row["start"], row["end"]) for row in rows] == [
        ("Начало", 0, 4.5), ("終わり", 4.5, 9), ("one", 1, 3), ("two", 3, 6)
    ]  # fmt: skip
    assert reasons(config) == {"split no-chapters": 1}
    (tmp_path / "vitt.json").write_text('[{"id": "a", "annotations": [{"tag": "x"}]}]')
    with pytest.raises(ConfigError, match=r"vitt\.json: a: not chapters .*timestamps and sentences"):
        split(config)


def test_chapters_of_the_container(tmp_path, three_videos):
    import av

    with av.open(str(three_videos / "a.mp4")) as source, av.open(str(three_videos / "a.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        spans = ((1, 0, 4000, "Änfang"), (2, 4000, 9000, "結び"))
        target.set_chapters(
            [
                {"id": id, "start": start, "end": end, "time_base": Fraction(1, 1000), "metadata": {"title": title}}
                for id, start, end, title in spans
            ]
        )
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    rows = split(curation(tmp_path, videos=["videos/a.mkv"], split={"method": "chapters"})).to_pylist()
    assert [(row["title"], round(row["start"], 3)) for row in rows] == [("Änfang", 0), ("結び", 4)]
    assert rows[1]["end"] == pytest.approx(9, abs=0.11)


def test_long_clips_are_divided(tmp_path, three_videos):
    settings = curation(tmp_path, split={"max_seconds": 2}).split
    rows = split_video(str(three_videos / "c.mp4"), 1, settings).table.to_pylist()
    np.testing.assert_allclose([row["end"] - row["start"] for row in rows], 5 / 3)


def test_embedding_is_the_mean_of_the_frames_and_is_cached_by_content(tmp_path, three_videos):
    config = curation(tmp_path)
    clips = split(config)
    table = embed(config)
    vectors = vectors_of(table)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert table["clip"].equals(clips["clip"])
    assert table["frames"].to_pylist() == [3, 2, 4, 2, 3, 5]
    parts = sorted((config.folder / "parts" / "embed").rglob("*.parquet"))
    os.rename(three_videos / "a.mp4", three_videos / "renamed.mp4")
    split(config)
    seen = {path: path.stat().st_mtime_ns for path in parts}
    renamed = vectors_of(embed(config))
    assert {path: path.stat().st_mtime_ns for path in (config.folder / "parts" / "embed").rglob("*.parquet")} == seen
    np.testing.assert_array_equal(np.sort(renamed, axis=0), np.sort(vectors, axis=0))


def test_selection_removes_what_is_known_and_near(tmp_path, three_videos):
    config = curation(tmp_path)
    split(config)
    table = embed(config)
    seed = tmp_path / "seed.parquet"
    pq.write_table(table.slice(0, 1), seed)
    config = curation(tmp_path, select={"seed": ["seed.parquet"], "tau": 0.9999, "duplicate": 1.0})
    chosen = select(config)
    vectors = vectors_of(table)
    similar = vectors @ vectors[0]
    assert set(chosen["clip"].to_pylist()) == {table["clip"][row].as_py() for row in np.flatnonzero(similar < 0.9999)}
    assert chosen["similarity"].to_pylist() == sorted(chosen["similarity"].to_pylist())
    entries = [entry for entry in Folder(config.folder).ledger if entry.where == "curate select"]
    assert chosen.num_rows + len(entries) == table.num_rows
    assert entries[0].reason == "not-novel"


def brute_force(queries, others):
    """A hook as for FAISS."""
    product = queries @ others.T
    return product.max(axis=1), product.argmax(axis=1)


def nothing_useful(queries, others):
    return np.zeros(1), np.zeros(1)


def test_another_index_gives_the_same(tmp_path, three_videos):
    config = curation(tmp_path)
    split(config)
    pq.write_table(embed(config).slice(0, 2), tmp_path / "seed.parquet")
    settings = {"seed": ["seed.parquet"], "tau": 0.9999, "duplicate": 1.0}
    exact = select(curation(tmp_path, select=settings))
    assert select(curation(tmp_path, select=settings | {"index": f"{__name__}:brute_force"})).equals(exact)
    with pytest.raises(ConfigError, match=r"nothing_useful returned \(1,\) and \(1,\), expected .* of \(6,\)"):
        select(curation(tmp_path, select=settings | {"index": f"{__name__}:nothing_useful"}))


def test_a_budget_of_hours(tmp_path, three_videos):
    config = curation(tmp_path, select={"hours": 8 / 3600, "tau": 1.0, "duplicate": 1.0, "buckets": [3.2]})
    split(config)
    embed(config)
    chosen = select(config)
    assert (chosen["end"].to_numpy() - chosen["start"].to_numpy()).sum() <= 8
    assert chosen.num_rows + reasons(config)["select over-budget"] == 6


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"embed": {}}, "embed.encoder is not given"),
        ({"embed": {"encoder": "nowhere"}}, "not a folder"),
        ({"embed": {"encoder": "tests.train.curate.conftest:gone"}}, "can't be imported"),
        ({"videos": ["nothing/*.mp4"]}, r"nothing/\*\.mp4 has no video files"),
        ({"split": {"methd": "shots"}}, "did you mean 'method'"),
        ({"executor": "spark"}, "'local' or 'ray'"),
        ({"select": {"hours": [1.0]}}, "hours has 1 numbers; 4 edges make 5 buckets"),
        ({"select": {"buckets": [3, 2]}}, "rising"),
        ({"select": {"seed": ["gone.parquet"]}}, r"gone\.parquet does not exist"),
    ],
)
def test_wrong_settings_are_named(tmp_path, three_videos, sections, message):
    def everything():
        config = curation(tmp_path, **sections)
        for step in (split, embed, select):
            step(config)

    with pytest.raises(ConfigError, match=message):
        everything()


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [(b"junk" * 2000, BAD_DATA, "kept no rows; .*ledger.jsonl says why"), (b"", BAD_DATA, "kept no rows"), (None, 2, "has no video files")],
)
def test_a_folder_without_a_usable_video_fails(tmp_path, capsys, content, code, message):
    (tmp_path / "videos").mkdir()
    if content is not None:
        (tmp_path / "videos" / "a.mp4").write_bytes(content)
    (tmp_path / "curate.yaml").write_text("folder: out\nvideos: [videos]\nworkers: 1\nembed: {encoder: x}\n")
    with pytest.raises(SystemExit) as ended:
        main(["curate", "split", str(tmp_path / "curate.yaml")])
    assert ended.value.code == code
    assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit) as ended:
        main(["curate", "embed", str(tmp_path / "curate.yaml")])
    assert ended.value.code == BAD_DATA
    assert re.search("has no rows" if content is not None else "run eagle curate split first", capsys.readouterr().err)


def test_a_step_without_its_input_names_the_verb(tmp_path, three_videos):
    with pytest.raises(CurateError, match="run eagle curate split first"):
        embed(curation(tmp_path))


def test_a_changed_step_removes_later_results(tmp_path, three_videos):
    config = curation(tmp_path)
    split(config)
    embed(config)
    split(config)
    assert Folder(config.folder).result("embed").exists()  # nothing changed
    split(curation(tmp_path, split={"method": "fixed"}))
    assert not Folder(config.folder).result("embed").exists()


def test_killed_and_continued_gives_the_same(tmp_path, three_videos):
    film(three_videos / "d.mp4", [40] * 40, first_seed=50)
    (tmp_path / "curate.yaml").write_text("folder: out\nvideos: [videos]\nworkers: 1\n")
    code = "from eagle_train.cli.main import main; main(['curate', 'split', 'curate.yaml'])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / "parts"
    deadline = time.monotonic() + 60
    while not list(parts.rglob("*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.rglob("*.parquet")}
    assert kept
    config = load_curation(tmp_path / "curate.yaml")
    table = split(config)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    fresh = split(config.replaced(folder=tmp_path / "fresh"))
    assert table.equals(fresh)


def test_processes_give_what_one_process_gives(tmp_path, three_videos):
    one = split(curation(tmp_path))
    two = split(curation(tmp_path, folder="other", workers=2))
    assert one.equals(two)


def test_a_page_shows_pictures_and_what_was_removed(tmp_path, three_videos):
    film(three_videos / "short.mp4", [5])
    config = curation(tmp_path)
    split(config)
    text = write_page(config, step=None, rows=3).read_text()
    assert text.count("<section>") == 3
    assert text.count("data:image/jpeg;base64,") == 12
    assert "too-short" in text
    assert "http" not in text
    with pytest.raises(ConfigError, match="steps are split, embed"):
        write_page(config, step="spilt")


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_encoders_of_transformers_from_a_folder(tmp_path, family):
    import torch
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    kinds = {"siglip": (SiglipConfig, SiglipModel), "clip": (CLIPConfig, CLIPModel)}
    config, model = kinds[family]
    model(config(text_config=text, vision_config=vision)).save_pretrained(tmp_path / "model")
    encoder = load_encoder(str(tmp_path / "model"), "cpu")
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    vectors = encoder.encode(frames)
    assert encoder.size == 32
    assert vectors.shape[0] == 3
    np.testing.assert_allclose(encoder.encode(frames[1:2]), vectors[1:2], atol=1e-5)
    assert fingerprint(str(tmp_path / "model"))


def test_an_encoder_of_an_entry_point(monkeypatch):
    point = EntryPoint("colours", ENCODER, GROUP)
    monkeypatch.setattr(encoders, "entry_points", lambda group: [point] if group == GROUP else [])
    assert load_encoder("colours", "cpu").size == 32
    with pytest.raises(ConfigError, match=r"not an entry point of eagle_train.encoders \(colours\)"):
        load_encoder("colour", "cpu")


def test_the_tower_of_an_eagle_checkpoint(tmp_path):
    import torch

    from tests.support.models import tiny_model

    model = tiny_model()
    model.save_pretrained(tmp_path / "eagle")
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    encoder = load_encoder(str(tmp_path / "eagle"), "cpu")
    with torch.inference_mode():
        expected = model.vision_model(torch.from_numpy(frames)).mean(dim=1)
    np.testing.assert_allclose(encoder.encode(frames), expected.numpy(), atol=1e-5)
