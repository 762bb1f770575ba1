"""LMDB: one environment per process and path under threads and forks; builds that continue after a kill."""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest

from eagle_sampling import MediaError, build_lmdb, check_lmdb, image_size, open_image
from eagle_sampling.images import exists
from eagle_sampling.lmdb import build as lmdb_build
from eagle_sampling.lmdb import store as lmdb_store
from tests.support.media import encoded, random_image


def picture(seed: int) -> bytes:
    return encoded(random_image(seed, (6 + seed % 5, 8)))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    (path / "deep").mkdir(parents=True)
    for i in range(40):
        (path / ("deep" if i % 2 else "") / f"{i:03d}.png").write_bytes(picture(i))
    (path / "notes.txt").write_text("not an image")
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
    (tmp_path / "folder").mkdir()
    with pytest.raises(MediaError, match=r"folder: is a folder without data\.mdb, not an LMDB; name the file or folder of an LMDB"):
        lmdb_store.get(tmp_path / "folder", "a")
    (tmp_path / "text").write_text("no lmdb " * 1000)
    with pytest.raises(MediaError, match=r"text: can't be opened as an LMDB"):
        lmdb_store.get(tmp_path / "text", "a")


def test_an_invalid_key_or_path_is_a_media_error(store):
    for key in ("", "half \ud800", 7):
        with pytest.raises(MediaError, match="not an LMDB key: a key is text of 1 to 511 bytes in UTF-8"):
            lmdb_store.get(store, key)
    for path in ("a\0b", "/half \ud800", "/a\0b"):
        with pytest.raises(MediaError, match="no such LMDB"):
            lmdb_store.get(path, "a")
    assert not exists({"lmdb_file": "a\0b", "lmdb_key": "a"})


def test_a_file_that_was_cut_off_is_an_error_and_not_a_bus_error(store):
    """In its own process, which a bus error would end."""
    code = """
import os, sys
from eagle_sampling import MediaError, check_lmdb
from eagle_sampling.lmdb import store as lmdb_store
path = sys.argv[1]
for size in (os.path.getsize(path + "/data.mdb") - 1, 12_000, 5_000, 100, 0):
    os.truncate(path + "/data.mdb", size)
    for read in (lambda: lmdb_store.get(path, "000.png"), lambda: list(lmdb_store.items(path)), lambda: check_lmdb(path)):
        try: read()
        except MediaError as error: print(size, error)
    assert not lmdb_store.has(path, "000.png")
"""
    done = subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == 15
    assert all("data.mdb: is cut off: 12000 of " in error for error in errors[3:6])


