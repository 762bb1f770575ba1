"""Sources: the same rows in every format give the same samples, facts and answers, and every row is read again by its address."""

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle_model.prompt import CachedEncoder
from eagle_model.visual import VisualSpec
from eagle_train.config import ConfigError, Source, StageConfig
from eagle_train.data.ledger import Ledger
from eagle_train.data.prepare import PrepareError, load_facts, prepare
from eagle_train.data.recipe import load_recipe
from eagle_train.data.sample import RowError, load_sample
from eagle_train.data.sources import FORMATS, files_of, format_of, open_rows
from eagle_train.data.sources.index import index_file
from eagle_train.evaluation.text_only import training_pairs
from eagle_train.loading.pack import load_pack
from eagle_train.planning.stages import plan_stage
from tests.support import media
from tests.support.tables import tables, talk

SPEC = VisualSpec(tile_size=32, tokens_per_tile=4, min_frames=2)
STAGE = StageConfig(name="s", max_tokens=900, packs_per_step=1)


@pytest.fixture
def rows(tmp_path, write_video):
    for number, size in enumerate([(64, 48), (300, 20), (30, 90)]):
        media.random_image(number, size).save(tmp_path / f"{number}.png")
    write_video(tmp_path / "v.mp4", frames=30, fps=10)
    return [
        {"image": "0.png", "messages": talk("<image>What?", "A square, “round”.\nReally.")},
        {"images": ["0.png", "1.png"], "messages": talk("<image-2><image-1>?", 'Say "no", then\tgo.')},
        {"messages": talk("Only text, with a comma; no media", "Yes")},
        {"video": "v.mp4", "start": 0.5, "end": 1.5, "messages": talk("What happens?", "Noise")},
        {"image": "2.png", "system": "Be brief.", "messages": talk("Again?", "Ja, größer.")},
        {"image": "missing.png", "messages": talk("What?", "Nothing")},
        {"image": "1.png", "messages": talk("Last?", "Yes.")},
    ]


def test_every_format_gives_the_same_samples(tmp_path, rows, make_config, tokenizer):
    files = tables(tmp_path, rows)
    assert {format_of(str(path)) for name, path in files.items() if name.count(".") == 0} == set(FORMATS)
    seen = {}
    for name, path in files.items():
        config = make_config({"s": {"annotation": str(path)}}, data={"shard_rows": 2, "facts": f"facts-{name}"})
        report = prepare(config, tokenizer)
        facts = report.facts
        assert (report.good_rows, report.reasons) == (6, {"media-missing": 1}), name
        assert load_facts(config, tokenizer).table.equals(facts.table)
        assert [entry.line for entry in Ledger(config.run.folder / "ledger.jsonl")] == [6]
        samples = [load_sample(facts.address(row)) for row in range(len(facts))]
        assert list(facts.addresses(facts.sources[0])) == [facts.address(row) for row in range(len(facts))]
        plan = plan_stage(facts, STAGE, SPEC)
        packs = [load_pack(plan.samples(pack), CachedEncoder(tokenizer), SPEC) for pack in range(plan.packs)]
        measured = facts.table.drop_columns(["offset", "size"]).to_pydict()
        content = [(pack.batch.input_ids.tolist(), pack.batch.tiles.sum().item(), pack.failed) for pack in packs]
        seen[name] = (samples, measured, content, list(training_pairs(facts)))
    expected = seen.pop("jsonl")
    for name, found in seen.items():
        assert found == expected, name
    assert [video.start for video in expected[0][3].videos] == [0.5]
    assert len(seen) == 11


text = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t\r"), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(text, values, max_size=4), max_size=12),
    shard_rows=st.integers(1, 5),
    cut=st.integers(0, 12),
    data=st.data(),
)
def test_rows_of_json_are_found_whatever_they_hold(tmp_path, rows, shard_rows, cut, data):
    """Shards cover all rows in order; each row is found by its address; rows that are appended leave the shards before them alone."""
    indent = data.draw(st.sampled_from([None, 1]))
    for name, write in {
        "a.jsonl": lambda some: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some),
        "a.json": lambda some: json.dumps(some, ensure_ascii=False, indent=indent),
    }.items():
        path = tmp_path / name
        path.write_text(write(rows[:cut]), newline="")
        first = index_file(str(path), shard_rows, tmp_path / "cache")
        path.write_text(write(rows), newline="")
        cached = tmp_path / "cache"
        index = index_file(str(path), shard_rows, cached)
        source = open_rows(str(path))
        found = [row for shard in index.shards for row in source.read(shard, 1 << 20)]
        assert [row.content for row in found] == rows
        assert [source.get(row.start, row.size) for row in found] == rows
        assert index.rows == len(rows)
        kept = sum(shard.rows for shard in first.shards)
        assert index.shards[: len(first.shards)] == first.shards or not kept
        fresh = index_file(str(path), shard_rows, tmp_path / f"fresh{name}")
        assert fresh.fingerprint == index.fingerprint
        for folder in (cached, tmp_path / f"fresh{name}"):
            for file in folder.iterdir():
                file.unlink()


