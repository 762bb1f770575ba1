"""Plans on disk: what a rank maps is what it would have planned, and the name covers all that a plan follows from."""

from dataclasses import fields, replace

import numpy as np
import pytest

from eagle_model.visual import VisualSpec
from eagle_sampling import register_strategy
from eagle_sampling.budget import STRATEGIES
from eagle_train.config import StageConfig
from eagle_train.data.prepare import load_facts, prepare
from eagle_train.planning import stages, stored
from eagle_train.planning.stages import StageSchedule

SPEC = VisualSpec(tile_size=32, tokens_per_tile=4, min_frames=2)


@pytest.fixture
def made(tmp_path, row, picture, write_video, make_config, write_jsonl, tokenizer):
    """A prepared configuration: text, images and a video; some rows are too long, two share an image."""
    (tmp_path / "a.png").write_bytes(picture(200, 90))
    write_video(tmp_path / "v.mp4", frames=30, fps=10)
    rows = [row(f"Question {number} " + "long " * (number % 40) * 10) for number in range(60)]
    rows += [row("<image>?", image="a.png"), row("<image>?", image="a.png"), row("<video>?", video="v.mp4")]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def make(**packing):
        sections = {"stages": [{"name": "s", "max_tokens": 1200, "packs_per_step": 3, "epochs": 2}], "packing": packing}
        return make_config({"s": {"annotation": "rows.jsonl", "repeat_time": 1.5}}, **sections)

    prepare(make(), tokenizer)
    return make


def schedule(config, tokenizer, folder=True, stage=None, spec=SPEC):
    facts = load_facts(config, tokenizer)
    return StageSchedule(facts, config, stage or config.stages[0], spec, folder=config.facts_folder / "plans" if folder else None)


@pytest.mark.parametrize("share_media", [False, True])
def test_mapped_plans_are_those_made_here(made, tokenizer, monkeypatch, share_media):
    config = made(share_media=share_media)
    here, first = schedule(config, tokenizer, folder=False), schedule(config, tokenizer)
    monkeypatch.setattr(stages, "plan_stage", lambda *_, **__: pytest.fail("planned again"))
    monkeypatch.setattr(stored, "plan_visual", lambda *_, **__: pytest.fail("planned again"))
    mapped = schedule(config, tokenizer)
    assert first.steps == mapped.steps == here.steps
    for epoch in range(2):
        a, b = here.plan(epoch), mapped.plan(epoch)
        assert all(np.array_equal(array, b.arrays()[name]) for name, array in a.arrays().items())
        assert a.summary() == b.summary()
        assert list(a.drops()) == list(b.drops())
        assert list(a.drops())
        assert [len(a.samples(pack)) for pack in range(a.packs)] == [len(b.samples(pack)) for pack in range(b.packs)]
    for field in fields(here.visual):
        one, two = getattr(here.visual, field.name), getattr(mapped.visual, field.name)
        assert np.array_equal(one, two) if isinstance(one, np.ndarray) else one == two
    assert not mapped.visual.tokens.flags.owndata


def test_everything_that_changes_a_plan_changes_its_name(made, tokenizer, row, tmp_path, write_jsonl):
    config = made()
    folder = config.facts_folder / "plans"

    def names():
        return {path.name for path in folder.glob("*epoch-0*.plan")}

    schedule(config, tokenizer)
    count = len(names())
    assert count == 1
    stage = config.stages[0]
    changed = {
        "seed": (config.model_copy(update={"run": config.run.model_copy(update={"seed": 9})}), stage, SPEC),
        "packs": (config, stage.model_copy(update={"packs_per_step": 2}), SPEC),
        "weights": (config, stage.model_copy(update={"sources": {"s": 0.5}}), SPEC),
        "tokens": (config, stage.model_copy(update={"max_tokens": 1500}), SPEC),
        "name": (config, stage.model_copy(update={"name": "other"}), SPEC),
        "spec": (config, stage, replace(SPEC, fps=1.0)),
        "share": (made(share_media=True), stage, SPEC),
    }
    for what, (other, its_stage, spec) in changed.items():
        schedule(other, tokenizer, stage=its_stage, spec=spec)
        assert len(names()) == (count := count + 1), what
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b'{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}\n')
    prepare(config, tokenizer)
    assert schedule(config, tokenizer).plan(0).rows()[-1] == len(load_facts(config, tokenizer)) - 1
    assert len(names()) == count + 1


def test_a_moved_run_folder_keeps_its_plans(made, tokenizer):
    facts = load_facts(made(), tokenizer)
    moved = replace(facts, sources=tuple(source._replace(root="elsewhere", annotation="elsewhere") for source in facts.sources))
    options = {"seed": 0, "epoch": 0, "share_media": False}
    stage = StageConfig(name="s", max_tokens=1000)
    assert len({stored.epoch_file(made().facts_folder, each, stage, SPEC, **options) for each in (facts, moved)}) == 1


def test_plans_of_a_strategy_of_the_program_are_not_kept(made, tokenizer):
    register_strategy("own", lambda *given: STRATEGIES["ads"].choose(*given))
    try:
        config = made()
        plan = schedule(config, tokenizer, spec=replace(SPEC, strategy="own")).plan(0)
        assert plan.packs
        assert not (config.facts_folder / "plans").exists()
    finally:
        del STRATEGIES["own"]
