"""Rows: every accepted spelling becomes the same sample."""

import pickle
from pathlib import Path

import pytest

from eagle_train.data.sample import RowError, Sample, VideoRef, normalise, parse_row
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
    assert [video.is_document for video in sample.videos] == [bool(video.frames) or video.path.endswith(".pdf") for video in videos]


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
        ({"conversations": TALK, "image": "iVBORw0K" * 1000}, "bad-media", "has 8000 characters and is no path"),
        ({"conversations": TALK, "video": "\ud83d.mp4"}, "bad-media", "can't be a path"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": "look \ud83d"}]}, "bad-row", "text of turn 2 has half of a surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]}, "bad-row", "text of turn 1 has half of a"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": []}]}]}, "bad-media", "shows no image"),
        ({"conversations": TALK, "video": {"path": "v", "end": 10**400}}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": {"path": "v", "start": "1"}}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": {"path": "v", "start": -1}}, "bad-media", "expected seconds"),
        ({"conversations": TALK, "video": {"path": "v", "start": 3, "end": 3}}, "bad-media", "not after its start"),
        ({"conversations": TALK, "document": [[]]}, "bad-media", "no pages"),
    ],
)
def test_what_can_not_be_understood_is_named(row, reason, detail):
    with pytest.raises(RowError) as caught:
        of(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


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
