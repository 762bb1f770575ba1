"""The ledger: what goes in comes out, whatever the text, and a crash costs at most the line it hit."""

from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_train.data.ledger import Entry, Ledger, top_reasons

texts = st.text(max_size=40)
entries = st.lists(
    st.builds(Entry, texts, st.integers(1, 10**9), texts, texts, st.sampled_from(["prepare", "stage a", "stage b"])), max_size=20
)


@settings(deadline=None, max_examples=50)
@given(entries, entries)
def test_round_trip(tmp_path_factory, first, second):
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "deep" / "ledger.jsonl")
    assert list(ledger) == []
    assert (ledger.extend(first), ledger.extend(second)) == (len(first), len(second))
    assert list(ledger) == first + second
    assert sum(ledger.counts().values()) == len(first) + len(second)


def test_replace_touches_one_origin(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.extend([Entry("s", 1, "r", "d"), Entry("s", 2, "r", "d", "stage a")])
    ledger.replace([Entry("s", 3, "q", "d", "stage a")], where="stage a")
    assert [(entry.line, entry.where) for entry in ledger] == [(1, "prepare"), (3, "stage a")]


def test_rewind_forgets_what_training_left_out_later(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.rewind(0)
    prepared = Entry("s", 1, "r", "d")
    ledger.extend([prepared, *(Entry("s", 2, "r", "d", "train", step) for step in (1, 2, 3))])
    ledger.rewind(2)
    assert list(ledger) == [prepared, *(Entry("s", 2, "r", "d", "train", step) for step in (1, 2))]
    assert b"step" not in ledger.path.read_bytes().splitlines()[0]


def test_a_cut_last_line_is_left_out(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.extend([Entry("s", 1, "r", "d"), Entry("s", 2, "r", "d")])
    ledger.path.write_bytes(ledger.path.read_bytes()[:-5])
    assert [entry.line for entry in ledger] == [1]


def test_top_reasons_give_an_example():
    found = [Entry("s", line, "rare" if line == 5 else "common", f"file {line}") for line in range(1, 10)]
    assert top_reasons(found) == ["common: 8 rows, for example s:1: file 1", "rare: 1 row, for example s:5: file 5"]
