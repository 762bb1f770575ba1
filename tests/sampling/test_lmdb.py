"""LMDB: one environment per process and path under threads and forks; builds that survive being killed."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading

import lmdb
import numpy as np
import pytest
from PIL import Image

from eagle_sampling import MediaError, build_lmdb, check_lmdb, image_size, lmdb_store, open_image
from eagle_sampling.images import exists


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 6 + seed % 5, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    (path / "deep").mkdir(parents=True)
    for i in range(40):
        (path / ("deep" if i % 2 else "") / f"{i:03d}.png").write_bytes(picture(i))
    (path / "notes.txt").write_text("no image")
    return path


@pytest.fixture
def store(folder, tmp_path):
    build_lmdb(tmp_path / "store", [folder])
    return tmp_path / "store"


def test_images_come_back(store, folder):
    ref = {"lmdb_file": str(store), "lmdb_key": "deep/007.png"}
    assert open_image(ref).size == image_size(ref) == image_size(folder / "deep/007.png") == (8, 8)
    assert image_size({"lmdb_file": "store", "lmdb_key": "deep/007.png"}, root=store.parent) == (8, 8)
    assert exists(ref)
    assert not exists({**ref, "lmdb_key": "none"})


def test_missing_key_and_file_are_named(store, tmp_path):
    with pytest.raises(MediaError, match=r"store\['none'\]: the LMDB has no such key"):
        open_image({"lmdb_file": str(store), "lmdb_key": "none"})
    with pytest.raises(MediaError, match=r"nowhere: there is no such LMDB"):
        lmdb_store.get(tmp_path / "nowhere", "a")
    (tmp_path / "text").write_text("no lmdb " * 1000)
    with pytest.raises(MediaError, match=r"text: can't be opened as an LMDB"):
        lmdb_store.get(tmp_path / "text", "a")


def test_one_environment_for_all_names_of_a_path(store, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(store)
    for name in (str(store), store, str(link), str(store) + "/"):
        assert lmdb_store.get(name, "000.png") == picture(0)
    if int(lmdb.__version__.split(".")[0]) >= 2:  # older ones open a path twice without a word
        with pytest.raises(lmdb.Error, match="already open"):
            lmdb.open(str(store), readonly=True, lock=False)
    lmdb_store.close_all()
    lmdb.open(str(store), readonly=True, lock=False).close()


def test_threads_read_together_while_others_close(store):
    wrong = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 40, 400).tolist():
            key = f"deep/{i:03d}.png" if i % 2 else f"{i:03d}.png"
            if lmdb_store.get(store, key) != picture_of[i]:
                wrong.append(i)

    picture_of = [picture(i) for i in range(40)]
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        lmdb_store.close_all()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_read_and_the_parent_goes_on(store):
    """In a process of its own, so that no other library's threads are forked with it; readers run while it forks."""
    code = """
import os, sys, threading
from eagle_sampling import lmdb_store
path = sys.argv[1]
expected = lmdb_store.get(path, "000.png")
stop = False
def busy():
    while not stop:
        assert lmdb_store.get(path, "000.png") == expected
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads: thread.start()
bad = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if lmdb_store.get(path, "000.png") == expected else 1)
    bad += os.waitpid(child, 0)[1] != 0
stop = True
for thread in threads: thread.join()
assert lmdb_store.get(path, "000.png") == expected
print("bad", bad)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(store)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "bad 0", done.stderr


def test_check_finds_what_build_wrote_and_what_changed(store):
    found = check_lmdb(store)
    assert found.ok
    assert found.keys == 40
    assert json.loads((store / "manifest.json").read_text())["keys"] == 40
    lmdb_store.close_all()
    with lmdb.open(str(store), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"000.png", picture(3))
        transaction.put(b"bad.png", b"rubbish")
    found = check_lmdb(store)
    assert not found.ok
    assert {key for key, _ in found.problems} == {"bad.png", ""}


def test_bad_images_doubles_and_bad_keys_are_listed_not_stored(folder, tmp_path):
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "000.png").write_bytes(picture(99))
    (other / "002.png").write_bytes(picture(2))  # the same again: no problem
    result = build_lmdb(tmp_path / "store", [folder, other])
    assert result.written == 40
    assert [key for key, _ in result.problems] == ["cut.png", "000.png"]
    assert lmdb_store.get(tmp_path / "store", "000.png") == picture(0)


def test_tar_and_parquet_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(5):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(picture(i))
            archive.addfile(info, io.BytesIO(picture(i)))
    sources = [tmp_path / "a.tar"]
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        pass
    else:
        rows = [{"bytes": picture(i), "path": f"p/{i}.png"} for i in range(5)]
        pq.write_table(pa.table({"image": rows, "label": list(range(5))}), tmp_path / "b.parquet")
        pq.write_table(pa.table({"key": ["x", "y"], "data": [picture(7), picture(8)]}), tmp_path / "c.parquet")
        sources += [tmp_path / "b.parquet", tmp_path / "c.parquet"]
    result = build_lmdb(tmp_path / "store", sources)
    assert not result.problems
    assert lmdb_store.get(tmp_path / "store", "4.png") == picture(4)
    if len(sources) > 1:
        assert result.written == 12
        assert lmdb_store.get(tmp_path / "store", "p/3.png") == picture(3)
        assert lmdb_store.get(tmp_path / "store", "y") == picture(8)


def test_an_interrupted_build_goes_on(folder, tmp_path):
    class Killed(Exception):
        pass

    def stop(progress):
        if progress.done >= 20:
            raise Killed

    with pytest.raises(Killed):
        build_lmdb(tmp_path / "store", [folder], commit_bytes=500, progress=stop)
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="interrupted build of other sources"):
        build_lmdb(tmp_path / "store", [tmp_path])
    result = build_lmdb(tmp_path / "store", [folder], commit_bytes=500)
    assert (result.written, result.problems) == (40, [])
    assert 15 <= result.resumed < 40
    assert check_lmdb(tmp_path / "store").ok
    with pytest.raises(FileExistsError):
        build_lmdb(tmp_path / "store", [folder])


def test_the_map_grows(tmp_path, monkeypatch):
    opened = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda path, **how: opened(path, **{**how, "map_size": 1 << 16} if "map_size" in how else how))
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    assert build_lmdb(tmp_path / "store", [folder]).written == 6
    assert check_lmdb(tmp_path / "store").ok
