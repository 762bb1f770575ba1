"""`on_damage` of a source: damaged frames are refused, or trained as the decoder makes them; then they are listed and counted."""

import json
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from eagle_model.prompt import CachedEncoder
from eagle_model.visual import describe_concealed, read_tiles_into
from eagle_sampling import probe, read_frames
from eagle_train.cli.tables import rows_line
from eagle_train.data.ledger import Ledger
from eagle_train.data.prepare import prepare
from eagle_train.data.sample import load_sample
from eagle_train.distributed.world import start_world
from eagle_train.loading.pack import Share, load_pack
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.metrics import Metrics
from eagle_train.watching.report import summary


@pytest.fixture
def broken_run(colour_run, tmp_path):
    """A run whose last row, number 4, is a video with a slice of zeros in its second group of pictures."""

    def make(**source):
        both = {"annotation": "rows.jsonl", **source}
        name = "-".join(["run", *map(str, source.values())])
        stages = [{"name": "one", "max_tokens": 900, "epochs": 2, "packs_per_step": 1, "lr": 1e-3}]
        held_out = {"held": {"annotation": "held.jsonl", **source}}
        data = {"sources": {"rows": both}, "eval_sources": held_out, "workers": 1, "limits": {"max_bad_fraction": 1.0}}
        config = colour_run(rows=3, run={"name": name}, data=data, stages=stages, sampling={"fps": 10})
        (tmp_path / "held.jsonl").write_text((tmp_path / "rows.jsonl").read_text().splitlines()[-1] + "\n")
        return config

    def damage():
        path = tmp_path / "clip.mp4"
        content = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            packet = bytes([one for one in container.demux(video=0) if one.size][13])
        place = content.index(packet) + len(packet) // 2
        content[place : place + 40] = bytes(40)
        path.write_bytes(content)
        return path

    return make, damage


def test_refused_by_default_and_concealed_on_request(broken_run):
    make, damage = broken_run
    for on_damage in ("refuse", "conceal"):
        config = make(**({"on_damage": on_damage} if on_damage == "conceal" else {}))
        damage()
        ready = get_ready(config)
        trainer = train(ready, start_world(config.parallel, "cpu")).trainer
        records = [record for record in Metrics(config.run.folder / "metrics.jsonl") if record["kind"] == "step"]
        entries = list(Ledger(config.run.folder / "ledger-train.jsonl"))
        report, line = summary(config.run.folder), rows_line(ready.schedules, trainer.missing, trainer.concealed)
        assert {(entry.source, entry.line, entry.where) for entry in entries} == {("rows", 4, "train")}
        assert len(entries) == 2  # in both epochs
        if on_damage == "refuse":
            assert {entry.reason for entry in entries} == {"unreadable"}
            assert (records[-1]["seen_missing"], records[-1]["seen_concealed"]) == (2, 0)
            assert "concealed" not in report + line
            continue
        assert {entry.reason for entry in entries} == {"concealed"}
        frames = [int(entry.detail.split()[0]) for entry in entries]
        assert records[-1]["seen_missing"] == 0
        assert records[-1]["seen_concealed"] == trainer.concealed == sum(frames) == sum(record["concealed"] for record in records) > 0
        assert "clip.mp4 at 1." in entries[0].detail
        assert f"{sum(frames)} damaged frames concealed" in report
        assert f"{sum(frames)} damaged frames concealed by the decoder" in line
        assert trainer.evaluations.failed == []


def test_pixels_are_the_decoders_and_every_share_lists_its_own(broken_run):
    make, damage = broken_run
    config = make(on_damage="conceal")
    path = damage()
    ready = get_ready(config)
    [schedule] = ready.schedules
    plan = schedule.plan(0)
    [pack] = [place for place in range(plan.packs) if 3 in plan.rows_of(place)]
    samples = plan.samples(pack)
    load = partial(load_pack, samples, CachedEncoder(ready.tokenizer), ready.spec)
    whole = load()
    parts = [load(share=Share(rank, 3)) for rank in range(3)]
    assert np.array_equal(np.concatenate([part.batch.tiles for part in parts]), whole.batch.tiles)
    assert sum(part.concealed_frames for part in parts) == whole.concealed_frames > 0
    [planned] = [planned for planned in samples if planned.address.line == 4]
    sample = load_sample(planned.address)
    tiles = np.empty((planned.plan.tile_count(ready.spec), *whole.batch.tiles.shape[1:]), np.uint8)
    concealed = read_tiles_into(tiles, sample.messages, sample.images, sample.videos, planned.plan, ready.spec)
    assert len(concealed) == whole.concealed_frames
    assert whole.concealed[0].detail == describe_concealed(concealed)
    shown = read_frames(path, planned.plan.videos[0].times, tiles.shape[1], on_damage="conceal")
    assert np.array_equal(tiles, shown.pixels)
    assert [frame.time for frame in concealed] == [error.time for error in shown.concealed]
    assert {frame.time for frame in concealed} <= set(probe(path).times.times())


def test_prepare_decodes_by_the_same_rule(broken_run, tmp_path, tokenizer):
    make, damage = broken_run
    for on_damage, good in (("refuse", 3), ("conceal", 4)):
        config = make(on_damage=on_damage)
        damage()
        config = config.replaced(data=config.data.replaced(verify="decode"))
        report = prepare(config, tokenizer)
        assert report.good_rows == good
        entries = [json.loads(line) for line in Path(config.run.folder / "ledger.jsonl").read_text().splitlines()]
        assert {(entry["line"], entry["reason"]) for entry in entries} == ({(4, "bad-video")} if on_damage == "refuse" else set())
