"""One path from media to tokens: for any row, strategy and budget, training, the processor and `eagle show` see the same sample.

Ids, labels, frame times and pixels of the processor equal those that the loader makes, and both equal what is shown.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from eagle_model import EagleProcessor
from eagle_model.prompt import CachedEncoder
from eagle_model.visual import BudgetError, VisualSpec
from eagle_train.data.prepare import prepare
from eagle_train.data.sample import load_sample
from eagle_train.loading.pack import load_pack
from eagle_train.planning.stages import Planned
from eagle_train.planning.visual import plan_visual, sample_plan
from eagle_train.watching.show import picture_of, view_sample
from tests.support.media import random_image

K = 4
IMAGES = {"wide.png": (300, 80), "tall.jpg": (60, 200), "small.png": (20, 20), "turned.jpg": (90, 50)}

images = st.sampled_from(sorted(IMAGES))
bounds = st.sampled_from([{}, {"start": 0.35}, {"end": 2.0}, {"start": 1.05, "end": 2.4}])
files = st.builds(lambda name, clip: {"path": name, **clip}, st.sampled_from(["even.mp4", "slow.mp4"]), bounds)
rates = st.sampled_from([{}, {"fps": 3}, {"fps": 29.97}, {"fps": 2, "start": 0.6}, {"fps": 2, "start": 0.4, "end": 2.5}])
frames = st.builds(lambda names, rate: {"frames": names, **rate}, st.lists(images, min_size=3, max_size=12), rates)
clips = st.one_of(files, frames)
documents = st.one_of(
    st.sampled_from(["pages.pdf", {"document": "pages.tif"}]), st.lists(images, min_size=1, max_size=12).map(lambda pages: {"pages": pages})
)
rows = st.fixed_dictionaries(
    {"images": st.lists(images, max_size=3), "videos": st.lists(clips, max_size=2), "documents": st.lists(documents, max_size=2)}
)
specs = st.builds(
    VisualSpec,
    tile_size=st.just(32),
    tokens_per_tile=st.just(K),
    max_tiles=st.sampled_from([1, 4, 12]),
    thumbnail=st.booleans(),
    strategy=st.sampled_from(["ads", "ads-fill", "uniform"]),
    fps=st.sampled_from([1.0, 2.0, 7.5]),
    min_frames=st.sampled_from([1, 2, 8]),
    max_frames=st.sampled_from([None, 9, 20]),
    placement=st.sampled_from(["linspace", "center"]),
)


@pytest.fixture(scope="module")
def media(tmp_path_factory, write_video):
    folder = tmp_path_factory.mktemp("media")
    for seed, (name, size) in enumerate(IMAGES.items()):
        picture = random_image(seed, size)
        exif = Image.Exif()
        if name == "turned.jpg":
            exif[0x0112] = 6
        picture.save(folder / name, exif=exif)
    write_video(folder / "even.mp4", frames=40, fps=10)
    write_video(folder / "slow.mp4", frames=9, fps=3)
    for name in ("pages.pdf", "pages.tif"):
        pages = [Image.new("RGB", (120, 160), (40 * index, 200, 100)) for index in range(5)]
        pages[0].save(folder / name, save_all=True, append_images=pages[1:])
    return folder


def written(content: dict) -> dict:
    """A row with every medium mentioned in its text, the images last."""
    text = "".join(
        f"{kind} <{kind}-{number}> " for kind in ("document", "video", "image") for number in range(1, len(content[f"{kind}s"]) + 1)
    )
    turns = [{"from": "human", "value": text + "What 1 or 23?"}, {"from": "gpt", "value": "An answer."}]
    named = {kind: content[f"{kind}s"] for kind in ("image", "video", "document") if content[f"{kind}s"]}
    return named | {"conversations": turns}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(rows, min_size=1, max_size=4), spec=specs, budget=st.integers(250, 3000), system=st.sampled_from([None, "Be brief."])
)
@example(
    contents=[
        {
            "images": ["wide.png", "turned.jpg"],
            "videos": [{"path": "even.mp4", "start": 0.35}, {"frames": ["wide.png"] * 7, "fps": 1.5}, {"path": "slow.mp4"}],
            "documents": ["pages.pdf", {"document": "pages.tif"}, {"pages": ["tall.jpg"] * 9}],
        }
    ],
    spec=VisualSpec(tile_size=32, tokens_per_tile=K, min_frames=2),
    budget=1500,
    system=None,
)
def test_training_the_processor_and_show_agree(media, write_jsonl, make_config, tokenizer, contents, spec, budget, system):
    write_jsonl(media / "rows.jsonl", [written(content) for content in contents])
    config = make_config({"s": {"annotation": str(media / "rows.jsonl")}}, prompt={"system": system}, data={"workers": 1})
    facts = prepare(config, tokenizer).facts
    plans = plan_visual(facts, budget, spec)
    processor = EagleProcessor(tokenizer, **spec.to_dict(), system_prompt=system)
    encoder = CachedEncoder(tokenizer)
    assert len(facts) == len(contents)
    for row in range(len(facts)):
        sample = load_sample(facts.address(row))
        messages = [message for message in sample.messages if message["role"] != "system"]
        if plans.status[row]:
            with pytest.raises(BudgetError) as error:
                processor.process(messages, sample.images, sample.videos, max_tokens=budget)
            assert error.value.reason == plans.reasons[plans.status[row]]
            continue
        plan = sample_plan(facts, plans, row, spec)
        batch = load_pack([Planned(facts.address(row), plan)], encoder, spec, weighting="token").batch
        made = processor.process(messages, sample.images, sample.videos, max_tokens=budget)
        assert made.input_ids.tolist() == batch.input_ids.tolist()
        assert made.labels[1:].tolist() == batch.targets[:-1].tolist()
        assert np.array_equal(made.tiles, batch.tiles)
        assert len(made.input_ids) <= plan.tokens <= budget

        shown = view_sample(sample, plan, spec, tokenizer, budget=budget)
        assert not [note for note in shown.notes if "pictured" not in note]
        assert (shown.length, shown.labels) == (len(batch.input_ids), batch.num_kept)
        assert shown.image + shown.frame == K * len(batch.tiles)
        pictures = [picture.data for piece in shown.pieces for picture in piece.pictures]
        tiles = [picture_of(tile) for tile in batch.tiles]
        if shown.notes:  # of many frames only some are pictured, in their order
            rest = iter(tiles)
            assert all(picture in rest for picture in pictures)
        else:
            assert pictures == tiles
        times = [f"{time:.2f} s" for video in plan.videos if video.shown is not None for time in video.shown]
        captions = [piece.text for piece in shown.pieces if piece.kind == "frame" and piece.text.endswith(" s")]
        assert sorted(captions) == sorted(times)
        for time in times:
            assert f"sample at {time.removesuffix(' s')}s: " in tokenizer.decode(batch.input_ids)
