"""Media, rows and a tokenizer for this example, as a stand-in for your own: python make_data.py FOLDER.

Writes FOLDER/images/*.png, FOLDER/videos/*.mp4, FOLDER/train.jsonl, FOLDER/held_out.jsonl and FOLDER/tokenizer/. One row of train.jsonl
names an image that does not exist, to show what becomes of it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from eagle_model.tokenizer import train_tokenizer

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 70), "blue": (50, 70, 210), "yellow": (230, 210, 50)}
SHAPES = ("circle", "square")


def draw(colour: str, shape: str, rng: np.random.Generator) -> Image.Image:
    """A shape of random size and place on grey, 96 x 64 pixels."""
    image = Image.new("RGB", (96, 64), (128, 128, 128))
    side = int(rng.integers(28, 48))
    x, y = (int(rng.integers(2, limit - side)) for limit in image.size)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + side, y + side), fill=COLOURS[colour])
    return image


def write_video(path: Path, frames: list[Image.Image], fps: int = 4) -> None:
    """H.264, each frame shown for a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in frames:
            for _ in range(fps):
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def rows(folder: Path, name: str, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows in three of the accepted spellings: conversations with `image`, OpenAI's content parts, and a video."""
    result: list[dict[str, Any]] = []
    for number in range(count):
        colour, shape = (str(rng.choice(list(values))) for values in (COLOURS, SHAPES))
        picture = f"images/{name}-{number}.png"
        draw(colour, shape, rng).save(folder / picture)
        if number % 3 == 0:
            question = {"from": "human", "value": "<image>\nWhat colour is the shape?"}
            result.append({"image": picture, "conversations": [question, {"from": "gpt", "value": colour}]})
        elif number % 3 == 1:
            parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What colour is the shape?"}]
            result.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": colour}]})
        else:
            last = str(rng.choice(list(COLOURS)))
            clip = f"videos/{name}-{number}.mp4"
            write_video(folder / clip, [draw(colour, shape, rng), draw(last, shape, rng)])
            question = {"from": "human", "value": "<video>\nWhat colour is shown last?"}
            result.append({"video": clip, "conversations": [question, {"from": "gpt", "value": last}]})
    return result


def main() -> None:
    """Write everything."""
    folder = Path(sys.argv[1])
    for name in ("images", "videos"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    train = rows(folder, "train", 60, rng)
    train[3]["image"] = "images/not-there.png"
    for name, content in (("train", train), ("held_out", rows(folder, "held_out", 12, rng))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    texts = ["What colour is the shape?", "What colour is shown last?", *COLOURS]
    train_tokenizer(texts, vocab_size=400).save_pretrained(folder / "tokenizer")
    print(f"wrote {len(train)} training rows and 12 held-out rows to {folder}")


if __name__ == "__main__":
    main()
