"""The Ray executor: the result of local processes, also when a node dies midway."""

import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

from eagle_train.curate.answers import NoAnswer
from eagle_train.curate.embed import embed
from eagle_train.curate.settings import parse_curation
from eagle_train.curate.shown import Shown, jpegs
from eagle_train.curate.split import split
from eagle_train.executors import call_on_ray, map_items
from tests.train.curate.conftest import ENCODER, film


def write_slowly(item):
    """Write the item's file at the end of half a second."""
    time.sleep(0.5)
    Path(item).write_text("done")


@pytest.mark.slow
def test_a_node_that_dies_costs_no_item(tmp_path, cluster):
    found, second = cluster
    items = [str(tmp_path / f"{number}.txt") for number in range(16)]
    done = []
    for item, _ in map_items(write_slowly, items, executor="ray"):
        done.append(item)
        if len(done) == 3:
            threading.Thread(target=found.remove_node, args=(second,), kwargs={"allow_graceful": False}).start()
    assert sorted(done) == sorted(items)
    assert all(Path(item).read_text() == "done" for item in items)


@pytest.mark.slow
def test_split_on_ray_gives_what_local_processes_give(tmp_path, cluster):
    for number in range(4):
        film(tmp_path / f"{number}.mp4", [20, 15], first_seed=10 * number)
    content = {"videos": ["*.mp4"], "workers": 1}
    here = split(parse_curation({**content, "folder": "here"}, base=tmp_path))
    there = split(parse_curation({**content, "folder": "there", "executor": "ray"}, base=tmp_path))
    assert there.equals(here)


@pytest.mark.slow
def test_embed_on_ray_gives_what_local_processes_give(tmp_path, cluster):
    for number in range(3):
        film(tmp_path / f"{number}.mp4", [20, 15], first_seed=10 * number)
    content = {"videos": ["*.mp4"], "workers": 1, "embed": {"encoder": ENCODER}}
    tables = []
    for folder, executor in (("here", "local"), ("there", "ray")):
        config = parse_curation({**content, "folder": folder, "executor": executor}, base=tmp_path)
        split(config)
        tables.append(embed(config))
    assert tables[1].equals(tables[0])


@pytest.mark.slow
def test_frames_of_annotate_are_read_on_ray(tmp_path, cluster):
    film(tmp_path / "a.mp4", [20])
    shown = Shown(str(tmp_path / "a.mp4"), "content", (0.0, 1.0), 64)
    read = call_on_ray(jpegs)
    assert read(shown) == jpegs(shown)
    with pytest.raises(NoAnswer, match="gone") as problem:
        read(shown._replace(video=str(tmp_path / "gone.mp4")))
    assert problem.value.reason == "bad-frames"
