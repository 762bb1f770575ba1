"""Prepare: facts are right, complete, resumable after any kill, and never stale."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from eagle_model.prompt import VideoSpan, encode, render
from eagle_model.prompt.costs import PromptCosts
from eagle_sampling import TimeTable
from eagle_train.config import ConfigError, dump_config
from eagle_train.data import join
from eagle_train.data.prepare import PrepareError, load_facts, prepare
from eagle_train.data.sample import RowError, load_sample
from eagle_train.data.source_plan import tokenizer_fingerprint
from eagle_train.data.sources import open_rows
from eagle_train.data.sources.index import index_file


@pytest.fixture
def media(tmp_path, picture, write_video):
    (tmp_path / "a.png").write_bytes(picture(64, 48))
    (tmp_path / "b.jpg").write_bytes(picture(300, 20, "JPEG"))
    write_video(tmp_path / "v.mp4", frames=30, fps=10)
    return tmp_path


@pytest.fixture
def rows(row):
    return [
        row(),
        row(image="a.png"),
        row("<image-2> and <image-1>", image=["a.png", "b.jpg"]),
        row(video="v.mp4"),
        row(video={"video": "v.mp4", "start_time": 0.5, "end_time": 1.5}),
        row("<document>?", document=["a.png", "b.jpg", "a.png"]),
    ]


def test_facts_are_what_the_rows_hold(media, rows, make_config, write_jsonl, tokenizer):
    write_jsonl(media / "rows.jsonl", rows)
    report = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer)
    facts = report.facts
    assert (report.rows, report.good_rows, report.bad_rows) == (6, 6, 0)
    assert facts.column("line").tolist() == [1, 2, 3, 4, 5, 6]
    offsets, widths = facts.lists("image_width")
    assert np.diff(offsets).tolist() == [0, 1, 2, 0, 0, 0]
    assert widths.tolist() == [64, 64, 300]
    assert facts.lists("image_height")[1].tolist() == [48, 48, 20]
    assert facts.lists("video_frames")[1].tolist() == [30, 10, 3]
    seconds = facts.lists("video_seconds")[1]
    assert seconds[:2] == pytest.approx([3.0, 1.0])
    assert np.isnan(seconds[2])
    assert facts.lists("video_last_time")[1][:2] == pytest.approx([2.9, 0.9])
    times = TimeTable.from_list(facts.table.column("video_times")[3].as_py()[0]).times()
    assert times == pytest.approx(np.arange(30) / 10)
    for index in range(6):
        sample = load_sample(facts.address(index))
        assert (sample.source, sample.line) == ("s", index + 1)
        assert sample.messages[-1] == {"role": "assistant", "content": "A square."}
    assert load_sample(facts.address(2)).images == (str(media / "a.png"), str(media / "b.jpg"))


def test_a_tiff_of_several_pages_is_a_document_of_its_own(tmp_path, row, make_config, write_jsonl, tokenizer):
    pages = [Image.new("RGB", (40 + number, 30)) for number in range(3)]
    pages[0].save(tmp_path / "three.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "one.tif")
    preview = Image.new("RGB", (4, 3))
    preview.encoderinfo = {"tiffinfo": {254: 1}}  # NewSubfileType: a reduced copy of another page
    pages[2].save(tmp_path / "photo.tif", save_all=True, append_images=[preview])
    documents = ["three.tif", ["one.tif", "one.tif"], {"document": "three.tif"}, ["one.tif", "three.tif"], ["photo.tif"]]
    rows = [row(document=document) for document in documents]
    rows += [row(image=name) for name in ("one.tif", "photo.tif", "three.tif")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    report = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer)
    assert report.facts.lists("video_frames")[1].tolist() == [3, 2, 3, 1]
    assert report.facts.lists("image_width")[1].tolist() == [41, 42]
    assert report.reasons == {"bad-image": 2}


def test_text_tokens_are_those_of_the_prompt(media, rows, make_config, write_jsonl, tokenizer):
    write_jsonl(media / "rows.jsonl", rows)
    facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}, prompt={"system": "Be brief."}), tokenizer).facts
    for index in range(3):  # without videos: exact
        sample = load_sample(facts.address(index))
        assert sample.messages[0] == {"role": "system", "content": "Be brief."}
        encoded = encode(render(sample.messages, images=[7] * len(sample.images)), tokenizer)
        assert facts.column("text_tokens")[index] == len(encoded.input_ids) - 7 * len(sample.images)
        assert facts.column("label_tokens")[index] == np.count_nonzero(encoded.labels != -100)
    sample = load_sample(facts.address(3))
    times = [0.0, 1.0, 2.9]
    exact = len(encode(render(sample.messages, videos=[VideoSpan(times, 1.0, 5)]), tokenizer).input_ids)
    bound = facts.column("text_tokens")[3] + 3 * (5 + facts.frame_costs.overhead(np.array([3]), np.array([2.9]))[0])
    assert exact <= bound <= exact + 8


def test_frame_costs_bound_every_frame(tokenizer):
    costs = PromptCosts(tokenizer)
    table = costs.frame_costs
    rng = np.random.default_rng(0)
    counts = np.array([1, 9, 10, 99, 100, 12345])
    for end in (0.0, 3.2, 9.994, 9.995, 9.999, 10.0, 99.996, 100.0, 4321.5):
        bound = table.overhead(counts, np.full(len(counts), end))
        for count, limit in zip(counts.tolist(), bound.tolist()):
            times = [end, *(rng.random(3) * end)]
            assert all(costs.frames_tokens([0.0] * (count - 1) + [time], 0) <= limit * count for time in times[: 1 if count > 999 else 4])
            assert limit >= costs.frame_tokens(count, end, 0)
    pages = table.overhead(np.array([5]), np.array([np.nan]))[0]
    assert pages * 5 >= costs.frames_tokens(None, 0, frames=5)


def test_second_run_finds_everything(media, rows, make_config, write_jsonl, tokenizer):
    write_jsonl(media / "rows.jsonl", rows)
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 2})
    first = prepare(config, tokenizer)
    seen = []
    second = prepare(config, tokenizer, progress=seen.append)
    assert (first.rows_reused, second.rows_reused) == (0, 6)
    assert second.facts.table.equals(first.facts.table)
    assert load_facts(config, tokenizer).table.equals(first.facts.table)
    assert [(step.rows_done, step.rows_total) for step in seen] == [(6, 6)]
    next((media / "runs/test/facts").glob("s-*/done-*.json")).unlink()  # a run that was killed at its very end
    third = prepare(config, tokenizer, progress=seen.append)
    assert (third.rows_reused, third.facts.table.equals(first.facts.table)) == (6, True)
    assert [(step.rows_done, step.rows_total) for step in seen[1:]] == [(2, 6), (4, 6), (6, 6)]


def test_key_covers_what_facts_depend_on(media, rows, make_config, write_jsonl, tokenizer):
    write_jsonl(media / "rows.jsonl", rows)
    entry = {"annotation": "rows.jsonl"}
    config = make_config({"s": entry})
    key = prepare(config, tokenizer).facts.key
    changes = [
        make_config({"s": entry}, prompt={"system": "Other."}),
        make_config({"s": entry}, data={"verify": "decode"}),
        make_config({"s": entry}, data={"limits": {"max_pixels": 10**7}}),
    ]
    assert len({key, *(prepare(changed, tokenizer).facts.key for changed in changes)}) == 4
    # What only plans depend on leaves the facts where they are.
    same = make_config({"s": {**entry, "repeat_time": 3, "weight": 2, "max_dynamic_tiles": 4}}, sampling={"fps": 1})
    report = prepare(same, tokenizer)
    assert (report.facts.key, report.rows_reused) == (key, 6)
    write_jsonl(media / "rows.jsonl", rows[:-1])
    with pytest.raises(PrepareError, match="eagle prepare"):
        load_facts(config, tokenizer)
    assert prepare(config, tokenizer).rows == 5


def test_fingerprint_sees_the_vocabulary(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["zebra"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(copy.deepcopy(tokenizer)) == tokenizer_fingerprint(tokenizer)


def test_processes_give_the_same_facts(media, rows, make_config, write_jsonl, tokenizer):
    broken = [b"{", row_without_answer()]
    write_jsonl(media / "rows.jsonl", (rows + broken) * 3)
    options = {"shard_rows": 5, "limits": {"max_bad_fraction": 1}}
    one = make_config({"s": {"annotation": "rows.jsonl"}}, data={**options, "facts": "one"})
    two = make_config({"s": {"annotation": "rows.jsonl"}}, data={**options, "facts": "two", "workers": 2})
    a, b = prepare(one, tokenizer), prepare(two, tokenizer)
    assert a.facts.table.equals(b.facts.table)
    assert (b.good_rows, b.bad_rows, b.reasons) == (18, 6, {"broken-json": 3, "no-assistant-turn": 3})


def row_without_answer():
    return {"conversations": [{"from": "human", "value": "?"}]}


def test_bad_rows_stop_the_run_with_reasons(tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row(image=f"missing{index}.png") if index % 10 == 0 else row() for index in range(1200)])
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 500})
    with pytest.raises(PrepareError, match=r"100 of 1000 rows.*\n  media-missing: 100 rows, for example s:1: .*missing0.png"):
        prepare(config, tokenizer)
    ledger = [json.loads(line) for line in (tmp_path / "runs/test/ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == 100
    assert prepare(make_config({"s": {"annotation": "rows.jsonl"}}, data={"limits": {"max_bad_fraction": 0.1}}), tokenizer).bad_rows == 120
    with pytest.raises(PrepareError, match="max_bad_rows allows 99"):
        prepare(make_config({"s": {"annotation": "rows.jsonl"}}, data={"limits": {"max_bad_rows": 99, "max_bad_fraction": 1}}), tokenizer)


def test_repaired_media_of_a_stopped_source_are_found(tmp_path, row, picture, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row(image=f"{index}.png") if index % 3 == 0 else row() for index in range(40)] + [b"", b"x"])
    (tmp_path / "0.png").write_bytes(picture())
    sources = {"s": {"annotation": "rows.jsonl"}}
    config = make_config(sources, data={"shard_rows": 16})
    with pytest.raises(PrepareError, match="Repair the rows or their media and run again"):
        prepare(config, tokenizer)
    for index in range(3, 40, 3):
        (tmp_path / f"{index}.png").write_bytes(picture())
    report = prepare(config, tokenizer)
    assert (report.good_rows, report.reasons, report.blank_lines, report.rows_reused) == (40, {"broken-json": 1}, 1, 0)
    fresh = prepare(make_config(sources, data={"shard_rows": 16, "facts": "fresh"}), tokenizer).facts
    assert report.facts.table.equals(fresh.table)
    assert report.facts.key == fresh.key


def test_repaired_media_of_a_complete_source_are_found_when_asked_for(tmp_path, row, picture, make_config, write_jsonl, tokenizer):
    rows = [row(image="a.png"), row(image="late.png"), row(image="later.png"), row(), row(answer="")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "a.png").write_bytes(picture(64, 48))
    config = make_config({"s": {"annotation": "rows.jsonl"}})
    before = prepare(config, tokenizer)
    assert before.reasons == {"media-missing": 2, "no-labels": 1}
    same = prepare(config, tokenizer, again=True)
    assert (same.facts.key, same.facts.table.equals(before.facts.table)) == (before.facts.key, True)
    (tmp_path / "late.png").write_bytes(picture(30, 20))
    (tmp_path / "a.png").write_bytes(picture(7, 7))  # what was good stays as it was measured
    assert prepare(config, tokenizer).facts.key == before.facts.key  # a run may be training on it
    after = prepare(config, tokenizer, again=True)
    assert (after.good_rows, after.reasons) == (3, {"media-missing": 1, "no-labels": 1})
    assert after.facts.column("line").tolist() == [1, 2, 4]
    assert after.facts.lists("image_width")[1].tolist() == [64, 30]
    assert after.facts.key != before.facts.key
    assert load_facts(config, tokenizer).key == after.facts.key


def test_the_verb_says_how_repaired_media_come_in(tmp_path, colour_run, capsys):
    from eagle_train.cli.prepare import prepare as verb

    (tmp_path / "run.yaml").write_text(dump_config(colour_run(rows=3)))
    (tmp_path / "0.png").rename(tmp_path / "away.png")
    verb(tmp_path / "run.yaml")
    assert "4 rows: 3 good" in (printed := capsys.readouterr().out)
    assert "not used because of their media: 1 row; repair the media, then run eagle prepare --again" in printed
    (tmp_path / "away.png").rename(tmp_path / "0.png")
    verb(tmp_path / "run.yaml", again=True)
    assert "4 rows: 4 good" in (printed := capsys.readouterr().out)
    assert "--again" not in printed


def test_an_unexpected_error_costs_its_row(tmp_path, row, picture, make_config, write_jsonl, tokenizer, monkeypatch):
    from eagle_train.data import measure

    def crash(ref, limits):
        raise KeyError("of a decoder")

    (tmp_path / "a.png").write_bytes(picture())
    write_jsonl(tmp_path / "rows.jsonl", [row(), row(image="a.png"), row()])
    config = make_config({"s": {"annotation": "rows.jsonl"}})
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure_image", crash)
        report = prepare(config, tokenizer)
    assert (report.good_rows, report.reasons) == (2, {"unexpected": 1})
    entry = json.loads((tmp_path / "runs/test/ledger.jsonl").read_text())
    assert (entry["line"], entry["detail"][:42]) == (2, "KeyError: 'of a decoder' (test_prepare.py:")
    assert prepare(config, tokenizer, again=True).good_rows == 3


def test_damaged_parts_are_made_again(media, rows, make_config, write_jsonl, tokenizer):
    """What a power loss may leave of files that were not on the disk."""
    write_jsonl(media / "rows.jsonl", rows)
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 1})
    facts = prepare(config, tokenizer).facts
    folder = next((media / "runs/test/facts").glob("s-*"))
    done = json.loads(next(folder.glob("done-*.json")).read_text())
    parts = [folder / name for name, _, _ in done["parts"]]
    parts[0].write_bytes(b"")
    parts[1].write_bytes(bytes(parts[1].stat().st_size))
    parts[2].write_bytes((whole := parts[2].read_bytes())[:-1000] + bytes(992) + whole[-8:])
    next(folder.glob("done-*.json")).write_bytes(bytes(100))
    next((media / "runs/test/facts/index").iterdir()).write_bytes(b"")
    with pytest.raises(PrepareError, match="no facts"):
        load_facts(config, tokenizer)
    again = prepare(config, tokenizer)
    assert (again.rows_reused, again.facts.table.equals(facts.table)) == (3, True)
    parts[0].write_bytes(b"")
    joined = next((media / "runs/test/facts/joined").glob("*.arrow"))
    joined.write_bytes(joined.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"part-\w+.parquet: can't be read .* remove the folder"):
        load_facts(config, tokenizer)


def test_joined_facts_are_those_of_the_parts(media, rows, make_config, write_jsonl, tokenizer, monkeypatch):
    """Whatever the number of record batches; a joined file that is damaged is made again."""
    write_jsonl(media / "rows.jsonl", rows)
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 1})
    facts = prepare(config, tokenizer).facts
    joined = next((media / "runs/test/facts/joined").glob("*.arrow"))
    for together, damage in ((2, lambda content: content[:-100]), (3, lambda content: b""), (512, lambda content: bytes(len(content)))):
        monkeypatch.setattr(join, "_TOGETHER", together)
        content = joined.read_bytes()
        joined.unlink()  # the facts above still map it
        joined.write_bytes(damage(content))
        again = load_facts(config, tokenizer)
        assert again.table.column("line").num_chunks == -(-len(rows) // together)
        assert again.table.equals(facts.table)
        assert (again.column("line").tolist(), again.content) == ([1, 2, 3, 4, 5, 6], facts.content)
        for name in ("image_width", "video_frames", "video_seconds"):
            assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(again.lists(name), facts.lists(name), strict=True))


def test_media_that_changed_change_the_joined_facts(media, rows, make_config, write_jsonl, tokenizer):
    """The key of the facts doesn't cover media; what was joined before is never taken for what was measured anew."""
    write_jsonl(media / "rows.jsonl", rows)
    config = make_config({"s": {"annotation": "rows.jsonl"}})
    before = prepare(config, tokenizer).facts
    Image.new("RGB", (31, 17)).save(media / "a.png")
    shutil.rmtree(next((media / "runs/test/facts").glob("s-*")))
    after = prepare(config, tokenizer).facts
    assert (after.key, after.content == before.content) == (before.key, False)
    assert (31 in after.lists("image_width")[1].tolist(), 31 in before.lists("image_width")[1].tolist()) == (True, False)


