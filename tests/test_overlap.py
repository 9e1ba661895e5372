"""Examples that stand in two sets are found, whatever is known already."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perpetune.data.overlap import Overlap, find_overlap
from perpetune.data.pictures.tables import FileTable, MemoryTable

CONTENTS = st.lists(st.binary(max_size=3), max_size=20)


def table_of(contents):
    return MemoryTable(contents, ["a"] * len(contents), [str(i) for i in range(len(contents))], "x")


@given(CONTENTS, CONTENTS)
def test_it_finds_exactly_the_twins(train, test):
    tables = [table_of(c) for c in (train, test)]
    pairs = find_overlap(tables[0], tables[1], contents=True)
    assert {b for _, b in pairs} == {i for i, c in enumerate(test) if c and c in train}
    assert all(train[a] == test[b] for a, b in pairs)
    assert find_overlap(tables[0], tables[1], contents=False) == []


@given(st.lists(st.tuples(CONTENTS, CONTENTS), max_size=5))
def test_it_finds_in_all_that_is_known_what_it_finds_in_each(months):
    """Month after month is searched and then becomes known: as if each earlier month were compared by itself."""
    known, earlier = Overlap(), []
    for train, test in months:
        table = table_of(train)
        alone = [(a, (other, b)) for other in earlier for a, b in find_overlap(table, other, contents=True)]
        found = known.find(table, range(len(train)))
        assert sorted(found, key=str) == sorted(alone, key=str)
        earlier.append(table_of(test))
        known.add(earlier[-1], range(len(test)))


def files(folder, contents):
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return FileTable(str(folder), list(contents), ["a"] * len(contents))


def test_a_known_file_that_was_exchanged_since_is_compared_as_it_is_now(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old = files(tmp_path / "old", {"1": b"abc", "2": b"def"})
    new = files(tmp_path / "new", {"1": b"abc", "2": b"xyz"})
    known = Overlap()
    known.add(old, range(2))
    assert known.find(new, range(2)) == [(0, (old, 0))]
    files(tmp_path / "old", {"1": b"xyz"})  # of the same size, and its start was read before
    assert known.find(new, range(2)) == []


def test_one_file_under_two_names_is_the_same(tmp_path):
    table = files(tmp_path, {"1": b"abc"})
    (tmp_path / "2").hardlink_to(tmp_path / "1")
    other = FileTable(str(tmp_path), ["2"], ["a"])
    assert find_overlap(table, other, contents=False) == [(0, 0)]


def test_missing_files_do_not_overlap(tmp_path):
    table = FileTable(str(tmp_path), ["none.png"], ["a"])
    assert find_overlap(table, table, contents=True) == []
