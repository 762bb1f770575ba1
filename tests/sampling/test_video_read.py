"""Every returned frame is the picture encoded for that time, as in libav's decode of the whole file, or an error gives the reason."""

import contextlib
import struct
import threading
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from eagle_sampling import Limits, MediaError, choose_times, clip_range, probe, read_frames
from eagle_sampling.video.av1 import needed_parts
from eagle_sampling.video.decode import FileReader
from eagle_sampling.video.dependencies import droppable_test, group_targets
from eagle_sampling.video.probe import read_track

B_FRAMES = {"preset": "veryfast", "g": "24", "bf": "3", "x264-params": "scenecut=0"}
OPEN_GOP = {"preset": "veryfast", "x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-pyramid=normal"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=20:bframes=3"}
REALTIME = {"cpu-used": "8", "deadline": "realtime", "g": "20"}
IRREGULAR = np.cumsum(np.random.default_rng(1).integers(10, 200, 60)).tolist()

MATRIX = {
    "h264-no-b.mp4": {"options": {"preset": "ultrafast", "g": "12"}},
    "h264-b.mp4": {},
    "h264-b.mov": {},
    "h264-b.mkv": {},
    "h264-b.ts": {},
    "h264-b.flv": {},
    # Packets with decoding times only: libav reports them as presentation times and numbers its frames incorrectly.
    "h264-b.avi": {},
    "h264-b.wmv": {},
    "h264-b.mxf": {"fps": 25},
    "open-gop.avi": {"options": OPEN_GOP, "count": 40},
    "open-gop.mp4": {"options": OPEN_GOP, "count": 80},
    "open-gop.mkv": {"options": OPEN_GOP, "count": 80},
    "open-gop.ts": {"options": OPEN_GOP, "count": 80},
    "intra-refresh.mp4": {"options": {"preset": "veryfast", "x264-params": "intra-refresh=1:keyint=20:bframes=0"}, "count": 80},
    "interlaced.mp4": {"options": {"preset": "veryfast", "x264-params": "interlaced=1:bframes=2"}},
    "fragmented.mp4": {"mux": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}},
    "fragmented-delayed.mp4": {"mux": {"movflags": "frag_keyframe+empty_moov+delay_moov"}},
    "fragmented-half.mp4": {"mux": {"movflags": "frag_keyframe", "frag_duration": "300000"}},  # samples also in moov
    "moov-first.mp4": {"mux": {"movflags": "faststart"}},
    "no-edit-list.mp4": {"mux": {"use_editlist": "0"}},
    "negative-offsets.mp4": {"mux": {"movflags": "negative_cts_offsets"}},
    "vfr.mp4": {"ticks": IRREGULAR, "unit": Fraction(1, 1000)},
    "vfr.mkv": {"ticks": IRREGULAR, "unit": Fraction(1, 1000)},
    "vfr.ts": {"ticks": [90 * tick for tick in IRREGULAR], "unit": Fraction(1, 90_000)},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc.mkv": {"codec": "libx265", "options": X265},
    "hevc.ts": {"codec": "libx265", "options": X265},
    "hevc-10bit.mp4": {"codec": "libx265", "options": X265, "pixel_format": "yuv420p10le"},
    "hevc-open-gop.mp4": {
        "codec": "libx265",
        "options": {"preset": "fast", "x265-params": "log-level=none:keyint=12:min-keyint=12:open-gop=1:bframes=4:b-pyramid=1"},
        "count": 48,
    },
    "hevc-layers.mp4": {
        "codec": "libx265",
        "options": {"preset": "fast", "x265-params": "log-level=none:keyint=20:temporal-layers=1:bframes=4"},
        "count": 40,
    },
    "vp8.webm": {"codec": "libvpx", "options": REALTIME, "count": 30},
    "vp9.webm": {"codec": "libvpx-vp9", "options": REALTIME, "count": 40},
    "vp9-hidden-frames.webm": {
        "codec": "libvpx-vp9",
        "options": {"cpu-used": "5", "deadline": "good", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"},
    },
    "vp9.mp4": {"codec": "libvpx-vp9", "options": REALTIME, "count": 40},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "g": "20"}, "count": 40},
    "av1.webm": {"codec": "libsvtav1", "options": {"preset": "12", "g": "20"}, "count": 40},
    "av1-pyramid.mp4": {"codec": "libsvtav1", "options": {"preset": "10", "g": "60"}, "count": 70},
    "colours-outside.mkv": {  # VP8 itself does not store them
        "codec": "libvpx",
        "options": {**REALTIME, "colorspace": "bt709", "chroma_sample_location": "topleft"},
        "count": 10,
    },
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg2.ts": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2"}},
    "mpeg2-no-b.avi": {"codec": "mpeg2video", "options": {"g": "12"}, "count": 30},
    "h263.avi": {"codec": "h263", "options": {"g": "12"}, "size": (176, 144), "count": 30},  # every packet is marked as a keyframe
    "flv1.swf": {"codec": "flv", "options": {"g": "12"}, "count": 30},  # no packet is marked
    "odd-444.mp4": {"pixel_format": "yuv444p", "size": (97, 65)},
    "odd.mkv": {"size": (98, 66)},
    "one.mp4": {"count": 1},
    "one.mkv": {"count": 1},
    "one.ts": {"count": 1},
    "two.mp4": {"count": 2},
    "pictures.gif": {"codec": "gif", "options": {}, "pixel_format": "rgb8", "count": 20, "fps": 10},
}