def test_sources_are_apart_whatever_their_names(tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row(), b"x"])
    entry = {"annotation": "rows.jsonl"}
    facts = prepare(make_config({"Bäume": entry, "Baume ": entry, "Büume": entry}), tokenizer).facts
    assert [source.rows for source in facts.sources] == [1, 1, 1]
    ledger = [json.loads(line)["source"] for line in (tmp_path / "runs/test/ledger.jsonl").read_text().splitlines()]
    assert ledger == ["Bäume", "Baume ", "Büume"]


def test_a_handful_of_bad_rows_is_no_share(tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row(), row(image="missing.png")])
    assert prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).bad_rows == 1
    with pytest.raises(PrepareError, match="1 of 2 rows"):
        prepare(make_config({"s": {"annotation": "rows.jsonl"}}, data={"limits": {"max_bad_fraction": 0}}), tokenizer)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"", r"source other: .*other.jsonl: no rows"),
        (b"\n\n", r"source other: .*other.jsonl: no rows"),
        (b"<!DOCTYPE html><html>404</html>\n", r"source other: its row can't be used; (.|\n)*broken-json: 1 row"),
        (b"{\n{\n", r"source other: all of its 2 rows can't be used; (.|\n)*broken-json: 2 rows"),
    ],
)
def test_a_source_without_a_usable_row_stops(tmp_path, row, make_config, write_jsonl, tokenizer, lines, message):
    """A failed download must not become a run without that source."""
    write_jsonl(tmp_path / "rows.jsonl", [row(), row()])
    (tmp_path / "other.jsonl").write_bytes(lines)
    sources = {"s": {"annotation": "rows.jsonl"}, "other": {"annotation": "other.jsonl"}}
    with pytest.raises(PrepareError, match=message):
        prepare(make_config(sources), tokenizer)
    assert prepare(make_config(sources, data={"limits": {"max_bad_fraction": 1}}), tokenizer).good_rows == 2


