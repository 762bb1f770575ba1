"""Times in rows and prompts count from the first frame of a file, whatever its own timeline."""

from fractions import Fraction

import av
import numpy as np
import pytest

from eagle_model.visual.facts import ClipError, as_video, measure_video
from eagle_model.visual.plan import _video_plan
from eagle_model.visual.read import read_video
from eagle_model.visual.spec import VisualSpec
from tests.support.media import grey_frames

WRAP = (1 << 33) / 90_000  # seconds at which the clock of a transport stream begins again
SPEC = VisualSpec(tile_size=64)


def write(path, first):
    """90 frames at 30 a second, the first at `first` seconds; the grey of frame i is 2 * i."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "veryfast", "g": "20"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i, pixels in enumerate(grey_frames(90, 2)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(first * 30) + i, Fraction(1, 30)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize(("name", "first"), [("zero.mp4", 0), ("ordinary.ts", 0), ("late.ts", 3000), ("wraps.ts", WRAP - 2.4)])
def test_clips_and_prompts_count_from_the_first_frame(name, first, tmp_path):
    path = write(tmp_path / name, first)
    whole = measure_video(as_video(path))
    plan = _video_plan(whole, 8, SPEC)
    assert plan.shown is not None
    assert plan.shown[0] == 0
    assert plan.shown[-1] == pytest.approx(89 / 30, abs=1e-3) == whole.last_time
    assert (np.diff(plan.shown) > 0).all()
    assert whole.seconds == pytest.approx(3, abs=1e-3)

    ref = as_video({"path": path, "start": 0.5, "end": 1.5})
    clip = measure_video(ref)
    assert (clip.frames, clip.seconds) == (30, pytest.approx(1))
    plan = _video_plan(clip, 4, SPEC)
    assert plan.shown is not None
    assert plan.shown.tolist() == pytest.approx([0, 10 / 30, 19 / 30, 29 / 30], abs=0.04)
    tiles = np.empty((4, 64, 64, 3), np.uint8)
    read_video(tiles, ref, plan)
    seen = tiles.mean((1, 2, 3)) / 2  # numbers of the frames
    assert seen == pytest.approx(15 + plan.shown * 30, abs=1.5)

    for outside in ({"start": 4, "end": 5}, {"start": -2, "end": -1}):
        with pytest.raises(ClipError, match="counted from the file's first frame"):
            measure_video(as_video({"path": path, **outside}))
