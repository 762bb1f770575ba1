"""The same rows in every format of annotation files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tables(folder: Path, rows: list[dict]) -> dict[str, Path]:
    """The rows as files of every format."""
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    files = {
        "jsonl": lines,
        "json": json.dumps(rows, indent=2).encode(),
        "compact.json": json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode(),
        "jsonl.gz": gzip.compress(lines),
        "jsonl.bz2": bz2.compress(lines),
        "json.xz": lzma.compress(json.dumps(rows).encode()),
    }
    for name, content in files.items():
        (folder / f"rows.{name}").write_bytes(content)
    with pa.CompressedOutputStream(pa.OSFile(str(folder / "rows.jsonl.zst"), "wb"), "zstd") as file:
        file.write(lines)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(folder / f"rows.{name}", "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(columns)
            for row in rows:
                cells = [row.get(key, "") for key in columns]
                writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    table = pa.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])  # nulls where a row has no such key
    pq.write_table(table, folder / "rows.parquet", row_group_size=3)
    with pa.ipc.new_stream(folder / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, row in enumerate(rows):
            content = json.dumps(row).encode()
            member = tarfile.TarInfo(f"{number:06d}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return {path.name.removeprefix("rows."): path for path in folder.glob("rows.*")}