def numbers(pixels, originals):
    """Index of the nearest encoded picture for each frame."""
    few, all_of_them = (np.asarray(stack)[:, ::3, ::3].reshape(len(stack), -1).astype(np.float32) for stack in (pixels, originals))
    return [int(np.abs(all_of_them - frame).mean(1).argmin()) for frame in few]


@pytest.mark.parametrize("name", MATRIX)
def test_every_frame_is_the_requested_one(name, media, truth, pictures):
    how = MATRIX[name]
    if how.get("codec", "libx264") not in av.codecs_available:
        pytest.skip(f"this build of libav has no {how['codec']}")
    path = media(name, **how)
    expected = truth(path)
    info = probe(path)
    assert info.times is not None
    ticks, times = info.times.ticks(), info.times.times()
    assert sorted(expected) == ticks.tolist()
    assert (info.width, info.height) == next(iter(expected.values())).shape[1::-1]

    everything = read_frames(path, times)
    assert (everything.times == times).all()
    assert numbers(everything.pixels, pictures(len(times), info.width, info.height)) == list(range(len(times)))
    expected = dict(zip(ticks.tolist(), expected.values()))  # by order of output; libav's times are not used
    for i, tick in enumerate(ticks.tolist()):
        assert (everything.pixels[i] == expected[tick]).all(), f"frame {i} at {times[i]} s"

    few = np.random.default_rng(0).permutation(len(times))[:7]  # any order
    some = read_frames(path, times[few], workers=3)
    assert (some.times == times[few]).all()
    for i, chosen in enumerate(few):
        assert (some.pixels[i] == expected[ticks[chosen]]).all(), f"frame {chosen} at {times[chosen]} s"


