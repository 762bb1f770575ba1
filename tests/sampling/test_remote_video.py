"""Parts of remote videos: what is transferred of each container, and that frames and times are those of the local file."""

import av
import numpy as np
import pytest

from eagle_sampling import probe, read_frames, register_opener
from eagle_sampling.limits import DEFAULT_LIMITS
from eagle_sampling.video.containers.demux import read_packets
from eagle_sampling.video.containers.matroska import read_header, read_matroska
from eagle_sampling.video.containers.matroska_parts import walk_blocks
from eagle_sampling.video.containers.source import Source
from tests.support import media

BLOCK = 1 << 16  # as the cache of eagle_train keeps them


class Counted:
    """A file whose blocks are counted once each, as a cache transfers them."""

    def __init__(self, path, sent):
        self.content, self.sent = path.read_bytes(), sent
        self.size = len(self.content)

    def read(self, offset, size):
        if size:
            self.sent.update(range(offset // BLOCK, (offset + size - 1) // BLOCK + 1))
        return self.content[offset : offset + size]

    def close(self):
        pass


@pytest.fixture
def sent():
    """Numbers of the blocks that were transferred of the file of `counted://PATH`."""
    blocks = set()
    from pathlib import Path

    register_opener("counted", lambda address: Counted(Path(address.removeprefix("counted://")), blocks))
    yield blocks
    register_opener("counted", None)


def film(folder, name, codec="libx264", options=None, mux=None, count=150, audio=False):
    """Noise, 15 s with a group of pictures of 1 s: about 2 MB."""
    frames = [media.random_pixels(number, (240, 176)) for number in range(count)]
    options = {"libx264": {"g": "10", "preset": "ultrafast", "qp": "36"}}.get(codec, {"g": "10"}) | (options or {})
    path = folder / name
    if not audio:
        return media.write_video(path, frames, 10, options, mux or {}, codec=codec)
    raise NotImplementedError


def address(path):
    return f"counted://{path}"


@pytest.fixture(scope="module")
def mkv(tmp_path_factory):
    return film(tmp_path_factory.mktemp("mkv"), "v.mkv")


def test_matroska_is_read_by_its_cues(sent, mkv):
    size, times = mkv.stat().st_size, probe(mkv).times.times()
    assert size > 20 * BLOCK
    assert probe(address(mkv), exact=False).keyframe_times.tolist() == probe(mkv, exact=False).keyframe_times.tolist()
    assert len(sent) <= 3
    wanted = times[[75, 104]] + 0.03
    found, local = read_frames(address(mkv), wanted), read_frames(mkv, wanted)
    assert len(sent) * BLOCK < size / 2, (len(sent) * BLOCK, size)
    assert np.array_equal(found.pixels, local.pixels)
    assert np.array_equal(found.times, local.times)
    print(size, len(sent) * BLOCK)


def test_avi_is_read_by_its_index(sent, tmp_path):
    path = film(tmp_path, "v.avi", "mpeg4")
    size, local = path.stat().st_size, probe(path)
    info = probe(address(path))
    print(size, len(sent) * BLOCK, read_packets(address(path), DEFAULT_LIMITS).offsets)
    sent.clear()
    info = probe(address(path))
    print(size, len(sent) * BLOCK)
    assert facts(info) == facts(local)
    wanted = info.times.times()[[75, 104]] + 0.03
    found, same = read_frames(address(path), wanted), read_frames(path, wanted)
    print(size, len(sent) * BLOCK)
    assert np.array_equal(found.pixels, same.pixels)
    assert np.array_equal(found.times, same.times)


def facts(info):
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(info).items() if name not in ("path", "times")} | {
        "times": info.times.times().tolist()
    }