def test_recipe_length_is_compared(tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row()])
    (tmp_path / "recipe.json").write_text(json.dumps({"s": {"annotation": "rows.jsonl", "root": "", "length": 7}}))
    report = prepare(make_config({}, data={"recipe": "recipe.json"}), tokenizer)
    assert report.notes == ("source s: the recipe says length 7, the annotation file has 1 rows",)


def test_held_out_sources_are_apart(tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row(), b"x"])
    write_jsonl(tmp_path / "held.jsonl", [row(), row(), b"y"])
    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"eval_sources": {"h": {"annotation": "held.jsonl"}}})
    assert (prepare(config, tokenizer).good_rows, prepare(config, tokenizer, evaluation=True).good_rows) == (1, 2)
    where = [json.loads(line)["where"] for line in (tmp_path / "runs/test/ledger.jsonl").read_text().splitlines()]
    assert sorted(where) == ["prepare", "prepare eval"]


def test_lines_are_found_whatever_their_ends(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n{"b": 2}\n   \n{"c": "' + b"x" * 5000 + b'"}\n{"d": 4}'
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for shard_rows in (1, 2, 3, 100):
        index = index_file(str(path), shard_rows, tmp_path / f"cache{shard_rows}")
        lines = [line for shard in index.shards for line in open_rows(str(path)).read(shard, 100)]
        assert index.rows == 6
        assert [line.content for line in lines if not isinstance(line.content, RowError)] == [{"a": 1}, None, {"b": 2}, None, {"d": 4}]
        assert isinstance(lines[4].content, RowError)
        for start, size, line in lines:
            if isinstance(line, dict):
                assert open_rows(str(path)).get(start, size) == line
        assert index_file(str(path), shard_rows, tmp_path / f"cache{shard_rows}") == index


def test_json_array_is_read_whatever_its_name(tmp_path, row, make_config, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps([row()]))
    assert prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).good_rows == 1
    (tmp_path / "rows.jsonl").write_text(json.dumps([row()])[:-1])
    with pytest.raises(ConfigError, match="has no end; the file is cut off"):
        prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, row, make_config, write_jsonl, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [row()] * 4)

    def change(step):
        write_jsonl(path, [row("Longer than before?")] * 4)

    config = make_config({"s": {"annotation": "rows.jsonl"}}, data={"shard_rows": 2})
    with pytest.raises(PrepareError, match="changed while it was being read"):
        prepare(config, tokenizer, progress=change)
    assert prepare(config, tokenizer).good_rows == 4