def test_a_packet_without_a_picture_shifts_no_other(media, pictures, monkeypatch):
    """Frames known by their order only: after a packet that a decoder skips silently, their numbers are not known."""
    from eagle_sampling.video import sequential

    path = media("h264-b.avi")
    droppable = droppable_test("h264", b"")

    class Container:  # of a file whose first unreferenced frame from the fortieth packet on gives nothing
        def __init__(self, path):
            self.real = av.open(path)
            self.streams = self.real.streams

        def demux(self, stream):
            silenced = False
            for number, packet in enumerate(self.real.demux(stream)):
                if not silenced and number >= 40 and droppable(bytes(packet)):
                    silenced = True
                    packet = SimpleNamespace(size=1, is_discard=False, decode=list)
                yield packet

    monkeypatch.setattr(sequential, "open_container", lambda path: contextlib.nullcontext(Container(path)))
    times = probe(path).times.times()
    frames = read_frames(path, times, on_error="skip")
    shown = [int(np.argmin(abs(times - time))) for time in frames.times]
    assert numbers(frames.pixels, pictures(60, 96, 64)) == shown == list(range(len(shown)))
    assert 20 <= len(shown) <= 40
    assert "give no frame" in frames.errors[0].reason
    assert read_frames(path, times[:8], workers=2).errors == ()


