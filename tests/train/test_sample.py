"""Rows: every accepted spelling becomes the same sample."""

import pickle
from pathlib import Path

import pytest

from eagle_train.data.clips import ENDS, RANGES, STARTS
from eagle_train.data.sample import RowError, RowFormat, Sample, VideoRef, normalise, parse_row
from eagle_train.data.sources import open_rows

TALK = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def of(row, **options) -> Sample:
    return normalise(row, "s", root="/media", line=3, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": TALK},
        {"messages": MESSAGES},
        {"conversations": MESSAGES},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}]},
        {"id": 5, "width": 3, "conversations": TALK, "image": None, "data": None},
    ],
)
def test_conversations(row):
    assert of(row) == Sample(MESSAGES, (), (), "s", 3)


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_system_of_the_row(key):
    said = [{"role": "system", "content": "S"}, *MESSAGES]
    assert of({key: "S", "messages": MESSAGES}, system="other").messages == said
    assert of({key: "S", "messages": [{"role": "developer", "content": "S"}, *MESSAGES]}).messages == said
    assert of({key: None, "messages": MESSAGES}, system="other").messages == [{"role": "system", "content": "other"}, *MESSAGES]


def test_frames_of_a_video_are_images_by_content():
    picture, other = b"\xff\xd8\xffjpeg", b"\x89PNG\r\n\x1a\npng"
    for frames in ([picture, other], [{"bytes": picture, "path": None}, {"bytes": other, "path": "2"}]):
        [video] = of({"conversations": TALK, "video": frames, "sample_fps": "2"}).videos
        assert (video.frames, video.times, video.fps) == ((picture, other), (0.0, 0.5), 2)


def test_a_turn_may_say_the_same_twice():
    both = [{**a, **b} for a, b in zip(TALK, MESSAGES)]
    assert of({"conversations": both}).messages == MESSAGES


def test_a_webp_file_may_be_a_video():
    assert of({"conversations": TALK, "video": "cat.webp"}).videos == (VideoRef("/media/cat.webp"),)
    [frames] = of({"conversations": TALK, "video": ["1.webp", "2.webp"]}).videos
    assert frames.frames == ("/media/1.webp", "/media/2.webp")


def test_words_of_an_answer_stay_text_where_questions_place_the_media():
    said = [{"from": "human", "value": "<image>\nWrite HTML."}, {"from": "gpt", "value": "<image> and <video>"}]
    assert of({"image": "a.png", "conversations": said}).messages[1]["content"] == "<image> and <video>"
    assert of({"conversations": [TALK[0], said[1]]}).messages[1]["content"] == "<image> and <video>"


def test_roles_and_system():
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
            {"from": "observation", "value": "O"},
            {"from": "gpt", "value": "B"},
        ]
    }
    assert [message["role"] for message in of(row).messages] == ["system", "user", "assistant", "observation", "assistant"]
    assert of(row, system="other").messages[0]["content"] == "S"
    assert of({"messages": MESSAGES}, system="mine").messages == [{"role": "system", "content": "mine"}, *MESSAGES]


KEY = {"lmdb_file": "/media/x.lmdb", "lmdb_key": "k"}


@pytest.mark.parametrize(
    ("media", "images"),
    [
        ({"image": "a.png"}, ("/media/a.png",)),
        ({"image": "/elsewhere/a.png"}, ("/elsewhere/a.png",)),
        ({"image": "file:///elsewhere/a%20b.png"}, ("/elsewhere/a b.png",)),
        ({"image": "a%20b.png"}, ("/media/a%20b.png",)),
        ({"images": ["a.png", "b.png"]}, ("/media/a.png", "/media/b.png")),
        ({"image": {"lmdb_file": "x.lmdb", "lmdb_key": "k"}}, (KEY,)),
        ({"image": [{"lmdb_file": "x.lmdb", "lmdb_key": "k"}, "a.png"]}, (KEY, "/media/a.png")),
        ({"image": {"path": "a.png"}}, ("/media/a.png",)),
        ({"image": "clip1:2.png"}, ("/media/clip1:2.png",)),
        ({"image": "caf\udce9.png"}, ("/media/caf\udce9.png",)),  # a byte that is not UTF-8, as Python spells it
        ({"data": [{"type": "image", "image_list": ["a.png", {"lmdb_file": "x.lmdb", "lmdb_key": "k"}]}]}, ("/media/a.png", KEY)),
        (
            {"data": [{"type": "image", "image_list": ["a.png"]}, {"type": "image", "image_list": ["b.png"]}]},
            ("/media/a.png", "/media/b.png"),
        ),
    ],
)
def test_images(media, images):
    assert of({"conversations": TALK, **media}).images == images


