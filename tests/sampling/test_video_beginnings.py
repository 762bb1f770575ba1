"""Files that begin between keyframes or at an open GOP, and keyframe tables that are missing or wrong.

The law: a frame belongs to the video if and only if a plain decode of the file gives the picture that a decode of the whole recording
gives.
"""

import struct

import av
import numpy as np
import pytest

from eagle_sampling import MediaError, choose_times, probe, read_frames
from eagle_sampling.video.keyframes import Start, start_test
from eagle_sampling.video.probe import read_track

X264 = {"preset": "veryfast", "g": "20", "bf": "2"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=20"}
OPEN_X264 = {"preset": "veryfast", "g": "20", "bf": "3", "x264-params": "open-gop=1"}
OPEN_X265 = {"preset": "medium", "x265-params": "log-level=none:keyint=20:open-gop=1:bframes=3"}
REALTIME = {"deadline": "realtime", "cpu-used": "8", "g": "20"}

RECORDINGS = {
    "h264.ts": ("libx264", X264),
    "h264.mkv": ("libx264", X264),
    "h264.mp4": ("libx264", X264),
    "h264.mov": ("libx264", X264),
    "h264.flv": ("libx264", X264),
    "h264.avi": ("libx264", X264),
    "refresh.mkv": ("libx264", {"preset": "veryfast", "x264-params": "intra-refresh=1:keyint=20:bframes=0"}),
    "hevc.ts": ("libx265", X265),
    "hevc.mp4": ("libx265", X265),
    "vp8.webm": ("libvpx", REALTIME),
    "vp9.webm": ("libvpx-vp9", REALTIME),
    "vp9.mp4": ("libvpx-vp9", REALTIME),
    "av1.mkv": ("libsvtav1", {"preset": "12", "g": "20"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "20"}),
    "mpeg2-b.mpg": ("mpeg2video", {"g": "20", "bf": "2"}),
    "mpeg2-b.ts": ("mpeg2video", {"g": "20", "bf": "2"}),
    "mpeg2-b.mkv": ("mpeg2video", {"g": "20", "bf": "2"}),
    "mpeg1.mpg": ("mpeg1video", {"g": "20", "bf": "2"}),
    "mpeg4.avi": ("mpeg4", {"g": "20"}),
    "mpeg4-b.mp4": ("mpeg4", {"g": "20", "bf": "2"}),
    "mpeg4-b.avi": ("mpeg4", {"g": "20", "bf": "2"}),
    "msmpeg4.avi": ("msmpeg4v2", {"g": "20"}),
    "h263.avi": ("h263", {"g": "20"}),
    "flv1.flv": ("flv", {"g": "20"}),
    "open264.mkv": ("libx264", OPEN_X264),
    "open264.mp4": ("libx264", OPEN_X264),
    "open264.ts": ("libx264", OPEN_X264),
    "open264.avi": ("libx264", OPEN_X264),
    "open264.flv": ("libx264", OPEN_X264),
    "open265.mkv": ("libx265", OPEN_X265),
    "open265.mp4": ("libx265", OPEN_X265),
    "open265.ts": ("libx265", OPEN_X265),
}


def cut(source, target, packets=0, keyframes=0):
    """A copy without the first `packets` packets, or from keyframe number `keyframes` on."""
    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream, opaque=True)
        seen = keys = 0
        for packet in container.demux(stream):
            if packet.size:
                seen += 1
                keys += packet.is_keyframe
                if seen > packets and keys > keyframes:
                    packet.stream = copy
                    if packet.dts is None:
                        packet.dts = packet.pts
                    out.mux(packet)
    return target


@pytest.mark.parametrize("where", [{"packets": 7}, {"keyframes": 1}, {"packets": 25}], ids=["between", "keyframe", "later"])
@pytest.mark.parametrize("name", RECORDINGS)
def test_frames_that_can_be_shown_are_those_of_the_video(name, where, media, shown_in_order, tmp_path):
    codec, options = RECORDINGS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of libav has no {codec}")
    size = (176, 144) if codec == "h263" else (96, 64)
    whole = media(name, codec=codec, options=options, count=80, size=size)
    path = cut(whole, tmp_path / name, **where)
    recorded = [picture for _, picture in shown_in_order(whole)]
    shown = list(dict(shown_in_order(path)).values())  # of pictures at one time the last
    exact = [any((picture == other).all() for other in recorded) for picture in shown]
    first = exact.index(True)
    expected = shown[first:]
    assert all(exact[first:])

    info = probe(path)
    times = info.times.times()
    assert info.frame_count == len(expected)
    frames = read_frames(path, times)
    for i, picture in enumerate(expected):
        assert (frames.pixels[i] == picture).all(), f"frame {i} at {times[i]} s"
    few = choose_times(info, 8)
    assert (read_frames(path, few[::-1], workers=2).pixels == frames.pixels[np.searchsorted(times, few[::-1])]).all()
    if not info.variable_frame_rate:
        assert info.duration == pytest.approx(len(expected) / 30, abs=0.05)


