"""Rows with one image each through `prepare`, header only, in one process: rows per second of CPU, by where the images are.

    python packages/eagle-train/benchmarks/image_rows.py [ROWS] [--out FILE.json] [--profile FORMAT]

Every row has an image of its own: JPEG with EXIF, PNG or WebP, 40 to 400 pixels wide, 1 to 60 KB. The question and the answer differ from
row to row. The tokenizer is a trained byte-level BPE.
"""

import argparse
import cProfile
import io
import json
import pstats
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_model.tokenizer import train_tokenizer
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare

METRICS = {"rows_per_cpu_s": Metric("", "higher"), "rows_per_s": Metric("", "higher"), "rows": Metric("", "none")}
KINDS = ("jpg", "png", "webp")
TEXT = "the a picture shows two red blue green boats houses people near water under clear sky what colour is how many are there"
WORDS = TEXT.split(" ")


def pictures(count: int, rng: np.random.Generator) -> list[tuple[str, bytes]]:
    """Images as (suffix, bytes): 300 different ones, again and again."""
    made = []
    for number in range(min(count, 300)):
        kind = KINDS[number % 3]
        width, height = (int(side) for side in rng.integers(40, 400, 2))
        small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height))
        exif = Image.Exif()
        exif[0x010F] = "camera"
        content = io.BytesIO()
        image.save(content, {"jpg": "JPEG"}.get(kind, kind.upper()), **({"exif": exif} if kind == "jpg" else {}))
        made.append((kind, content.getvalue()))
    return [made[number % len(made)] for number in range(count)]


def write(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    said = [" ".join(rng.choice(WORDS, int(length))) for length in rng.integers(5, 60, count)]
    images = pictures(count, rng)
    (folder / "images").mkdir()
    table = []
    with open(folder / "files.jsonl", "w") as file, tarfile.open(folder / "tars.tar", "w") as tar:
        for number, (text, (suffix, content)) in enumerate(zip(said, images)):
            turns = [{"from": "human", "value": f"<image>\n{text}?"}, {"from": "gpt", "value": f"The answer is {number}: {text}."}]
            name = f"images/{number:07d}.{suffix}"
            (folder / name).write_bytes(content)
            file.write(json.dumps({"image": name, "conversations": turns}) + "\n")
            table.append({"image": {"bytes": content, "path": None}, "conversations": turns})
            for kind, data in (("json", json.dumps({"conversations": turns}).encode()), (suffix, content)):
                member = tarfile.TarInfo(f"{number:07d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(table), folder / "parquet.parquet", row_group_size=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=int, default=20_000, metavar="ROWS", help="default: 20000")
    parser.add_argument("--profile", choices=["files.jsonl", "parquet.parquet", "tars.tar"], help="print where the time of one goes")
    add_out(parser)
    options = parser.parse_args()
    result = Result("eagle-train/image_rows", environment(("pillow", "pyarrow", "tokenizers")), METRICS)
    tokenizer = train_tokenizer([TEXT, "human gpt ? 0123456789"], 400)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.rows)
        for annotation in [options.profile] if options.profile else ["files.jsonl", "parquet.parquet", "tars.tar"]:
            data = {"sources": {"s": {"annotation": annotation}}, "workers": 1, "verify": "header", "facts": f"facts-{annotation}"}
            config = parse_config({"data": data}, base=folder)
            profile = cProfile.Profile()
            start, used = time.perf_counter(), time.process_time()
            if options.profile:
                profile.enable()
            done = prepare(config, tokenizer)
            profile.disable()
            seconds, used = time.perf_counter() - start, time.process_time() - used
            assert done.good_rows == options.rows, done.reasons
            result.add(annotation, rows_per_cpu_s=done.rows / used, rows_per_s=done.rows / seconds, rows=done.rows)
            if options.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    report(result, options.out)


if __name__ == "__main__":
    main()