def test_planning_and_preparing_load_no_torch():
    code = "import sys, eagle_train.data.prepare, eagle_train.planning.stages, eagle_train.watching.show; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_sources_without_good_rows_keep_their_place(tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "bad.jsonl", [b"x"])
    write_jsonl(tmp_path / "good.jsonl", [row(), row()])
    names = ("empty", "bad", "good", "last")
    files = {"last": "empty"}
    data = {"limits": {"max_bad_fraction": 1}}  # otherwise refused
    report = prepare(make_config({name: {"annotation": f"{files.get(name, name)}.jsonl"} for name in names}, data=data), tokenizer)
    assert [(source.name, source.first, source.rows, source.bad_rows) for source in report.facts.sources] == [
        ("empty", 0, 0, 0),
        ("bad", 0, 0, 1),
        ("good", 0, 2, 0),
        ("last", 2, 0, 0),
    ]
    assert [report.facts.source_of(index).name for index in range(2)] == ["good", "good"]
    assert report.facts.lists("image_width")[0].tolist() == [0, 0, 0]
    nothing = prepare(make_config({"empty": {"annotation": "empty.jsonl"}}, data=data), tokenizer)
    assert (len(nothing.facts), nothing.rows) == (0, 0)
    assert nothing.facts.lists("video_seconds")[0].tolist() == [0]