@pytest.mark.parametrize(
    ("media", "videos"),
    [
        ({"video": "v.mp4"}, (VideoRef("/media/v.mp4"),)),
        ({"video": ["v.mp4", "w.mp4"]}, (VideoRef("/media/v.mp4"), VideoRef("/media/w.mp4"))),
        ({"video": {"path": "v.mp4", "start": 1, "end": 2.5}}, (VideoRef("/media/v.mp4", 1.0, 2.5),)),
        ({"video": {"video": "v.mp4", "start_time": 0, "end_time": 2}}, (VideoRef("/media/v.mp4", 0.0, 2.0),)),
        ({"video": {"path": "v.mp4", "end": 4}}, (VideoRef("/media/v.mp4", None, 4.0),)),
        ({"video": {"path": "v.mp4", "start": 1, "end": None}}, (VideoRef("/media/v.mp4", 1.0),)),
        ({"video": {"path": "v.mp4", "begin": 1, "finish": 2}}, (VideoRef("/media/v.mp4", 1.0, 2.0),)),
        ({"video": "v.mp4", "start": 1, "end": 2}, (VideoRef("/media/v.mp4", 1.0, 2.0),)),
        ({"video": "v.mp4", "video_start": 1, "video_end": 2.5}, (VideoRef("/media/v.mp4", 1.0, 2.5),)),
        ({"videos": ["v.mp4"], "clip_start": 1, "clip_end": 2}, (VideoRef("/media/v.mp4", 1.0, 2.0),)),
        ({"video": "v.mp4", "start": "1.5", "end": ""}, (VideoRef("/media/v.mp4", 1.5),)),
        ({"data": [{"type": "video", "video_list": ["v.mp4"], "start": 3}]}, (VideoRef("/media/v.mp4", 3.0),)),
        ({"video": "v.mp4", "fps": 29.97, "duration": 8}, (VideoRef("/media/v.mp4"),)),
        ({"video": ["1.jpg", "2.jpg"]}, (VideoRef(frames=("/media/1.jpg", "/media/2.jpg")),)),
        ({"videos": [["1.jpg"], "v.mp4"]}, (VideoRef(frames=("/media/1.jpg",)), VideoRef("/media/v.mp4"))),
        (
            {"video": {"frames": ["1.jpg", "2.jpg", "3.jpg"], "fps": 4}},
            (VideoRef(frames=("/media/1.jpg", "/media/2.jpg", "/media/3.jpg"), times=(0.0, 0.25, 0.5), fps=4),),
        ),
        ({"video": ["1.jpg", "2.jpg"], "fps": 2}, (VideoRef(frames=("/media/1.jpg", "/media/2.jpg"), times=(0.0, 0.5), fps=2),)),
        (
            {"video": {"video": ["1.jpg", "2.jpg", "3.jpg"], "fps": 4, "start": 0.25, "end": 0.5}},
            (VideoRef(frames=("/media/2.jpg", "/media/3.jpg"), times=(0.0, 0.25), fps=4),),
        ),
        ({"data": [{"type": "video", "video_list": ["v.mp4", {"path": "w.mp4"}]}]}, (VideoRef("/media/v.mp4"), VideoRef("/media/w.mp4"))),
        ({"document": ["1.png", "2.png"]}, (VideoRef(frames=("/media/1.png", "/media/2.png")),)),
        ({"document": [["1.png"], ["2.png"]]}, (VideoRef(frames=("/media/1.png",)), VideoRef(frames=("/media/2.png",)))),
        ({"document": "d.pdf"}, (VideoRef("/media/d.pdf"),)),
        (
            {"document": [{"pages": ["1.png"]}, {"pages": ["2.png"]}]},
            (VideoRef(frames=("/media/1.png",)), VideoRef(frames=("/media/2.png",))),
        ),
        ({"document": [{"path": "1.png"}, {"path": "2.png"}]}, (VideoRef(frames=("/media/1.png", "/media/2.png")),)),
        ({"document": [{"path": "d.pdf"}]}, (VideoRef("/media/d.pdf"),)),
        ({"document": ["d.pdf", ["1.png"]]}, (VideoRef("/media/d.pdf"), VideoRef(frames=("/media/1.png",)))),
        ({"data": [{"type": "document", "document_list": [["1.png", "2.png"]]}]}, (VideoRef(frames=("/media/1.png", "/media/2.png")),)),
    ],
)
def test_videos_and_documents(media, videos):
    sample = of({"conversations": TALK, **media})
    assert sample.videos == videos
    assert [video.is_document for video in sample.videos] == [
        (bool(video.frames) and video.times is None) or str(video.path).endswith(".pdf") for video in videos
    ]