def test_several_files_are_one_source(tmp_path, rows, make_config, tokenizer):
    for number, row in enumerate(rows):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n" * (number + 1))
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" * (number + 1) for number, row in enumerate(rows)))
    listed = [f"part-{number}.jsonl" for number in range(len(rows))]
    given = {"one": "all.jsonl", "pattern": "part-*.jsonl", "list": [*listed[:2], "part-[2-9].jsonl"]}
    seen = {}
    for name, annotation in given.items():
        config = make_config({"s": {"annotation": annotation}}, data={"shard_rows": 2, "facts": name})
        facts = prepare(config, tokenizer).facts
        entries = list(Ledger(config.run.folder / "ledger.jsonl"))
        assert [Path(entry.file).name for entry in entries] == ([""] if name == "one" else ["part-5.jsonl"])
        seen[name] = [load_sample(facts.address(row)) for row in range(len(facts))]
    assert seen["one"] == seen["pattern"] == seen["list"]
    source = facts.sources[0]
    last = facts.address(len(facts) - 1)
    assert (last.line, source.name_of(last.line, last.offset)) == (1 + sum(range(1, 7)), "part-6.jsonl:1")
    (tmp_path / "part-0.jsonl").write_text("")
    assert len(prepare(config, tokenizer).facts) == 5


