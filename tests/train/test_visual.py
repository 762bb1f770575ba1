"""Visual plans over columns: the same as row by row, within the budget, and within what a real prompt costs."""

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_model.prompt import encode
from eagle_model.prompt.costs import FrameCosts, PromptCosts
from eagle_model.visual import FactColumns, VisualSpec, plan_columns
from eagle_sampling import Dropped, VideoRequest, plan, wanted_frames
from eagle_tiling import select_grid, tile_count
from eagle_train.data.facts import FactsSource
from eagle_train.data.prepare import prepare
from eagle_train.data.sample import load_sample
from eagle_train.planning.visual import plan_visual, sample_plan

SPEC = VisualSpec()

sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
videos = st.one_of(st.integers(1, 60), st.tuples(st.integers(1, 400), st.integers(1, 30)))
rows = st.fixed_dictionaries({"text": st.integers(1, 3000), "images": st.lists(sizes, max_size=4), "videos": st.lists(videos, max_size=3)})


@settings(deadline=None, max_examples=60)
@given(
    content=st.lists(rows, min_size=1, max_size=6),
    max_tokens=st.integers(500, 40000),
    strategy=st.sampled_from(["ads", "ads-fill"]),
    max_tiles=st.sampled_from([1, 4, 12, 20]),
    limit=st.sampled_from([None, 1, 5]),
)
def test_columns_equal_the_plan_of_each_row(make_facts, content, max_tokens, strategy, max_tiles, limit):
    source = FactsSource("all", "a", ".", 0, len(content), 0, 1.0, 1.0, limit)
    facts = make_facts(content, [source])
    spec = VisualSpec(strategy=strategy, max_frames=100, max_tiles=max_tiles)
    visual = plan_visual(facts, max_tokens, spec)
    caps = (max_tiles, *(cap for cap in (12, 8, 6, 4, 2, 1) if cap < max_tiles))
    for index, row in enumerate(content):
        costs = [
            [256 * tile_count(select_grid(*size, max_tiles=min(cap, limit or cap)), thumbnail=True) for cap in caps]
            for size in row["images"]
        ]
        requests = []
        for video in row["videos"]:
            frames, seconds = (video, None) if isinstance(video, int) else (video[0], video[0] / video[1])
            wanted = frames if seconds is None else max(wanted_frames(seconds, 2.0), 8)
            wanted = min(wanted, 100, frames)
            digits = len(str(wanted))
            column = 0 if seconds is None else len(f"{(video[0] - 1) / video[1]:.2f}") - 3
            requests.append(VideoRequest(wanted, min(8, frames), 256 + 20 + digits + column))
        expected = plan(row["text"], np.array(costs).reshape(-1, len(caps)), requests, max_tokens=max_tokens, caps=caps, strategy=strategy)
        if isinstance(expected, Dropped):
            assert visual.reasons[visual.status[index]] == expected.reason
            assert visual.tokens[index] == 0
            with pytest.raises(ValueError, match="was dropped"):
                sample_plan(facts, visual, index, spec)
            continue
        planned = sample_plan(facts, visual, index, spec)
        assert planned.tokens == expected.tokens <= max_tokens
        assert tuple(video.count for video in planned.videos) == expected.frames
        grids = [select_grid(*size, max_tiles=min(cap, limit or cap)) for size, cap in zip(row["images"], expected.image_caps)]
        assert list(planned.grids) == grids
        assert visual.tiles[index] == sum(tile_count(grid) for grid in grids) + sum(expected.frames)
        for video, wanted in zip(planned.videos, row["videos"]):
            if isinstance(wanted, int):
                assert video.times is None
                assert len(set(video.indices.tolist())) == video.count
                assert (video.indices[0], video.indices[-1]) == (0, wanted - 1 if video.count > 1 else 0)
            else:
                assert len(video.times) == video.count
                assert (np.diff(video.times) > 0).all()
                assert video.times * wanted[1] == pytest.approx(np.round(video.times * wanted[1]))


