"""Shot detection: cuts, dissolves and fades where they are, nothing where nothing changes, and no effect of the chunks."""

import os
from pathlib import Path

import numpy as np
import pytest

from eagle_sampling import probe
from eagle_train.curate.frames import NoTimes, small_frames, times_of_frames
from eagle_train.curate.shots import HEIGHT, PLANES, WIDTH, find_boundaries, measure_changes, shot_boundaries
from tests.support import media
from tests.train.curate.conftest import film, scene


def small(frames):
    """uint8 [n, sum(PLANES)] of frames [h, w, 3] whose channels are taken as Y, U and V."""
    pixels = np.stack(frames)
    planes = (pixels[..., 0], pixels[:, ::2, ::2, 1], pixels[:, ::2, ::2, 2])
    return np.concatenate([plane.reshape(len(pixels), -1) for plane in planes], axis=1)


def scenes(lengths, seed=0):
    return [small(scene(seed + index, length, (WIDTH, HEIGHT))) for index, length in enumerate(lengths)]


def boundaries(frames, chunk=10**9):
    return [b.frame for b in shot_boundaries(frames[i : i + chunk] for i in range(0, len(frames), chunk))[1]]


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_found_to_the_frame(seed):
    lengths = np.random.default_rng(seed).integers(12, 60, 8)
    frames = np.concatenate(scenes(lengths, 100 * seed))
    assert boundaries(frames) == np.cumsum(lengths)[:-1].tolist()


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64])
def test_chunks_do_not_change_the_result(chunk):
    frames = np.concatenate(scenes([20, 33, 5, 40, 18]))
    whole = measure_changes([frames])
    parts = measure_changes(frames[i : i + chunk] for i in range(0, len(frames), chunk))
    assert whole[0] == parts[0]
    for one, other in zip((*whole[1].change, *whole[1].blend), (*parts[1].change, *parts[1].blend)):
        np.testing.assert_array_equal(one, other)


def test_motion_light_and_a_flash_are_no_boundaries():
    (drift,) = scenes([120])
    assert boundaries(drift) == []
    brighter = np.clip(drift.astype(float) * np.linspace(0.6, 1.0, 120)[:, None], 0, 255).astype(np.uint8)
    assert boundaries(brighter) == []
    noise = np.random.default_rng(0).integers(0, 256, (120, sum(PLANES)), dtype=np.uint8)
    assert boundaries(noise) == []


@pytest.mark.parametrize("span", [8, 12, 16])
def test_dissolves_and_fades_are_one_boundary_each(span):
    a, b = (part.astype(float) for part in scenes([60, 60], 40))
    weight = ((np.arange(span) + 1) / (span + 1))[:, None]
    mixed = a[-span:] * (1 - weight) + b[:span] * weight
    dissolve = np.concatenate([a[:-span], mixed, b[span:]]).astype(np.uint8)
    (found,) = boundaries(dissolve)
    assert 60 - span - 2 <= found <= 62


def test_a_flat_picture_that_fades_is_one_boundary():
    """All its pixels enter the next bin of the histogram at once. Levels of an end title, from blue-grey to black in 17 frames."""
    weight = np.concatenate([np.ones(30), np.linspace(1, 0, 17), np.zeros(5)])
    frames = [
        np.broadcast_to(np.round(np.array([50, 134, 124]) * w + np.array([16, 128, 128]) * (1 - w)), (HEIGHT, WIDTH, 3)) for w in weight
    ]
    assert len(boundaries(small([frame.astype(np.uint8) for frame in frames]))) <= 1


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_few_frames(count):
    frames = np.zeros((count, sum(PLANES)), np.uint8)
    assert shot_boundaries([frames]) == (count, [])
    assert find_boundaries(measure_changes([frames])[1]) == []


def test_small_frames_have_the_times_of_the_file(tmp_path):
    path = film(tmp_path / "a.mp4", [20, 20])
    chunks = list(small_frames(str(path), WIDTH, HEIGHT))
    np.testing.assert_allclose(np.concatenate([times for _, times in chunks]), np.arange(40) / 10, atol=1e-3)
    assert [pixels.shape for pixels, _ in chunks] == [(40, sum(PLANES))]
    rgb = np.concatenate([pixels for pixels, _ in small_frames(str(path), 32, 16, colour="rgb")])
    assert rgb.shape == (40, 16, 32, 3)
    assert boundaries(np.concatenate([pixels for pixels, _ in chunks])) == [20]


def test_small_frames_are_means_of_the_planes(tmp_path):
    """Against the means of every plane in numpy: frames that are averaged alone, and large ones that are sampled first."""
    import av

    for size in ((96, 54), (480, 270)):
        media.write_video(tmp_path / "a.mp4", scene(3, 3, size), 10, {"crf": "0"})
        ((pixels, _),) = small_frames(str(tmp_path / "a.mp4"), WIDTH, HEIGHT)
        with av.open(str(tmp_path / "a.mp4")) as container:
            whole = [frame.reformat(format="yuv444p").to_ndarray() for frame in container.decode(video=0)]
        cells = np.stack(whole).reshape(3, 3, HEIGHT, size[1] // HEIGHT, WIDTH, size[0] // WIDTH).mean(axis=(3, 5))
        luma = pixels[:, : PLANES[0]].reshape(3, HEIGHT, WIDTH)
        assert np.abs(luma - cells[:, 0]).mean() < 3
        for plane, first in ((1, PLANES[0]), (2, PLANES[0] + PLANES[1])):
            chroma = pixels[:, first : first + PLANES[plane]].reshape(3, (HEIGHT + 1) // 2, WIDTH // 2)
            expected = cells[:, plane, :26].reshape(3, 13, 2, WIDTH // 2, 2).mean(axis=(2, 4))
            assert np.abs(chroma[:, :13] - expected).mean() < 3


def test_a_stream_without_times_is_refused(tmp_path):
    import av

    film(tmp_path / "a.mp4", [20])
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "a.h264"), "w", format="h264") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    ((_, times),) = small_frames(str(tmp_path / "a.h264"), WIDTH, HEIGHT)
    assert np.isnan(times).all()
    with pytest.raises(NoTimes, match=r"a\.h264: .*rising times"):
        times_of_frames([times], np.empty(0), str(tmp_path / "a.h264"))


def test_frames_of_an_avi_with_b_frames_have_the_times_of_its_packets(tmp_path):
    """AVI stores no presentation times: what libavformat derives does not rise behind three B-frames in a row."""
    frames = scene(0, 30) + scene(1, 30)
    path = str(media.write_video(tmp_path / "a.avi", frames, 10, {"bf": "3", "g": "250"}))
    ((pixels, decoded),) = small_frames(path, WIDTH, HEIGHT)
    assert (np.diff(decoded) <= 0).any()
    info = probe(path)
    assert info.times is not None
    times = times_of_frames([decoded], info.times.times(), path)
    np.testing.assert_allclose(times, np.arange(60) / 10, atol=1e-3)
    assert boundaries(pixels) == [30]
    with pytest.raises(NoTimes, match="do not rise"):
        times_of_frames([decoded], info.times.times()[1:], path)  # a packet without a frame: which one is not known


@pytest.mark.skipif("EAGLE_TEST_FILM" not in os.environ, reason="EAGLE_TEST_FILM names no film")
def test_a_real_film_splits_into_shots():
    path = Path(os.environ["EAGLE_TEST_FILM"])
    count, found = shot_boundaries(pixels for pixels, _ in small_frames(str(path), WIDTH, HEIGHT))
    assert 1 <= len(found) < count / 12