def test_packed_b_frames(media, pictures, tmp_path):
    """As DivX and XviD wrote them: a B-frame is in the chunk of the frame before it, and its own chunk holds an empty frame."""
    path, mark = tmp_path / "packed.avi", b"\0\0\1\xb6"
    with av.open(str(media("mpeg4-b.avi", codec="mpeg4", options={"g": "12", "bf": "1", "b_strategy": "0"}, count=40))) as container:
        plain = [(bytes(packet), packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    chunks = [(plain[0][0].replace(mark, b"\0\0\1\xb2DivX503b1393p" + mark), True)]
    for data, key in plain[1:]:
        if data[data.index(mark) + 4] >> 6 == 2:  # a B-frame
            chunks[-1] = (chunks[-1][0] + data, chunks[-1][1])
            chunks.append((mark + b"\x5f\xff\xff", False))
        else:
            chunks.append((data, key))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i, (data, key) in enumerate(chunks):
            packet = av.Packet(data)
            packet.pts = packet.dts = i
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 30), key, stream
            out.mux(packet)
    assert len(chunks) == len(plain) == 40
    frames = read_frames(path, probe(path).times.times())
    assert numbers(frames.pixels, pictures(40, 96, 64)) == list(range(40))


def test_a_false_keyframe_is_detected(media, pictures, tmp_path):
    """An AVI whose index marks every frame as a keyframe, with a codec that uses a grey picture for a missing reference."""
    path = media("msmpeg4.avi", codec="msmpeg4v2", options={"g": "20"}, count=40)
    data = bytearray(path.read_bytes())
    index = data.rfind(b"idx1")
    for entry in range(index + 8, index + 8 + int.from_bytes(data[index + 4 : index + 8], "little"), 16):
        data[entry + 4] |= 0x10
    path = tmp_path / "false.avi"
    path.write_bytes(data)
    assert read_track(str(path)).sync.all()
    wanted = [3, 17, 26, 38]
    frames = read_frames(path, probe(path).times.times()[wanted])
    assert numbers(frames.pixels, pictures(40, 96, 64)) == wanted


def test_times_between_frames_denote_the_frame_on_the_screen(small_mp4):
    exact = read_frames(small_mp4, [0.5, 1.0])
    between = read_frames(small_mp4, [0.5 + 0.02, 1.0 + 1e-7])
    assert (between.times == exact.times).all()
    assert (between.pixels == exact.pixels).all()


def test_repeats_order_size_and_out(small_mp4, truth):
    out = np.zeros((3, 32, 48, 3), np.uint8)
    frames = read_frames(small_mp4, [1.5, 0.1, 1.5], (48, 32), out=out)
    assert frames.pixels is out
    expected = truth(small_mp4, (48, 32))
    for i, time in enumerate((1.5, 0.1, 1.5)):
        assert (out[i] == expected[round(time * 15360)]).all()
    with pytest.raises(ValueError, match="need uint8"):
        read_frames(small_mp4, [0.0], 32, out=out)


@pytest.mark.parametrize("size", [(96, 64), (80, 56)])
def test_colours_are_those_of_the_pictures(media, pictures, size):
    """Against the picture that was encoded losslessly in 4:4:4: matrix, range and channel order are right."""
    path = media("lossless.mp4", options={"preset": "ultrafast", "qp": "0"}, pixel_format="yuv444p", count=2)
    (picture,) = read_frames(path, [0.0], size).pixels
    original = Image.fromarray(pictures(2, 96, 64)[0]).resize(size, Image.Resampling.BICUBIC)
    assert np.abs(picture.astype(int) - np.asarray(original)).mean() < 2.5


def test_only_what_is_needed_is_decoded(small_mp4, monkeypatch):
    """Of three B-frames in H.264 one is a reference; the other two are skipped, and nothing after the last target is read."""
    track = read_track(str(small_mp4))
    droppable = droppable_test(track.codec, track.extradata)
    assert droppable is not None
    data = small_mp4.read_bytes()
    spare = [droppable(data[o : o + n]) for o, n in zip(track.offsets, track.sizes)]
    assert 0.35 < np.mean(spare) < 0.65
    groups = group_targets(track, np.array([0, 5, 30, 59]))
    assert [(group.start, group.targets) for group in groups] == [(0, (0, 5)), (24, (30,)), (48, (59,))]


def test_av1_frames_that_no_wanted_frame_depends_on_are_skipped(media, monkeypatch):
    """A pyramid of 16: the last frame of 60 needs one branch, and its neighbour mostly the same one."""
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this build of libav has no libsvtav1")
    path = media("av1-pyramid.mp4", **MATRIX["av1-pyramid.mp4"])
    sent = []
    whole = FileReader.packet
    monkeypatch.setattr(FileReader, "packet", lambda *given: sent.append(whole(*given)) or sent[-1])
    times = probe(path).times.times()
    read_frames(path, times[[57]])
    assert len(sent) == 58
    assert 2 <= sum(packet is not None for packet in sent) <= 20
    assert sum(packet.size for packet in sent if packet is not None) < 0.8 * path.stat().st_size
    sent.clear()
    read_frames(path, times[:58])
    assert None not in sent


def test_unsupported_headers_mean_that_everything_is_decoded(media):
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this build of libav has no libsvtav1")
    path = media("av1-pyramid.mp4", **MATRIX["av1-pyramid.mp4"])
    track, data = read_track(str(path)), path.read_bytes()
    units = [data[offset : offset + size] for offset, size in zip(track.offsets, track.sizes)]
    assert needed_parts(units.__getitem__, range(20), {19}, track.extradata) is not None
    assert needed_parts(units.__getitem__, range(1, 20), {19}, track.extradata) is None  # not from a keyframe
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = list(units)
        number = int(rng.integers(20))
        unit = bytearray(units[number])
        unit[int(rng.integers(min(len(unit), 30)))] ^= 1 << int(rng.integers(8))
        broken[number] = bytes(unit[: int(rng.integers(1, len(unit) + 1))])
        parts = needed_parts(broken.__getitem__, range(20), {19}, track.extradata)
        assert parts is None or all(0 <= a < b <= len(broken[sample]) for sample, spans in parts.items() for a, b in spans)


def test_colours_that_only_the_container_names(small_mp4, truth, tmp_path):
    """A `colr` box in place of `btrt`, both of 20 bytes: BT.709 in full range."""
    data = small_mp4.read_bytes()
    at = data.index(b"btrt") - 4
    colr = struct.pack(">I4s4sHHHBB", 20, b"colr", b"nclx", 1, 1, 1, 0x80, 0)
    path = tmp_path / "coloured.mp4"
    path.write_bytes(data[:at] + colr + data[at + 20 :])
    expected = truth(path)[0]
    assert (read_frames(path, [0.0]).pixels[0] == expected).all()
    assert (read_frames(small_mp4, [0.0]).pixels[0] != expected).any()


def test_tolerance_allows_a_keyframe(small_mp4):
    frames = read_frames(small_mp4, [0.7, 0.2, 1.58], tolerance=0.15)
    assert frames.times.tolist() == pytest.approx([0.8, 0.2, 1.6])
    assert read_frames(small_mp4, [0.7]).times.tolist() == pytest.approx([0.7])


def test_tolerance_where_no_keyframe_is_shown(small_mp4, tmp_path):
    """A copy from 1.7 s on: its only keyframe is before the beginning of the edit list."""
    path = tmp_path / "cut.mp4"
    with av.open(str(small_mp4)) as source, av.open(str(path), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts >= round(1.6 * 15360):
                packet.pts, packet.dts = packet.pts - round(1.7 * 15360), packet.dts - round(1.7 * 15360)
                packet.stream = copy
                out.mux(packet)
    info = probe(path)
    assert len(info.keyframe_times) == 0
    assert (read_frames(path, [0.1], tolerance=0.2).pixels == read_frames(small_mp4, [1.8]).pixels).all()


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])  # read by the parser here, by libavformat
@pytest.mark.parametrize(
    ("matrix", "turns", "mirror"),
    [((0, 1, -1, 0), 1, False), ((-1, 0, 0, -1), 2, False), ((0, -1, 1, 0), 3, False), ((-1, 0, 0, 1), 0, True)],
)
def test_rotation_is_applied(media, tmp_path, codec, matrix, turns, mirror):
    """The display matrix of `tkhd`, written by hand; the picture is rotated clockwise, as a player shows it."""
    straight = media(f"{codec}.mp4", codec=codec, options={"g": "12"}, count=20)
    data = bytearray(straight.read_bytes())
    at = data.find(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), data.find(b"tkhd"))
    assert at > 0
    a, b, c, d = (65536 * value for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    upright = read_frames(straight, [0.5]).pixels[0]
    if mirror:
        upright = upright[:, ::-1]
    info = probe(path)
    assert (info.rotation, info.unknown) == (90 * turns, ())
    assert (info.width, info.height) == ((64, 96) if turns % 2 else (96, 64))
    assert (read_frames(path, [0.5]).pixels[0] == np.rot90(upright, -turns)).all()
    if not mirror:  # libav counts anticlockwise
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).rotation % 360 == -90 * turns % 360