def test_a_relative_path_means_the_file_below_the_working_directory(folder, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build_lmdb(tmp_path / name / "store", [folder / ("000.png" if name == "one" else "002.png")])
    for path in ("store", Path("store")):
        for name, key in (("one", "000.png"), ("two", "002.png"), ("one", "000.png")):
            monkeypatch.chdir(tmp_path / name)
            assert [lmdb_store.has(path, other) for other in ("000.png", "002.png")] == [key == "000.png", key == "002.png"]
    assert len(lmdb_store._by_real_path[os.path.realpath("store")].transactions) == 1


def test_an_interrupted_read_does_not_block_closing(store):
    class Interrupted(list):
        def pop(self):
            super().pop()
            raise KeyboardInterrupt  # Ctrl-C between taking the transaction and the read

    lmdb_store.get(store, "000.png")
    entry = lmdb_store._by_name[store]
    entry.idle = Interrupted(entry.idle)
    with pytest.raises(KeyboardInterrupt):
        lmdb_store.get(store, "000.png")
    entry.idle = list(entry.idle)
    closing = threading.Thread(target=lmdb_store.close_all, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert lmdb_store.get(store, "000.png") == picture(0)


def test_one_environment_for_all_names_of_a_path(store, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(store)
    for name in (str(store), store, str(link), str(store) + "/"):
        assert lmdb_store.get(name, "000.png") == picture(0)
    if int(lmdb.__version__.split(".")[0]) >= 2:  # older ones open a path twice without an error
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
def test_forked_workers_read_and_the_parent_continues(store):
    """In its own process, so that no other library's threads are forked with it; readers run while it forks."""
    code = """
import os, sys, threading
from eagle_sampling.lmdb import store as lmdb_store
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


def test_a_damaged_manifest_is_a_problem(store):
    for text in ("{", "[]", '{"keys": 40}', "\ud800"):
        (store / "manifest.json").write_text(text, errors="surrogatepass")
        found = check_lmdb(store)
        assert found.keys == 40
        assert [reason.partition(":")[0] for _, reason in found.problems] == [str(store / "manifest.json")]


def test_bad_images_doubles_and_bad_keys_are_listed_not_stored(folder, tmp_path):
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "000.png").write_bytes(picture(99))
    (other / "002.png").write_bytes(picture(2))  # the same value again: not a problem
    result = build_lmdb(tmp_path / "store", [folder, other])
    assert result.written == 40
    assert [key for key, _ in result.problems] == ["cut.png", "000.png"]
    assert lmdb_store.get(tmp_path / "store", "000.png") == picture(0)


def test_a_file_is_an_image_by_its_content(tmp_path):
    image, source = random_image(0, (20, 10)), tmp_path / "crawl"
    source.mkdir()
    named = {
        "a.jpg": "JPEG", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.jp2": "JPEG2000", "e.ppm": "PPM", "f.tga": "TGA", "crawl_0001": "JPEG",
        "g.PNG": "PNG", "h.txt": "WEBP", "i.dat": "GIF", "j.ico": "ICO", "k": "TIFF", "l.bin": "BMP",
    }  # fmt: skip
    for name, kind in named.items():
        # Pillow 12 writes an icon without a picture from an image below 16 x 16.
        (random_image(0, (32, 32)) if kind == "ICO" else image).save(source / name, kind)
    others = {"x.json": b"{}", "y.json": b"[]", "captions.txt": b"a picture", "film.mp4": b"\0\0\0\x18ftypisom" + bytes(99), "README": b"?"}
    for name, data in others.items():
        (source / name).write_bytes(data)
    with tarfile.open(tmp_path / "crawl.tar", "w") as archive:
        archive.add(source, "crawl")
    for given, prefix in ((source, ""), (tmp_path / "crawl.tar", "crawl/")):
        result = build_lmdb(tmp_path / f"{given.name}.lmdb", [given])
        assert result.written == len(named)
        assert not result.problems
        assert result.others == {
            ".json": (2, f"{prefix}x.json"),
            ".txt": (1, f"{prefix}captions.txt"),
            ".mp4": (1, f"{prefix}film.mp4"),
            "without a suffix": (1, f"{prefix}README"),
        }
        assert "5 other files are not images: 2 x .json, for example" in str(result)
        again = build_lmdb(tmp_path / f"{given.name}.lmdb", [given])
        assert again.complete_already
        assert again.others == result.others
    assert build_lmdb(tmp_path / "one.lmdb", [source / "crawl_0001"]).written == 1


def test_several_columns_that_could_be_the_images(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "shard.parquet"
    left, right, noise = ([*map(picture, seeds)] for seeds in (range(3), range(3, 6), range(6, 9)))
    parquet.write_table(pa.table({"hash": [b"1", b"2", b"3"], "image": left}), path)
    assert build_lmdb(tmp_path / "by-content", [path]).written == 3
    parquet.write_table(pa.table({"thumbnail": noise, "image": [{"bytes": data} for data in left], "depth": right}), path)
    with pytest.raises(MediaError, match=r"thumbnail, image, depth could each be that of the images; say which: .* --column thumbnail"):
        build_lmdb(tmp_path / "several", [path])
    assert build_lmdb(tmp_path / "several", [path], column="depth").written == 3
    assert lmdb_store.get(tmp_path / "several", "shard:1") == picture(4)
    with pytest.raises(FileExistsError):
        build_lmdb(tmp_path / "several", [path], column="image")
    with pytest.raises(MediaError, match="has no column 'nothing' of bytes; its columns of bytes are thumbnail, image, depth"):
        build_lmdb(tmp_path / "other", [path], column="nothing")


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
        pq.write_table(pa.table({"key": ["x", "y", None], "data": [picture(7), picture(8), picture(9)]}), tmp_path / "c.parquet")
        sources += [tmp_path / "b.parquet", tmp_path / "c.parquet"]
    result = build_lmdb(tmp_path / "store", sources)
    assert not result.problems
    assert lmdb_store.get(tmp_path / "store", "4.png") == picture(4)
    if len(sources) > 1:
        assert result.written == 13
        assert lmdb_store.has(tmp_path / "store", "c:2")
        assert lmdb_store.get(tmp_path / "store", "p/3.png") == picture(3)
        assert lmdb_store.get(tmp_path / "store", "y") == picture(8)


def tar_of(path, members, **links):
    with tarfile.open(path, "w") as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(picture(0))
            archive.addfile(info, io.BytesIO(picture(0)))
        for name, (kind, target) in links.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.type, info.linkname = kind, target
            archive.addfile(info)
    with tarfile.open(path) as archive:
        return bytearray(path.read_bytes()), [member.offset for member in archive]


def test_a_damaged_tar_is_refused_whole(tmp_path):
    path = tmp_path / "a.tar"
    data, offsets = tar_of(path, [f"{i}.png" for i in range(6)])
    third, end = offsets[2], offsets[-1] + 1024
    flipped = data.copy()
    flipped[third] ^= 1
    for damaged, why in (
        (flipped, f"the header at byte {third} is damaged"),
        (data[: third + 100], f"ends at byte {third} without an end mark"),
        (data[: third + 600], "can't be read as a tar file"),
        (data[:third], "can't be read as a tar file|ends at byte"),
        (data[:end], f"ends at byte {end} without an end mark"),
        (data + data, "several tars in one file"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(MediaError, match=why):
            build_lmdb(tmp_path / "store", [path])
    path.write_bytes(data[: end + 512])  # one block of zeros is an end mark
    assert build_lmdb(tmp_path / "store", [path]).written == 6


def test_links_in_a_tar(tmp_path):
    links = {"hard": (tarfile.LNKTYPE, "a.png"), "soft": (tarfile.SYMTYPE, "a.png"), "gone": (tarfile.LNKTYPE, "b.png")}
    tar_of(tmp_path / "a.tar", ["a.png"], **links, itself=(tarfile.SYMTYPE, "itself.png"))
    result = build_lmdb(tmp_path / "store", [tmp_path / "a.tar"])
    assert [key for key, _ in lmdb_store.items(tmp_path / "store")] == [b"a.png", b"hard.png", b"soft.png"]
    assert lmdb_store.get(tmp_path / "store", "hard.png") == picture(0)
    assert [key for key, _ in result.problems] == ["gone.png", "itself.png"]


def test_links_in_a_folder_and_names_that_are_not_text(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "far.png").write_bytes(picture(3))
    (folder / "linked").symlink_to(other)
    (folder / "deep" / "back").symlink_to(folder)  # a loop
    (folder / "gone.png").symlink_to("nothing")
    (folder / "itself.png").symlink_to("itself.png")
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))).write_bytes(picture(4))
    result = build_lmdb(tmp_path / "store", [folder])
    assert result.written == 41
    assert lmdb_store.get(tmp_path / "store", "linked/far.png") == picture(3)
    assert [key for key, _ in result.problems] == ["caf\\udce9.png", "gone.png", "itself.png"]
    assert "UTF-8" in result.problems[0][1]


def test_a_source_without_images_is_reported(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    result = build_lmdb(tmp_path / "store", [tmp_path / "empty", folder])
    assert result.written == 40
    assert [(key, reason[:14]) for key, reason in result.problems] == [(str(tmp_path / "empty"), "holds no image")]
    with pytest.raises(MediaError, match="empty: holds no image"):
        build_lmdb(tmp_path / "none", [tmp_path / "empty"])
    assert not list(tmp_path.glob("none*"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1garbage")
    for name, why in (("bad.parquet", "can't be read as a Parquet file"), ("absent.tar", "there is no such file")):
        with pytest.raises(MediaError, match=f"{name}: {why}"):
            build_lmdb(tmp_path / "more", [tmp_path / name])


def test_an_interrupted_build_continues(folder, tmp_path):
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


def test_a_finished_build_is_complete_already(folder, tmp_path):
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    first = build_lmdb(tmp_path / "store", [folder])
    assert not first.complete_already
    before = (tmp_path / "store" / "data.mdb").stat().st_mtime_ns
    again = build_lmdb(tmp_path / "store", [folder])
    assert again.complete_already
    assert str(again).startswith("complete already: 40 values")
    assert (again.written, again.bytes, again.problems, again.example) == (40, first.bytes, first.problems, first.example)
    assert (tmp_path / "store" / "data.mdb").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="built from other sources"):
        build_lmdb(tmp_path / "store", [folder, tmp_path])
    (tmp_path / "store" / "manifest.json").write_text("{")
    with pytest.raises(FileExistsError, match="exists already; remove it"):
        build_lmdb(tmp_path / "store", [folder])


def test_the_report_says_how_a_row_names_an_image(folder, tmp_path):
    for name in ("000.png", "006.png"):
        (folder / name).rename(folder / f"é{name}")
    for result in (build_lmdb(tmp_path / "store", [folder]), build_lmdb(tmp_path / "store", [folder])):
        line = str(result).splitlines()[-1]
        reference = json.loads(line[line.index("{") :])
        assert reference == result.reference == {"lmdb_file": str(tmp_path / "store"), "lmdb_key": "002.png"}
        assert open_image(reference).size == image_size(folder / "002.png")


@pytest.mark.parametrize("change", ["added", "removed", "rewritten", "most removed", "added behind"])
def test_sources_that_changed_since_an_interruption_lose_nothing(folder, tmp_path, change):
    def stop(progress):
        if progress.done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_lmdb(tmp_path / "store", [folder], commit_bytes=1, progress=stop)
    if change.startswith("added"):
        (folder / ("aaa.png" if change == "added behind" else "000-0.png")).write_bytes(picture(50))
    if change == "rewritten":
        (folder / "002.png").write_bytes(picture(50) + b"longer")
    for file in list(folder.rglob("*.png"))[: {"removed": 1, "most removed": 38}.get(change, 0)]:
        file.unlink()
    if change == "added behind":
        assert build_lmdb(tmp_path / "store", [folder]).written == 41
        assert lmdb_store.has(tmp_path / "store", "aaa.png")
    else:
        with pytest.raises(ValueError, match=r"store\.partial: the sources have changed"):
            build_lmdb(tmp_path / "store", [folder])


@pytest.mark.parametrize(("module", "step"), [(lmdb_build, "_digest"), (os, "fsync"), (os, "replace")])
def test_an_interruption_at_the_end_continues(folder, tmp_path, monkeypatch, module, step):
    def full(*_):
        raise OSError(28, "No space left on device")

    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with monkeypatch.context() as patch:
        patch.setattr(module, step, full)
        with pytest.raises(OSError, match="No space left"):
            build_lmdb(tmp_path / "store", [folder])
    with pytest.raises(ValueError, match="of other sources"):
        build_lmdb(tmp_path / "store", [tmp_path])
    result = build_lmdb(tmp_path / "store", [folder])
    assert (result.written, result.resumed, [key for key, _ in result.problems]) == (40, 40, ["cut.png"])
    assert check_lmdb(tmp_path / "store").ok
    assert sorted(os.listdir(tmp_path / "store")) == ["data.mdb", "manifest.json"]


def test_a_full_disk_is_named(folder, tmp_path, monkeypatch):
    def full(*_):
        raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    monkeypatch.setattr(lmdb_build, "_commit", full)
    with pytest.raises(MediaError, match=r"store\.partial: .*No space left on device"):
        build_lmdb(tmp_path / "store", [folder])


def test_the_map_grows(tmp_path, monkeypatch):
    opened = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda path, **how: opened(path, **{**how, "map_size": 1 << 16} if "map_size" in how else how))
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        random_image(i, (80, 80)).save(folder / f"{i}.png")
    assert build_lmdb(tmp_path / "store", [folder]).written == 6
    assert check_lmdb(tmp_path / "store").ok


def test_one_path_is_not_a_list_of_sources(tmp_path):
    with pytest.raises(TypeError, match=r"sources is 'images': need a list of folders and files, \['images'\]"):
        build_lmdb(tmp_path / "out", "images")
