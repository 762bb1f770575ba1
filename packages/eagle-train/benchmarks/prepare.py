"""Rows per second of `prepare` on the questions and images of easy-VQA, by processes and `data.verify`, and by format of the rows.

Formats are measured in one process with `data.verify: header`. In Parquet images are bytes in a column, in the tar file they are members.

python packages/eagle-train/benchmarks/prepare.py [WORKERS ...] [--out FILE.json]
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from eagle_model.prompt import EAGLE_TOKENS
from eagle_train.config import parse_config
from eagle_train.data.prepare import prepare

METRICS = {"rows_per_s": Metric("", "higher"), "found_again_s": Metric("s", "lower"), "rows": Metric("", "none")}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>", *EAGLE_TOKENS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def write_table_and_tar(folder: Path) -> None:
    """The rows of rows.jsonl with their images inside, as rows.parquet and rows.tar."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    table = [row | {"image": {"bytes": Path(row["image"]).read_bytes(), "path": None}} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "rows.parquet", row_group_size=1000)
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, row in enumerate(table):
            said = json.dumps({"conversations": row["conversations"]}).encode()
            for suffix, content in (("json", said), ("png", row["image"]["bytes"])):
                member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workers", nargs="*", type=int, default=[1, 2], metavar="WORKERS", help="numbers of processes (default: 1 2)")
    add_out(parser)
    options = parser.parse_args()
    from easy_vqa import get_train_image_paths, get_train_questions

    result = Result("eagle-train/prepare", environment(("easy-vqa", "transformers", "pyarrow")), METRICS)
    tokenizer = byte_tokenizer()
    questions, answers, images = get_train_questions()
    paths = get_train_image_paths()
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder) / "rows.jsonl", "w") as file:
            for question, answer, image in zip(questions, answers, images):
                turns = [{"from": "human", "value": f"<image>{question}"}, {"from": "gpt", "value": answer}]
                file.write(json.dumps({"image": paths[image], "conversations": turns}) + "\n")
        write_table_and_tar(Path(folder))
        cases = [("rows.jsonl", verify, workers) for verify in ("header", "ends", "decode") for workers in options.workers]
        for name, verify, workers in [*cases, ("rows.parquet", "header", 1), ("rows.tar", "header", 1)]:
            facts = f"{name}-{verify}-{workers}"
            data = {"sources": {"s": {"annotation": name}}, "workers": workers, "verify": verify, "facts": facts}
            config = parse_config({"data": data}, base=Path(folder))
            start = time.perf_counter()
            prepared = prepare(config, tokenizer)
            seconds = time.perf_counter() - start
            again = time.perf_counter()
            prepare(config, tokenizer)
            again = time.perf_counter() - again
            result.add(
                f"{name}, verify {verify}, {workers} processes", rows_per_s=prepared.rows / seconds, found_again_s=again, rows=prepared.rows
            )
    report(result, options.out)


if __name__ == "__main__":
    main()