def test_tokenised_samples_fit_whatever_the_budget(tmp_path, row, picture, write_video, write_jsonl, make_config, tokenizer):
    (tmp_path / "a.png").write_bytes(picture(900, 500))
    write_video(tmp_path / "v.mp4", frames=150, fps=10)
    content = [
        row(video="v.mp4"),
        row("<video-2>, <image>, <video-1>", video=["v.mp4", {"path": "v.mp4", "start": 2.05, "end": 14.0}], image="a.png"),
        row("<document-1>", document=["a.png"] * 12),
    ]
    write_jsonl(tmp_path / "rows.jsonl", content)
    facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).facts
    spec, seen = VisualSpec(tile_size=64, tokens_per_tile=4), set()
    for max_tokens in range(500, 2600, 37):
        visual = plan_visual(facts, max_tokens, spec)
        for index in np.flatnonzero(visual.status == 0).tolist():
            planned = sample_plan(facts, visual, index, spec)
            sample = load_sample(facts.address(index))
            length = len(encode(planned.render(sample.messages, spec), tokenizer).input_ids)
            assert length <= planned.tokens <= max_tokens
            assert planned.tokens - length <= 8 + 3 * sum(video.count for video in planned.videos)
            seen.add((index, tuple(video.count for video in planned.videos)))
    assert len({counts for index, counts in seen if index == 1}) > 5
    clip = sample_plan(facts, visual, 1, spec).videos[1]
    assert clip.times[0] == pytest.approx(2.0)
    assert clip.shown[0] == 0.0
    assert clip.shown[-1] == pytest.approx(clip.times[-1] - 2.05)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(0, 5000), st.integers(1, 100_000)), min_size=1, max_size=20),
    st.floats(0.1, 30),
    st.one_of(st.none(), st.integers(8, 500)),
)
def test_wanted_frames_follow_the_rate(videos, fps, max_frames):
    count = len(videos)
    seconds, frames = (np.array(column) for column in zip(*videos))
    none, places = np.zeros(0, np.int64), np.arange(count + 1)
    zeros, seconds = np.zeros(count + 1, np.int64), seconds.astype(float)
    facts = FactColumns(np.ones(count, np.int64), zeros, none, none, None, places, frames, seconds, seconds)
    costs = FrameCosts(((20,) * 8,) * 8)
    for index, wanted in enumerate(plan_columns(facts, 1 << 40, VisualSpec(fps=fps, max_frames=max_frames), costs).wanted.tolist()):
        expected = max(wanted_frames(float(seconds[index]), fps), 8)
        assert wanted == min(expected if max_frames is None else min(expected, max_frames), frames[index])


def test_uniform_takes_a_fixed_number_of_frames(make_facts):
    facts = make_facts([{"text": 100, "videos": [video]} for video in ((1000, 10), (40, 10), (20, 10), 500)])
    for max_frames, frames in ((None, [32, 32, 20, 32]), (64, [64, 40, 20, 64])):
        spec = VisualSpec(strategy="uniform", max_frames=max_frames)
        assert plan_visual(facts, 65536, spec).frames.tolist() == frames


def test_speed(make_facts):
    rng = np.random.default_rng(0)
    content = [
        {"text": 100, "images": [(int(w), int(h))] if w % 3 else [], "videos": [] if w % 3 else [(300, 10)]}
        for w, h in rng.integers(100, 900, (2000, 2))
    ]
    small = make_facts(content)
    count = 100
    facts = replace(
        small,
        table=pa.concat_tables([small.table] * count).combine_chunks(),
        sources=(small.sources[0]._replace(rows=count * len(content)),),
    )
    start = time.process_time()
    visual = plan_visual(facts, 32768, SPEC)
    rate = len(visual.status) / (time.process_time() - start)
    assert rate > 300_000  # about 2 million rows a second on an idle core


def test_frame_costs_come_from_the_tokenizer(tokenizer):
    table = PromptCosts(tokenizer).frame_costs.table
    assert table[1][0] == len("Frame 1: ") + 2
    assert table[2][3] == len("Frame 10 sample at 100.00s: ") + 2