def keyframe_table(path, target, every):
    """A copy of an MP4 whose `stss` is gone (0), empty (-1), or names every `every`-th frame."""
    data = bytearray(path.read_bytes())
    names = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stss")
    at, end, chain = 0, len(data), []
    for name in names:
        while bytes(data[at + 4 : at + 8]) != name:
            at += int.from_bytes(data[at : at + 4], "big")
            assert at < end
        chain.append(at)
        end, at = at + int.from_bytes(data[at : at + 4], "big"), at + 8
    at = chain.pop()
    size = int.from_bytes(data[at : at + 4], "big")
    numbers = range(1, 151, every) if every > 0 else ()
    box = struct.pack(f">I4sII{len(numbers)}I", 16 + 4 * len(numbers), b"stss", 0, len(numbers), *numbers) if every else b""
    data[at : at + size] = box
    for parent in chain:
        grown = int.from_bytes(data[parent : parent + 4], "big") + len(box) - size
        data[parent : parent + 4] = grown.to_bytes(4, "big")
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("every", [0, -1, 10, 7])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"preset": "veryfast", "g": "60"}),
        ("libx264", OPEN_X264),
        ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:keyint=60"}),
        ("libvpx-vp9", {**REALTIME, "g": "60"}),
        ("libsvtav1", {"preset": "12", "g": "60"}),
        ("mpeg4", {"g": "60", "bf": "2"}),
    ],
)
def test_a_wrong_table_of_keyframes_costs_no_frame(codec, options, every, media, truth, tmp_path):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of libav has no {codec}")
    path = media("table.mp4", codec=codec, options=options, count=150)
    expected = list(truth(path).values())
    changed = keyframe_table(path, tmp_path / "changed.mp4", every)
    times = probe(changed).times.times()
    frames = read_frames(changed, times)
    assert len(times) == 150
    assert all((frames.pixels[i] == picture).all() for i, picture in enumerate(expected))
    few = np.random.default_rng(0).permutation(150)[:9]
    some = read_frames(changed, times[few], workers=2)
    assert all((some.pixels[i] == expected[number]).all() for i, number in enumerate(few))


@pytest.mark.parametrize("name", ["h264.mkv", "hevc.mp4", "vp9.webm", "mpeg4.avi"])
def test_a_piece_without_a_keyframe_is_refused_by_its_reason(name, media, tmp_path):
    codec, options = RECORDINGS[name]
    whole = media(name, codec=codec, options=options, count=80)
    path = tmp_path / name
    with av.open(str(whole)) as container, av.open(str(path), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for number, packet in enumerate(container.demux(stream)):
            if packet.size and 3 <= number < 15:
                packet.stream = copy
                out.mux(packet)
    with pytest.raises(MediaError, match=r"has no keyframe, so that none of its 12 frames can be shown"):
        probe(path)


@pytest.mark.parametrize("name", [name for name, (codec, _) in RECORDINGS.items() if codec != "msmpeg4v2"])
def test_keyframes_by_the_bitstream_are_those_of_the_container(name, media):
    codec, options = RECORDINGS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of libav has no {codec}")
    path = media(name, codec=codec, options=options, count=80, size=(176, 144) if codec == "h263" else (96, 64))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        test = start_test(read_track(str(path)).codec, bytes(stream.codec_context.extradata or b""))
        packets = [(bytes(packet), packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    found = [test(data) for data, _ in packets]
    assert None not in found
    if codec != "h263":  # an AVI marks every packet of it
        assert [start is not Start.NONE for start in found] == [key for _, key in packets]
    assert found[0] is (Start.OPEN if codec.startswith("mpeg") else Start.CLEAN)
    assert 4 <= sum(start is not Start.NONE for start in found) <= 6


def test_damage_after_an_open_beginning_is_found(media, truth, tmp_path):
    """Random bit flips in the first group: a frame is returned only when its picture is that of the undamaged file."""
    path = cut(media("open264.mkv", codec="libx264", options=OPEN_X264, count=80), tmp_path / "open.mkv", keyframes=1)
    track = read_track(str(path))
    times = probe(path).times.times()
    right = read_frames(path, times).pixels
    data, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(30):
        sample = int(rng.integers(1, 19))
        broken = bytearray(data)
        for _ in range(6):
            broken[int(track.offsets[sample]) + int(rng.integers(12, max(13, track.sizes[sample])))] ^= 1 << int(rng.integers(8))
        changed = tmp_path / "broken.mkv"
        changed.write_bytes(broken)
        frames = read_frames(changed, times, on_error="skip")
        refused += len(frames.errors) > 0
        wrong = sum((pixels != right[np.searchsorted(times, time)]).any() for pixels, time in zip(frames.pixels, frames.times))
        assert wrong == 0 or not frames.errors  # a flip that no decoder notices changes pixels without an error
    assert refused >= 15