def test_many_callers_at_once(small_mp4, truth):
    expected = truth(small_mp4)
    wrong = []

    def call(seed: int) -> None:
        ticks = np.random.default_rng(seed).permutation(60)[:8] * 512
        frames = read_frames(small_mp4, ticks / 15360, workers=2)
        wrong.extend(tick for i, tick in enumerate(ticks.tolist()) if not (frames.pixels[i] == expected[tick]).all())

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_times_outside_of_the_video_are_errors(small_mp4):
    with pytest.raises(MediaError, match=r"small.mp4: the frame at 2.500 s .* from 0.000000 to 2.000000"):
        read_frames(small_mp4, [0.5, 2.5])
    frames = read_frames(small_mp4, [2.5, 0.5, -1.0, 1.0], on_error="skip")
    assert [error.index for error in frames.errors] == [0, 2]
    assert frames.times.tolist() == pytest.approx([0.5, 1.0])
    assert (frames.pixels == read_frames(small_mp4, [0.5, 1.0]).pixels).all()


def test_arguments_out_of_range(small_mp4):
    for wrong in ({"workers": 0}, {"tolerance": -1}, {"on_error": "ignore"}, {"timeout": 0}, {"size": 0}):
        with pytest.raises(ValueError):
            read_frames(small_mp4, [0.0], **wrong)
    assert read_frames(small_mp4, [], np.int64(16)).pixels.shape == (0, 16, 16, 3)


