"""Rivals: imports reach the function, and what is missing or broken is absent with the reason."""

import pytest

from benchmarks.rivals import Absent, Rival, load, working


def test_imports_are_given_to_make():
    rivals = [
        Rival("plain", lambda: abs),
        Rival("attribute", lambda sqrt: lambda x: sqrt(x) + 1, imports=("math:sqrt",)),
        Rival("two", lambda math, loads: lambda x: math.floor(loads(x)), imports=("math", "json:loads")),
    ]
    found, absent = load("case", rivals)
    assert not absent
    assert (found["plain"](-3), found["attribute"](9), found["two"]("2.5")) == (3, 4, 2)


def test_what_cannot_be_imported_is_absent():
    def broken():
        raise RuntimeError("needs another torch\nand a second line")

    rivals = [
        Rival("package", lambda x: x, imports=("no_such_package.deep:thing",)),
        Rival("attribute", lambda x: x, imports=("math:no_such_function",)),
        Rival("broken", broken),
    ]
    found, absent = load("case", rivals)
    assert not found
    assert [(a.case, a.contender) for a in absent] == [("case", "package"), ("case", "attribute"), ("case", "broken")]
    assert absent[0].reason.startswith("ModuleNotFoundError: No module named 'no_such_package'")
    assert "no_such_function" in absent[1].reason
    assert absent[2].reason == "RuntimeError: needs another torch"


def test_a_failing_trial_makes_a_rival_absent_and_is_an_error_of_ours():
    def fails(x):
        raise ValueError("odd sizes")

    found, absent = working("case", {"ours": abs, "rival": fails}, lambda function: function(-1))
    assert found == {"ours": abs}
    assert absent == [Absent("case", "rival", "ValueError: odd sizes")]
    with pytest.raises(ValueError, match="odd sizes"):
        working("case", {"ours": fails}, lambda function: function(-1))