def test_what_names_no_file_is_said(tmp_path, make_config, tokenizer):
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for annotation, problem in (
        ("no.jsonl", "annotation file .*no.jsonl does not exist"),
        ("no-*.jsonl", "annotation pattern .* matches no file"),
        (["rows.jsonl", "./rows.jsonl"], "names a file twice"),
        ("empty", "annotation folder .* has no files"),
        ([], "is an empty list"),
    ):
        with pytest.raises(ConfigError, match=problem):
            prepare(make_config({"s": {"annotation": annotation}}), tokenizer)
    for name, content in (("cut.gz", gzip.compress(b"x" * 1000)[:-20]), ("rows.parquet", b"PAR1nothing"), ("table.csv", b"a,a\n1,2\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            prepare(make_config({"s": {"annotation": name}}), tokenizer)
    for encoding, name in (("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32")):
        for file in ("rows.jsonl", "rows.json", "rows.csv"):
            (tmp_path / file).write_bytes('{"a": "ä"}\n'.encode(encoding))
            with pytest.raises(ConfigError, match=rf"{file}: is {name} text, not UTF-8; convert it: iconv -f {name} -t UTF-8"):
                prepare(make_config({"s": {"annotation": file}}), tokenizer)
    (tmp_path / "rows.csv").write_bytes("Größe,answer\n1,2\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"rows.csv: its first line can't be read .*utf-8"):
        prepare(make_config({"s": {"annotation": "rows.csv"}}), tokenizer)
    for name, mark in (("semicolons.csv", ";"), ("tabs.csv", "\t"), ("bars.tsv", "|")):
        (tmp_path / name).write_text(f"question{mark}answer\na{mark}b\n")
        with pytest.raises(ConfigError, match=rf"{name}: its first line has {re.escape(repr(mark))} between cells, .* save it with"):
            prepare(make_config({"s": {"annotation": name}}), tokenizer)
    (tmp_path / "hidden").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ConfigError, match=r"is compressed \(gzip\)"):
        prepare(make_config({"s": {"annotation": "hidden"}}), tokenizer)


def test_a_saved_dataset_with_images_in_columns(tmp_path, make_config, tokenizer):
    """FineVision's `images` and `texts`, as `datasets` saves them: images are bytes in a column."""
    pictures = [media.encoded(media.random_image(number, (40 + number, 30)), "PNG") for number in range(5)]
    rows = [
        {
            "images": [{"bytes": picture, "path": None}] * (number % 3),
            "texts": [{"user": "What?", "assistant": f"Number {number}"}, {"user": "Sure?", "assistant": "Yes"}],
            "source": "made",
        }
        for number, picture in enumerate(pictures)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(
        rows,
        schema=pa.schema(
            [("images", pa.list_(kind)), ("texts", pa.Table.from_pylist(rows).schema.field("texts").type), ("source", pa.string())]
        ),
    )
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_info.json").write_text("{}")
    for number in range(2):
        with pa.ipc.new_stream(tmp_path / f"saved/data-0000{number}-of-00002.arrow", table.schema) as writer:
            writer.write_table(table.slice(3 * number, 3))
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub/train-00000-of-00001.parquet", row_group_size=2)
    seen = []
    for name in ("saved", "hub"):
        facts = prepare(make_config({"s": {"annotation": name}}, data={"facts": f"facts-{name}"}), tokenizer).facts
        assert facts.lists("image_width")[1].tolist() == [41, 42, 42, 44]
        plan = plan_stage(facts, STAGE, SPEC)
        pack = load_pack(plan.samples(0), CachedEncoder(tokenizer), SPEC)
        assert not pack.failed
        seen.append((facts.table.drop_columns(["offset"]).to_pydict(), pack.batch.tiles.tolist()))
    assert seen[0][1] == seen[1][1]
    # The offset counts from the start of each file; everything else is the same.
    assert seen[0][0] == seen[1][0]


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_members_of_a_webdataset(tmp_path, make_config, tokenizer, write_video):
    picture, other = (media.encoded(media.random_image(seed, (50 + seed, 40)), "JPEG") for seed in range(2))
    clip = write_video(tmp_path / "v.mp4", frames=20, fps=10).read_bytes()
    long = "a/" * 60 + "0007"  # a name that needs a header of its own
    members = {
        "0001.jpg": picture,
        "0001.json": json.dumps({"messages": talk("<image>?", "one")}).encode(),
        "0002.json": json.dumps({"messages": talk("<image-2><image-1>", "two"), "images": ["0002.b.jpg", "0002.a.jpg"]}).encode(),
        "0002.a.jpg": picture,
        "0002.b.jpg": other,
        "0003.mp4": clip,
        "0003.json": json.dumps({"messages": talk("?", "clip"), "start": 0.5}).encode(),
        "0004.json": json.dumps(
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "0004.jpg"}]}, talk("", "four")[1]]}
        ).encode(),
        "0004.jpg": other,
        "0005.json": b"[]",
        "0006.jpg": picture,
        "0006.json": json.dumps({"messages": talk("?", "six"), "image": "elsewhere.png"}).encode(),
        f"{long}.json": json.dumps({"messages": talk("?", "seven")}).encode(),
        f"{long}.jpg": other,
    }
    tar_of(tmp_path / "shard.tar", members)
    config = make_config({"s": {"annotation": "shard.tar"}}, data={"shard_rows": 2})
    report = prepare(config, tokenizer)
    facts = report.facts
    assert (report.good_rows, report.reasons) == (5, {"broken-json": 1, "bad-media": 1})
    assert facts.lists("image_width")[1].tolist() == [50, 51, 50, 51, 51]
    assert facts.lists("video_frames")[1].tolist() == [15]
    plan = plan_stage(facts, STAGE, SPEC)
    assert not any(load_pack(plan.samples(pack), CachedEncoder(tokenizer), SPEC).failed for pack in range(plan.packs))
    assert load_sample(facts.address(1)).images[0]["member"] == "0002.b.jpg"
    assert Path(load_sample(facts.address(2)).videos[0].path).read_bytes() == clip
    assert facts.sources[0].name_of(4, facts.address(3).offset) == "shard.tar/0004"
    captions = tar_of(tmp_path / "captions.tar", {"a.jpg": picture, "a.txt": b"A blur.", "b.jpg": other, "b.txt": b"Noise."})
    source = {"annotation": str(captions), "columns": {"answer": "txt"}, "question": "Describe the image."}
    facts = prepare(make_config({"s": source}), tokenizer).facts
    assert list(training_pairs(facts)) == [("Describe the image.", "A blur."), ("Describe the image.", "Noise.")]
    (tmp_path / "cut.tar").write_bytes((tmp_path / "shard.tar").read_bytes()[:-12_000])
    assert prepare(make_config({"s": {"annotation": "cut.tar"}}), tokenizer).rows < 7


def test_rows_name_members_of_tar_files(tmp_path, row, write_jsonl, make_config, tokenizer):
    pictures = {f"folder/{seed}.png": media.encoded(media.random_image(seed, (30 + seed, 20)), "PNG") for seed in range(3)}
    tar_of(tmp_path / "images.tar", pictures)
    names = [*pictures, "./folder/1.png", "folder/no.png"]
    write_jsonl(
        tmp_path / "rows.jsonl",
        [row(image={"tar": "images.tar", "member": name}) for name in names] + [row(image={"tar": "no.tar", "member": "x"})],
    )
    report = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer)
    assert report.facts.lists("image_width")[1].tolist() == [30, 31, 32, 31]
    assert report.reasons == {"media-missing": 2}