def test_limits(small_mp4):
    with pytest.raises(MediaError, match="pixels is over the limit"):
        read_frames(small_mp4, [0.0], limits=Limits(max_pixels=96 * 64 - 1))
    with pytest.raises(MediaError, match="60 frames is over the limit"):
        probe(small_mp4, limits=Limits(max_frames=59))
    with pytest.raises(MediaError, match="bytes is over the limit"):
        read_frames(small_mp4, [0.0], limits=Limits(max_bytes=10))


def test_a_hanging_decoder_ends_with_an_error(small_mp4, monkeypatch):
    import time

    from eagle_sampling.video import decode

    monkeypatch.setattr(decode.Decoder, "run", lambda *_: time.sleep(20))
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"small.mp4: decoding took longer than the limit of 0.3 s"):
        read_frames(small_mp4, [0.0], timeout=0.3, workers=2)
    assert time.monotonic() - began < 15


def test_a_time_limit_that_is_met_changes_nothing(small_mp4):
    assert (read_frames(small_mp4, [0.5, 1.5], timeout=60).pixels == read_frames(small_mp4, [0.5, 1.5]).pixels).all()


def test_memory_is_little_more_than_the_output(media):
    """No list of full-size frames: 60 frames of 640 x 480 (55 MB as RGB) are returned at 16 x 16 with less than 16 MiB."""
    import subprocess
    import sys

    path = media("large.mp4", size=(640, 480), options={"preset": "ultrafast", "g": "12"})
    code = (
        "import resource, sys; from eagle_sampling import probe, read_frames; times = probe(sys.argv[1]).times.times();"
        "read_frames(sys.argv[1], times[:1], 16); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "read_frames(sys.argv[1], times, 16); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout)
    assert grown < 16 * 1024  # KiB


def test_choose_then_read(small_mp4):
    info = probe(small_mp4)
    times = choose_times(info, 8)
    assert (times == choose_times(info.times, 8)).all()
    assert clip_range(info, 0.5, 1.0) == clip_range(info.times, 0.5, 1.0)
    assert (read_frames(small_mp4, times, 32).times == times).all()


def test_video_information_without_times_has_none_to_choose_from(media):
    info = probe(media("a.mkv"), exact=False)
    with pytest.raises(ValueError, match=r"a\.mkv: the times of its frames are not known: probe it with exact=True"):
        choose_times(info, 8)


@pytest.mark.parametrize("times", [8, 8.0, np.float64(8), [[0.5, 1.0]]])
def test_a_number_of_frames_is_not_a_list_of_times(small_mp4, times):
    with pytest.raises(ValueError, match=r"times must be a list of seconds, not .*choose_times\(probe\(path\), count\)"):
        read_frames(small_mp4, times)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"times": ["a"]}, ValueError, "times are <U1, for example .*: need seconds"),
        ({"times": [1j]}, ValueError, "times are complex128"),
        ({"size": (4.5, 4)}, TypeError, r"whole pixels, not \(4\.5, 4\)"),
        ({"size": (3,)}, ValueError, r"whole pixels, not \(3,\)"),
        ({"size": 1.5}, TypeError, r"whole pixels, not 1\.5"),
        ({"workers": 1.5}, TypeError, r"workers = 1\.5: need a whole number"),
        ({"tolerance": float("nan")}, ValueError, "tolerance = nan"),
        ({"timeout": float("nan")}, ValueError, "timeout = nan"),
        ({"timeout": float("inf")}, ValueError, "timeout = inf"),
        ({"out": [1]}, ValueError, "out is list"),
        ({"out": np.broadcast_to(np.uint8(0), (1, 8, 8, 3))}, ValueError, "out is read-only"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words, small_mp4):
    arguments = {"times": [0.0], "size": 8} | arguments
    with pytest.raises(error, match=words):
        read_frames(small_mp4, **arguments)


def test_too_many_frames_name_the_file(small_mp4):
    with pytest.raises(MediaError, match=rf"{small_mp4.name}: \d+ frames is over the limit of 3"):
        probe(small_mp4, limits=Limits(max_frames=3))
