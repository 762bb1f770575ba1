"""The loss of each source is that of its samples one by one, whatever they were packed with."""

import pytest
import torch

from eagle_model.prompt import CachedEncoder
from eagle_train.config import ParallelConfig
from eagle_train.distributed.world import start_world
from eagle_train.loading.pack import load_pack
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training.build import build_model
from eagle_train.training.metrics import Metrics
from eagle_train.watching.trackers import scalars

STAGE = {"name": "one", "max_tokens": 640, "steps": 1, "packs_per_step": 12, "lr": 1e-3}


@pytest.mark.parametrize("weighting", ["sqrt", "token"])
@pytest.mark.parametrize("share_media", [False, True])
def test_losses_are_those_of_samples_one_by_one(colour_run, write_jsonl, row, tmp_path, weighting, share_media):
    torch.set_num_threads(1)
    # One image with several questions is a tree with share_media.
    write_jsonl(tmp_path / "same.jsonl", [row(f"<image>What is {n}?", "n" * (n + 1), image="1.png") for n in range(6)])
    sources = {name: {"annotation": f"{name}.jsonl"} for name in ("rows", "same")}
    options = {"data": {"sources": sources, "workers": 1}, "packing": {"share_media": share_media}}
    config = colour_run(stages=[STAGE | {"loss_weighting": weighting}], **options)
    ready = get_ready(config)
    train(ready, start_world(ParallelConfig(dtype="float32"), "cpu"))
    records = [record for record in Metrics(config.run.folder / "metrics.jsonl") if record["kind"] == "step"]
    assert len(records) == 1
    assert records[0]["losses"].keys() == {"rows", "same"}
    assert scalars(records[0])["train/losses/same"] == records[0]["losses"]["same"]

    model, [schedule] = build_model(config, ready.tokenizer), ready.schedules
    encoder = CachedEncoder(ready.tokenizer)
    sums = {name: [0.0, 0.0] for name in sources}
    plan, step = schedule.locate(0)
    for pack in plan.packs_of(step):
        for planned in plan.samples(pack):
            alone = load_pack([planned._replace(tree=None)], encoder, ready.spec, weighting=weighting).batch.to("cpu")
            with torch.no_grad():
                output = model(alone, token_losses=True)
            sums[planned.address.source][0] += float((output.token_losses * alone.token_weights).sum())
            sums[planned.address.source][1] += alone.label_weight
            assert float(output.loss) == pytest.approx(
                float((output.token_losses * alone.token_weights).sum()) / alone.label_weight, rel=1e-5
            )
    for name, (loss, weight) in sums.items():
        assert records[0]["losses"][name] == pytest.approx(loss / weight, rel=2e-5)
    total = sum(loss for loss, _ in sums.values()) / sum(weight for _, weight in sums.values())
    assert records[0]["loss"] == pytest.approx(total, rel=2e-5)


def test_a_run_of_one_source_says_it_once(colour_run):
    torch.set_num_threads(1)
    config = colour_run(stages=[STAGE])
    train(get_ready(config), start_world(ParallelConfig(dtype="float32"), "cpu"))
    assert all("losses" not in record for record in Metrics(config.run.folder / "metrics.jsonl") if record["kind"] == "step")