@pytest.mark.parametrize(
    ("start", "end"), [(f"{a}start{b}", f"{a}end{b}") for a, b in (("", ""), ("", "_time"), ("video_", ""), ("clip_", ""))]
)
@pytest.mark.parametrize("place", ["mapping", "part", "part url", "inner", "row", "data"])
def test_bounds_of_clips_in_every_place(place, start, end):
    bounds = {start: 1.0, end: 2.0}
    parts = {
        "part": {"type": "video", "video": "v.mp4", **bounds},
        "part url": {"type": "video_url", "video_url": {"url": "v.mp4"}, **bounds},
        "inner": {"type": "video", "video": {"path": "v.mp4", **bounds}},
    }
    rows = {
        "mapping": {"video": {"path": "v.mp4", **bounds}, "conversations": TALK},
        "row": {"video": "v.mp4", **bounds, "conversations": TALK},
        "data": {"data": [{"type": "video", "video": "v.mp4", **bounds}], "conversations": TALK},
    }
    row = rows.get(place) or {"messages": [{"role": "user", "content": [parts[place]]}, MESSAGES[1]]}
    assert of(row).videos == (VideoRef("/media/v.mp4", 1.0, 2.0),)


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [(key, *pair) for key in ("loss", "train", "trainable", "weight", "loss_mask") for pair in ((False, True), (0, 1), (0.0, 1.0))],
)
def test_turns_say_whether_they_are_learned(key, no, yes):
    turns = [MESSAGES[0], {**MESSAGES[1], key: no}, MESSAGES[0], {**MESSAGES[1], key: yes}, MESSAGES[0], {**MESSAGES[1], key: None}]
    learned = [message.get("train", True) for message in of({"messages": turns}).messages]
    assert learned == [True, False, True, True, True, True]


def test_a_system_message_in_the_row():
    assert of({"system": "S", "conversations": TALK}, system="other").messages == [{"role": "system", "content": "S"}, *MESSAGES]
    said = [{"role": "system", "content": "S"}, *MESSAGES]
    assert of({"system": "S", "messages": said}).messages == said
    assert of({"system": "", "messages": MESSAGES}, system="mine").messages[0]["content"] == "mine"


def test_placeholders_of_several_documents():
    row = {"documents": [["1.png"], ["2.png"]], "video": "v.mp4"}
    talk = [{"from": "human", "value": "<video> or <document> or\n<document>?"}, TALK[1]]
    assert of({**row, "conversations": talk}).messages[0]["content"] == "<video-1> or <video-2> or\n<video-3>?"
    with pytest.raises(RowError, match="3 placeholders <document> without a number, but 2 documents"):
        of({**row, "conversations": [{"from": "human", "value": "<document>" * 3}, TALK[1]]})
    with pytest.raises(RowError, match="<document-3> has no document: the row has 2"):
        of({**row, "conversations": [{"from": "human", "value": "<document-3>"}, TALK[1]]})


def test_parts_without_a_medium_show_those_of_the_row():
    """TRL's form: `{"type": "image"}` in the content, and the images in a column."""
    parts = [
        {"type": "image"},
        {"type": "text", "text": "or"},
        {"type": "image", "text": None, "image": None},
        {"type": "text", "text": "?"},
    ]
    row = {"images": ["a.png", {"bytes": None, "path": "b.png"}], "messages": [{"role": "user", "content": parts}, MESSAGES[1]]}
    sample = of(row)
    assert (sample.messages[0]["content"], sample.images) == ("<image-1>or<image-2>?", ("/media/a.png", "/media/b.png"))
    for images in (["a.png"], ["a.png"] * 3):
        with pytest.raises(RowError, match=rf"the row has {len(images)}"):
            of({**row, "images": images})


