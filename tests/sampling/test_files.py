"""Media by address: every reader takes what a registered opener opens, and nothing else."""

import io
import tarfile

import numpy as np
import pytest

from eagle_sampling import MediaError, MediaUnavailable, image_size, open_image, page_count, probe, read_bytes, read_frames, register_opener
from eagle_sampling.images import exists
from tests.support import media


class InMemory:
    def __init__(self, content):
        self.content, self.size = content, len(content)

    def read(self, offset, size):
        return self.content[offset : offset + size]

    def close(self):
        pass


@pytest.fixture
def files():
    """Content by address, read as `here://`."""
    content = {}

    def opener(address):
        if content.get(address) is None:
            raise MediaError(f"{address}: is not there") from FileNotFoundError(address)
        if content[address] == "down":
            raise MediaUnavailable(f"{address}: no answer")
        return InMemory(content[address])

    register_opener("here", opener)
    yield content
    register_opener("here", None)


def test_images_and_members_of_tars(files, tmp_path):
    picture = media.random_image(0, (300, 200))
    data = files["here://a.png"] = media.encoded(picture)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo("x/a.png")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    files["here://a.tar"] = stream.getvalue()
    for ref in ("here://a.png", {"tar": "here://a.tar", "member": "x/a.png"}):
        assert image_size(ref) == image_size(ref, root=tmp_path) == (300, 200)
        assert open_image(ref, root=tmp_path).tobytes() == picture.tobytes()
        assert read_bytes(ref) == data
        assert exists(ref)
    assert not exists("here://none.png")
    with pytest.raises(MediaError, match="is not there"):
        image_size("here://none.png")
    pages = [media.random_image(number) for number in range(3)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    files["here://pages.tiff"] = (tmp_path / "pages.tiff").read_bytes()
    assert page_count("here://pages.tiff") == 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_videos(files, tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    codec = "mpeg4" if suffix == "avi" else "libx264"
    media.write_video(path, (media.random_pixels(number, (64, 48)) for number in range(12)), 10, {}, {}, codec=codec)
    address = f"here://v.{suffix}"
    files[address] = path.read_bytes()
    info = probe(address)
    assert np.array_equal(info.times.times(), probe(path).times.times())
    chosen = info.times.times()[[2, 9]]
    assert np.array_equal(read_frames(address, chosen).pixels, read_frames(path, chosen).pixels)


def test_storage_that_fails_is_not_a_damaged_file(files):
    files["here://a.png"] = files["here://a.mp4"] = files["here://a.tiff"] = "down"
    for read in (lambda: image_size("here://a.png"), lambda: probe("here://a.mp4"), lambda: page_count("here://a.tiff")):
        with pytest.raises(MediaUnavailable, match="no answer"):
            read()


def test_without_an_opener_addresses_are_refused(files):
    register_opener("here", None)
    for read in (image_size, read_bytes, probe):
        with pytest.raises(MediaError, match="is an address"):
            read("here://a.png")


@pytest.mark.parametrize("scheme", ["s3://", "", "a b", "/tmp"])
def test_a_scheme_is_a_word(scheme):
    with pytest.raises(ValueError, match=r"scheme = .*: need a word such as 's3'"):
        register_opener(scheme, None)


def test_an_opener_is_a_function():
    with pytest.raises(TypeError, match="opener = 5: need a function"):
        register_opener("s9", 5)