def test_columns_are_mapped(tmp_path, make_config, tokenizer):
    media.random_image(0, (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text('prompt,reply,picture,thumb,id\nHow many?,007,a.png,a.png,1\n"Two, or\nthree?",3,,a.png,2\n,x,,,3\n')
    source = {"annotation": "t.csv", "columns": {"question": "prompt", "answer": "reply", "image": "picture"}, "ignore": ["thumb"]}
    report = prepare(make_config({"s": source}), tokenizer)
    assert list(training_pairs(report.facts)) == [("How many?", "007"), ("Two, or\nthree?", "3")]
    assert report.reasons == {"bad-row": 1}
    assert report.facts.lists("image_width")[1].tolist() == [30]
    refused = prepare(make_config({"s": {**source, "ignore": []}}, data={"limits": {"max_bad_fraction": 1}}), tokenizer)
    assert refused.reasons == {"unknown-key": 2, "bad-row": 1}
    with pytest.raises(ConfigError, match="'pictures' is not a key of a row"):
        make_config({"s": {"annotation": "t.csv", "columns": {"pictures": "picture"}}})
    (tmp_path / "recipe.yaml").write_text("t: {annotation: '*.csv', columns: {question: prompt, answer: reply}}\n")
    assert load_recipe(tmp_path / "recipe.yaml").sources["t"].columns == {"question": "prompt", "answer": "reply"}


def test_broken_records_of_a_table(tmp_path, make_config, tokenizer):
    (tmp_path / "t.csv").write_bytes(b'question,answer\na,b\nonly one\n"x""y",z\n\xff,b\n\n"open, c\n')
    report = prepare(make_config({"s": {"annotation": "t.csv", "columns": {"question": "question", "answer": "answer"}}}), tokenizer)
    assert (report.good_rows, report.blank_lines, report.reasons) == (2, 1, {"broken-record": 3})
    assert list(training_pairs(report.facts))[1] == ('x"y', "z")


def test_only_new_rows_are_measured(tmp_path, row, write_jsonl, make_config, tokenizer):
    rows = [row(f"Question {number}") for number in range(25)] + [b"x"]
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 10})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    first = prepare(config, tokenizer)
    write_jsonl(path, more := [*rows, *(row(f"More {number}") for number in range(7)), b"y"])
    second = prepare(config, tokenizer)
    assert (second.rows, second.rows_reused, second.reasons) == (34, 26, {"broken-json": 2})
    assert [entry.line for entry in Ledger(config.run.folder / "ledger.jsonl")] == [26, 34]
    fresh = prepare(make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 10, "facts": "fresh"}), tokenizer)
    assert fresh.facts.table.equals(second.facts.table)
    assert fresh.facts.sources[0].fingerprint == second.facts.sources[0].fingerprint != first.facts.sources[0].fingerprint
    more[3] = row("Another question 3")
    write_jsonl(path, more)
    third = prepare(config, tokenizer)
    assert third.rows_reused == 24  # all but the shard with the changed row
    assert load_sample(third.facts.address(3)).messages[0]["content"] == "Another question 3"
    assert [load_sample(third.facts.address(number)).line for number in range(len(third.facts))] == [*range(1, 26), *range(27, 34)]
    write_jsonl(path, rows)  # what was measured before is there still
    assert prepare(config, tokenizer).rows_reused == 26


HOLDER = """
import pickle, sys, time
from pathlib import Path
from eagle_train.config import parse_config
from eagle_train.data import prepare as module

folder = Path(sys.argv[1])
tokenizer = pickle.loads((folder / "tokenizer.pickle").read_bytes())
data = {"sources": {"s": {"annotation": "rows.jsonl"}}, "workers": 1, "shard_rows": 1}
config = parse_config({"run": {"name": "test"}, "data": data}, base=folder)

def wait(step):
    (folder / "began").touch()
    while not (folder / "go on").exists():
        time.sleep(0.05)

module.prepare(config, tokenizer, progress=wait)
"""


def test_two_at_once_are_refused(tmp_path, row, write_jsonl, make_config, tokenizer):
    import pickle

    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(tokenizer))
    (tmp_path / "holder.py").write_text(HOLDER)
    write_jsonl(tmp_path / "rows.jsonl", [row(), row("Other?")])
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 1})
    with subprocess.Popen([sys.executable, tmp_path / "holder.py", tmp_path]) as holder:
        deadline = time.monotonic() + 60
        while not (tmp_path / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(PrepareError, match=rf"is being prepared by process {holder.pid} on"):
            prepare(config, tokenizer)
        (tmp_path / "go on").touch()
        assert holder.wait(60) == 0
    assert prepare(config, tokenizer).rows_reused == 2


def test_a_row_that_is_not_there_any_more_is_named(tmp_path, rows):
    files = tables(tmp_path, rows)
    with pytest.raises(RowError, match="row 99 is not among them"):
        open_rows(str(files["parquet"])).get(99, 1)
    with pytest.raises(RowError):
        open_rows(str(files["jsonl"])).get(3, 10)
    assert files_of(Source(annotation=files["jsonl"]), tmp_path) == [str(files["jsonl"])]