@pytest.mark.parametrize(
    "part",
    [
        {"path": "a.png"},
        {"url": "a.png"},
        {"image": "a.png"},
        {"image": {"path": "a.png"}},
        {"image_url": {"url": "a.png", "detail": "low"}},
    ],
)
def test_images_of_parts(part):
    kind = "image_url" if "image_url" in part else "image"
    row = {
        "messages": [{"role": "user", "content": [[{"type": kind, **part}], {"type": "text", "text": "Is <image> a tag?"}]}, MESSAGES[1]]
    }
    assert of(row).images == ("/media/a.png",)
    assert of(row).messages[0] == {"role": "user", "content": "<image-1>Is <image> a tag?", "numbered": True}


def test_images_in_answers_are_context():
    row = {
        "messages": [MESSAGES[0], {"role": "assistant", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Done."}]}]
    }
    assert of(row).messages[1] == {"role": "assistant", "content": "<image-1>Done.", "numbered": True}


def test_columns_of_tables_that_are_null():
    row = {
        "image": None,
        "images": [],
        "video": [None],
        "id": 7,
        "document": "",
        "start": None,
        "data": None,
        "system": None,
        "conversations": None,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q", "image": None}], "loss": None, "tool_calls": []},
            {"role": "assistant", "content": "A", "value": None},
        ],
    }
    row.pop("document")
    assert of(row) == Sample(MESSAGES, (), (), "s", 3)
    with pytest.raises(RowError, match="'image' of the row is null"):
        of({"image": None, "conversations": [{"from": "human", "value": "<image>?"}, TALK[1]]})


def test_ways_to_hold_turns():
    assert of({"conversations": '[{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]'}).messages == MESSAGES
    assert of({"texts": [{"user": "Q", "assistant": "A", "source": "x"}]}).messages == MESSAGES
    form = RowFormat(columns=(("question", "q"), ("answer", "a")))
    assert of({"q": "Q", "a": "A", "images": None}, form=form).messages == MESSAGES
    assert of({"q": 4, "a": 0.5}, form=form).messages[1]["content"] == "0.5"
    assert of({"a": "A"}, form=RowFormat(columns=(("answer", "a"),), question="Q")).messages == MESSAGES
    with pytest.raises(RowError, match="both hold the turns"):
        of({"conversations": TALK, "messages": MESSAGES})
    with pytest.raises(RowError, match="has an answer and no question"):
        of({"a": "A"}, form=form)


def test_bytes_are_media(tmp_path):
    assert of({"image": {"bytes": b"x", "path": "a.png"}, "conversations": TALK}).images == (b"x",)
    assert of({"image": b"x", "conversations": TALK}).images == (b"x",)
    form = RowFormat(media=str(tmp_path / "media"))
    video = of({"video": {"bytes": b"film", "start": 1}, "conversations": TALK}, form=form).videos[0]
    assert (Path(video.path).read_bytes(), video.start) == (b"film", 1.0)
    document = of({"document": {"bytes": b"%PDF-1"}, "conversations": TALK}, form=form).videos[0]
    assert document.is_paged
    with pytest.raises(RowError, match="needs a folder of facts"):
        of({"video": b"film", "conversations": TALK})


def test_metadata_changes_nothing():
    metadata = {"id": "a.b", "source": "made", "image_id": 7, "width": [3], "score": 0.5, "url": "https://example.org/page", "img": None}
    assert of({**metadata, "conversations": TALK}) == Sample(MESSAGES, (), (), "s", 3)
    assert of({"img": "x", "conversations": TALK}, form=RowFormat(ignore=("img",))) == Sample(MESSAGES, (), (), "s", 3)


def test_mixed_and_interleaved():
    row = {
        "conversations": [
            {"from": "human", "value": "<video-1> <image-2> <document-1> <image-1> <document-2>"},
            {"from": "gpt", "value": "A"},
        ],
        "data": [
            {"type": "image", "image_list": ["a.png"]},
            {"type": "video", "video_list": ["v.mp4"]},
            {"type": "image", "image_list": ["b.png"]},
        ],
        "document": [["1.png"], ["2.png"]],
    }
    sample = of(row)
    assert sample.images == ("/media/a.png", "/media/b.png")
    assert [video.path or video.frames[0] for video in sample.videos] == ["/media/v.mp4", "/media/1.png", "/media/2.png"]
    assert sample.messages[0]["content"] == "<video-1> <image-2> <video-2> <image-1> <video-3>"


def test_content_parts_stand_where_they_are_shown():
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": " and "},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "video", "video": {"path": "v.mp4", "start": 1}},
        {"type": "document", "document": ["1.png", "2.png"]},
        {"type": "document", "document": [{"pages": ["3.png"]}, {"pages": ["4.png"]}]},
        {"type": "text", "text": "?"},
    ]
    sample = of({"messages": [{"role": "user", "content": parts}, MESSAGES[1]]})
    assert sample.messages[0]["content"] == "<image-1> and <image-2><video-1><video-2><video-3><video-4>?"
    assert sample.images == ("/media/a.png", "/media/b.png")
    assert [len(video.frames) for video in sample.videos] == [0, 2, 1, 1]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "bad-row", "no 'conversations'"),
        ({"conversations": []}, "bad-row", "no 'conversations'"),
        ({"conversations": "x"}, "bad-row", "no 'conversations'"),
        ({"conversations": ["x"]}, "bad-row", "turn 1 is a str"),
        ({"conversations": [{"value": "x"}]}, "bad-row", "turn 1 is from None"),
        ({"conversations": [*TALK, {"from": "system", "value": "x"}]}, "bad-row", "may only come first"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "bad-row", "no turn from the user"),
        ({"conversations": TALK[::-1]}, "bad-row", "no turn from the user before the assistant's last one"),
        ({"conversations": TALK[:1]}, "no-assistant-turn", "nothing to learn"),
        ({"conversations": [{"from": "human", "value": None}]}, "bad-row", "text of turn 1 is a NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "bad-row", "known types are text"),
        ({"conversations": TALK, "data": {}}, "bad-media", "data is a dict"),
        ({"conversations": TALK, "data": [{"type": "sound"}]}, "bad-media", "has no 'type' of"),
        ({"conversations": TALK, "data": [{"type": "image"}]}, "bad-media", "no 'image_list'"),
        ({"conversations": TALK, "image": ""}, "bad-media", "expected a path"),
        ({"conversations": TALK, "image": {"lmdb_file": "x"}}, "bad-media", "expected a path"),
        ({"conversations": TALK, "image": "a\0b"}, "bad-media", "zero byte"),
        ({"conversations": TALK, "image": "s3://bucket/a.png"}, "bad-media", "download it first"),
        ({"conversations": TALK, "image": "data:image/png;base64,iVBORw0="}, "bad-media", "is an address"),
        ({"conversations": TALK, "image": "iVBORw0K" * 1000}, "bad-media", "has 8000 characters and is not a path"),
        ({"conversations": TALK, "video": "\ud83d.mp4"}, "bad-media", "can't be a path"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": "look \ud83d"}]}, "bad-row", "text of turn 2 has half of a surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]}, "bad-row", "text of turn 1 has half of a"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": []}]}]}, "bad-media", "shows no image"),
        ({"conversations": TALK, "video": {"path": "v", "end": 10**400}}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": {"path": "v", "start": "1:75"}}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": {"path": "v", "start": True}}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": {"path": "v", "clip": [1, 2, 3]}}, "bad-media", "expected [start, end] in seconds"),
        ({"conversations": TALK, "video": {"path": "v", "clip": [1, 2], "end": 3}}, "bad-media", "several bounds"),
        ({"conversations": TALK, "video": {"path": "v", "start_frame": 3}}, "unknown-key", "'start_frame'; known are bytes, end, file"),
        ({"conversations": TALK, "video": {"path": "v", "offset": 3}}, "unknown-key", "'offset', which is for members of a tar file"),
        ({"conversations": TALK, "video": "v.mp4", "start": 1, "duration": 2}, "unknown-key", "the start of a clip and 'duration'"),
        (
            {"start": 1, "messages": [{"role": "user", "content": [{"type": "video", "video": "v"}]}, MESSAGES[-1]]},
            "bad-media",
            "another place",
        ),
        ({"conversations": TALK, "video": {"path": "v", "start": -1}}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": {"path": "v", "start": 3, "end": 3}}, "bad-media", "not after its start"),
        ({"conversations": TALK, "document": [[]]}, "bad-media", "no pages"),
        ({"conversations": TALK, "img": "x"}, "unknown-key", "the row has 'img' = 'x', which nothing reads"),
        ({"conversations": TALK, "pdf": "a.pdf"}, "unknown-key", "'pdf'"),
        ({"conversations": TALK, "attachment": ["a.JPG"]}, "unknown-key", "'attachment'"),
        ({"conversations": TALK, "blob": b"abc"}, "unknown-key", "'blob' = <3 bytes>"),
        ({"conversations": TALK, "tools": [{"name": "f"}]}, "unknown-key", "'tools'"),
        ({"conversations": TALK, "loss": False}, "unknown-key", "'loss'"),
        ({"conversations": TALK, "weight": 0.5}, "unknown-key", "'weight'"),
        ({"conversations": [TALK[0], {**TALK[1], "image": "a.png"}]}, "unknown-key", "turn 2 has 'image'; media stand in the row itself"),
        ({"conversations": [TALK[0], {**TALK[1], "tool_calls": [{}, 1]}]}, "unknown-key", "'tool_calls'"),
        ({"conversations": [TALK[0], {**TALK[1], "weight": 0.5}]}, "bad-row", "weight of turn 2 is 0.5"),
        ({"conversations": [TALK[0], {**TALK[1], "loss": True, "train": False}]}, "bad-row", "keep one of them"),
        ({"conversations": [{**TALK[0], "loss": True}, TALK[1]]}, "bad-row", "only turns of the assistant are learned"),
        ({"conversations": [{**TALK[0], "role": "assistant"}, TALK[1]]}, "bad-row", "turn 1 is from 'human' and has the role 'assistant'"),
        ({"conversations": [TALK[0], {**TALK[1], "content": "B"}]}, "bad-row", "turn 2 has a value and another content"),
        ({"system": "S", "messages": [{"role": "system", "content": "T"}, *MESSAGES]}, "bad-row", "with another text"),
        ({"system": 5, "messages": MESSAGES}, "bad-row", "system is a int"),
        ({"conversations": TALK, "video": ["v.mp4", "w.mp4"], "start": 1}, "bad-media", "stands next to 2 videos"),
        ({"conversations": TALK, "video": {"path": "v.mp4", "start": 1, "start_time": 2}}, "bad-media", "several bounds"),
        ({"conversations": TALK, "video": {"path": "v.mp4", "start": 1}, "start": 2}, "bad-media", "two values of start"),
        ({"conversations": TALK, "video": "v.mp4", "start": "soon"}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": "1.jpg"}, "bad-media", "the video '1.jpg' is an image; give it as an image, or"),
        ({"conversations": TALK, "video": {"path": "1.png"}}, "bad-media", "is an image"),
        ({"conversations": TALK, "video": {"bytes": b"\xff\xd8\xff", "path": None}}, "bad-media", "is an image"),
        ({"conversations": TALK, "video": ["1.jpg"], "fps": 2, "sample_fps": 3}, "bad-media", "several rates: fps = 2.0, sample_fps = 3.0"),
        ({"conversations": TALK, "video": ["1.jpg"], "fps": "fast"}, "bad-media", "fps is 'fast', expected a number"),
        ({"conversations": TALK, "instruction": "Be brief."}, "unknown-key", "'instruction'"),
        ({"system": "S", "system_prompt": "T", "messages": MESSAGES}, "bad-row", "'system' and 'system_prompt' with different texts"),
        ({"image": "a", "conversations": [TALK[0], {"from": "gpt", "value": "<image> Done"}]}, "placeholders", "an answer says <image>"),
        ({"conversations": TALK, "video": {"path": "v.mp4", "nframes": 4}}, "unknown-key", "a video has the keys 'nframes'"),
        ({"conversations": TALK, "video": {"path": "v.mp4", "fps": 1}}, "bad-media", "sampling.fps"),
        ({"conversations": TALK, "video": {"frames": ["1.jpg"], "end": 1}}, "bad-media", "no fps"),
        ({"conversations": TALK, "video": {"frames": ["1.jpg"], "fps": 0}}, "bad-media", "fps is 0"),
        ({"conversations": TALK, "video": {"frames": ["1.jpg"], "fps": 1, "start": 5}}, "bad-media", "no frame lies between"),
        ({"conversations": TALK, "data": [{"type": "image", "image": "a", "crop": 1, "file": "b"}]}, "unknown-key", "'file'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "max_pixels": 9}]}]}, "unknown-key", "'max_pixels'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "bad-media", "without a image in it"),
        ({"texts": [{"user": "Q"}]}, "bad-row", "texts: item 1"),
        ({"conversations": "[1"}, "bad-row", "isn't JSON"),
    ],
)
def test_what_can_not_be_understood_is_named(row, reason, detail):
    with pytest.raises(RowError) as caught:
        of(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


@pytest.mark.parametrize(
    "said",
    [
        *({start: 1.5, end: 62.5} for start, end in zip(STARTS, ENDS, strict=True)),
        {"startTime": "1.5", "endTime": "62.5 s"},
        {"clip_start_sec": "00:01.5", "clip_end_sec": "0:01:02.5"},
    ],
)
def test_bounds_in_every_spelling_and_place(said):
    part = {"type": "video", "video": "v.mp4", **said}
    for row in (
        {"conversations": TALK, "video": "v.mp4", **said},
        {"conversations": TALK, "video": {"path": "v.mp4", **said}},
        {"conversations": TALK, "videos": [{"video": "v.mp4", **said}]},
        {"conversations": TALK, "data": [{"type": "video", "video_list": ["v.mp4"], **said}]},
        {"conversations": TALK, "data": [{"type": "video", "video_list": [{"video": "v.mp4", **said}]}]},
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Q"}]}, MESSAGES[-1]]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "v.mp4", **said}}]}, MESSAGES[-1]]},
    ):
        [video] = of(row).videos
        assert (video.start, video.end) == (1.5, 62.5), row


@pytest.mark.parametrize("key", RANGES)
@pytest.mark.parametrize("value", [[1.5, "1:02.5"], {"start": 1.5, "end_time": 62.5}])
def test_both_bounds_in_one_key(key, value):
    part = {"type": "video", "video": "v.mp4", key: value}
    for row in (
        {"conversations": TALK, "video": {"path": "v.mp4", key: value}},
        {"messages": [{"role": "user", "content": [part]}, MESSAGES[-1]]},
    ):
        [video] = of(row).videos
        assert (video.start, video.end) == (1.5, 62.5)
    with pytest.raises(RowError, match=key):  # next to a video it may be what the answer is about
        of({"conversations": TALK, "video": "v.mp4", key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("timestamp", 3),
        ("timestamps", [1, 2]),
        ("interval", ["0:01", "0:02"]),
        ("start_ms", 1000),
        ("frame_range", [3, 9]),
        ("to", 5),
        ("offset", 1),
    ],
)
def test_what_may_be_a_bound_is_refused_next_to_a_video_only(key, value):
    with pytest.raises(RowError, match=f"the row has '{key}'"):
        of({"conversations": TALK, "video": "v.mp4", key: value})
    assert of({"conversations": TALK, key: value, "image": "a.png"}).images
    assert of({"conversations": TALK, "video": "v.mp4", key: value}, form=RowFormat(ignore=(key,))).videos
    assert of({"conversations": TALK, "video": "v.mp4", key: [[1, 2], [3, 4]], "duration": 9.0}).videos  # captions with times: metadata


def test_rows_are_read_by_their_offset(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    lines = [b'{"a": "\xc3\xa4"}', b'{"b": 2}']
    path.write_bytes(b"\n".join(lines))
    assert open_rows(str(path)).get(0, len(lines[0])) == {"a": "ä"}
    assert open_rows(str(path)).get(len(lines[0]) + 1, len(lines[1])) == {"b": 2}
    with pytest.raises(RowError, match="broken-json"):
        open_rows(str(path)).get(1, 5)
    for line, problem in ((b"3", "expected an object"), (b'{"id": ' + b"1" * 5000 + b"}", "integer string conversion")):
        with pytest.raises(RowError, match=problem):
            parse_row(line)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(RowError("reason", "detail")))
    assert (error.reason, error.detail, str(error)) == ("reason", "detail", "reason: detail")
