"""Which track of a file is its video: not a cover, a preview or an alternative; and files that hold no video."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from eagle_sampling import MediaError, animation_times, choose_times, probe, read_frames, read_pages
from tests.support.media import random_image

FILM = ("libx264", 60, (96, 64), "yuv420p")
OTHERS = {
    "cover.mkv": ("mjpeg", 1, (64, 36), "yuvj420p"),
    "cover.mp4": ("mjpeg", 1, (64, 36), "yuvj420p"),
    "preview.mkv": ("libx264", 60, (48, 32), "yuv420p"),
    "preview.mp4": ("libx264", 60, (48, 32), "yuv420p"),
    "preview.mov": ("libx264", 60, (48, 32), "yuv420p"),
    "preview.avi": ("mpeg4", 60, (48, 32), "yuv420p"),
}


def write_tracks(path, tracks, default, moving):
    with av.open(str(path), "w") as out:
        streams = []
        for number, (codec, _, size, pixel_format) in enumerate(tracks):
            stream = out.add_stream(codec, rate=30)
            stream.width, stream.height, stream.pix_fmt = *size, pixel_format
            stream.disposition = Disposition.default if number == default else Disposition(0)
            streams.append(stream)
        packets = []
        for stream, (_, count, size, _) in zip(streams, tracks):
            for i, picture in enumerate(moving(count, *size)):
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 30)
                packets += stream.encode(frame)
            packets += stream.encode(None)
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            out.mux(packet)
    return path


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_the_video_is_what_players_show(name, first, pictures, tmp_path):
    tracks = [OTHERS[name], FILM] if first else [FILM, OTHERS[name]]
    path = write_tracks(tmp_path / name, tracks, tracks.index(FILM), pictures)
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        assert best is not None
        assert (best.width, best.height) == FILM[2]
    info = probe(path)
    assert (info.width, info.height, info.frame_count) == (96, 64, 60)
    frames = read_frames(path, choose_times(info, 8))
    originals = np.array(pictures(60, 96, 64)).astype(int)
    found = [int(np.abs(originals - pixels).mean((1, 2, 3)).argmin()) for pixels in frames.pixels]
    assert np.allclose(np.array(found) / 30, frames.times - info.times.times()[0], atol=0.002)


@pytest.mark.parametrize("name", ["preview.mkv", "preview.mp4", "preview.ts"])
def test_two_default_tracks_are_chosen_from_as_libav_does(name, pictures, tmp_path):
    path = tmp_path / name
    write_tracks(path, [OTHERS["preview.mkv"], FILM], None, pictures)
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        assert best is not None
        size = (best.width, best.height)
    info = probe(path)
    assert (info.width, info.height) == size
    assert read_frames(path, choose_times(info, 1)).pixels.shape[1:3] == size[::-1]


@pytest.mark.parametrize("name", ["song.mp4", "song.mkv", "song.mp3", "song.flac"])
@pytest.mark.parametrize("cover", [True, False])
def test_sound_with_a_cover_is_no_video(name, cover, tmp_path):
    codec, layout = {"song.mp3": ("libmp3lame", "s16p"), "song.flac": ("flac", "s16")}.get(name, ("aac", "fltp"))
    Image.new("RGB", (64, 64)).save(tmp_path / "cover.jpg")
    path = tmp_path / name
    with av.open(str(path), "w") as out, av.open(str(tmp_path / "cover.jpg")) as source:
        sound = out.add_stream(codec, rate=44100)
        if cover and name == "song.mkv":
            out.add_attachment("cover.jpg", "image/jpeg", (tmp_path / "cover.jpg").read_bytes())
        elif cover:
            picture = out.add_stream_from_template(source.streams.video[0])
            picture.disposition = Disposition.attached_pic
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream, packet.pts, packet.dts = picture, 0, 0
                    out.mux(packet)
        shape, kind = ((2, 1152), np.float32 if layout == "fltp" else np.int16) if layout.endswith("p") else ((1, 2304), np.int16)
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros(shape, kind), format=layout, layout="stereo")
            frame.sample_rate, frame.pts = 44100, i * 1152
            for packet in sound.encode(frame):
                out.mux(packet)
        for packet in sound.encode(None):
            out.mux(packet)
    with pytest.raises(MediaError, match=rf"{name}: has no video track" + (", only a cover picture" if cover else "")):
        probe(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "ppm", "jp2", "tga", "avif", "pdf", "mjpeg"])
def test_pictures_and_streams_without_times_are_no_video(suffix, tmp_path):
    """libavformat opens each of them, as one frame or with 25 frames a second that the file does not say."""
    path = tmp_path / f"a.{suffix}"
    reason = {"pdf": "is a PDF", "mjpeg": r"is a bare stream \(mjpeg\) whose frames have no"}.get(suffix, r"is an image \(")
    pictures = [random_image(seed, (64, 48)) for seed in range(3)]
    if suffix == "mjpeg":
        with av.open(str(path), "w", format="mjpeg") as out:
            stream = out.add_stream("mjpeg", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
            for picture in pictures * 10:
                out.mux(stream.encode(av.VideoFrame.from_image(picture)))
    else:
        pictures[0].save(path, **({"save_all": True, "append_images": pictures[1:]} if suffix == "pdf" else {}))
    with pytest.raises(MediaError, match=rf"a\.{suffix}: {reason}"):
        probe(path)
    with pytest.raises(MediaError, match=rf"a\.{suffix}: {reason}"):
        read_frames(path, [0.0])


@pytest.mark.parametrize("durations", [[100] * 6, [40, 100, 0, 250, 40, 1000]])
def test_an_animated_webp_is_a_video(durations, tmp_path):
    pictures = [random_image(seed, (8, 6)).resize((64, 48)) for seed in range(6)]
    path = tmp_path / "a.webp"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    info = probe(path)
    assert (info.width, info.height, info.frame_count, info.codec) == (64, 48, 6, "webp")
    assert info.times.times() == pytest.approx(animation_times(path))
    assert info.duration == pytest.approx(sum(duration or 100 for duration in durations) / 1000)
    frames = read_frames(path, info.times.times()[::-1])
    assert all((frames.pixels[i] == np.asarray(picture)).all() for i, picture in enumerate(reversed(pictures)))
    assert [np.asarray(page.convert("RGB")).tolist() for page in read_pages(path, [3])] == [np.asarray(pictures[3]).tolist()]
    assert read_frames(path, info.times.times()[2:4], 16, timeout=30).pixels.shape == (2, 16, 16, 3)
    cut = tmp_path / "cut.webp"
    cut.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MediaError, match="is cut off"):
        probe(cut)
    assert probe(cut, partial=True).frame_count == 5


def test_transparent_parts_of_an_animated_webp_are_white(tmp_path):
    clear = [Image.new("RGBA", (16, 16), (255, 0, 0, alpha)) for alpha in (0, 128, 255)]
    clear[0].save(tmp_path / "a.webp", save_all=True, append_images=clear[1:], lossless=True, exact=True)
    pixels = read_frames(tmp_path / "a.webp", [0.0, 0.1, 0.2]).pixels
    assert pixels[:, 8, 8].tolist() == [[255, 255, 255], [255, 127, 127], [255, 0, 0]]
