"""Plain headers of tar files are read without tarfile: the members are those that tarfile finds, in every format and after any damage."""

import io
import tarfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle_train.data.sources.tar import _members

names = st.one_of(
    st.text("abcü./", min_size=1, max_size=12).filter(lambda name: name.strip("/.") != ""),
    st.integers(90, 300).map(lambda length: "d/" * (length // 4) + "n" * (length // 2)),
)
kinds = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def found_by_tarfile(file):
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return [(one.name, one.offset, one.offset_data, one.size) for one in iter(tar.next, None) if one.isfile()], ""
    except tarfile.ReadError as error:
        return None, str(error)


def found_here(file, start=0, end=None):
    try:
        return [member[:4] for member in _members(file, start, end)], ""
    except tarfile.ReadError as error:
        return None, str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(names, kinds, st.binary(max_size=1200)), max_size=6),
    formats,
    st.data(),
    st.sampled_from(["", "cut", "flip", "zero"]),
)
def test_members_are_those_of_tarfile(tmp_path, content, form, data, damage):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=form) as tar:
        for name, kind, said in content:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(said) if kind == tarfile.REGTYPE else 0, ""
            try:
                tar.addfile(member, io.BytesIO(said))
            except ValueError:  # the format can't hold the name
                continue
    packed = bytearray(whole.getvalue())
    place = data.draw(st.integers(0, len(packed) - 1))
    if damage == "cut":
        del packed[place:]
    elif damage == "flip":
        packed[place] ^= 255
    elif damage == "zero":
        packed[place : place + 600] = bytes(len(packed[place : place + 600]))
    path = tmp_path / "a.tar"
    path.write_bytes(packed)
    with open(path, "rb") as file:
        expected = found_by_tarfile(file)
        assert found_here(file) == expected
        for number, member in enumerate(expected[0] or ()):
            if form == tarfile.USTAR_FORMAT and not damage:
                assert found_here(file, member[1])[0] == expected[0][number:]
                assert found_here(file, 0, member[1])[0] == expected[0][:number]
