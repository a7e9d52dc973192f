"""Files of many photos' prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsesam_jax.predict.prompt_files import read_prompts


def test_the_longest_end_of_a_path_counts(tmp_path: Path):
    names = ("a.png", "one/a.png", str(tmp_path / "two" / "a.png"))
    entries = {name: {"points": [[index, 0]]} for index, name in enumerate(names)}
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    file = read_prompts(tmp_path / "prompts.json")
    for folder, expected in (("one", 1), ("two", 2), ("three", 0)):
        assert file.find(tmp_path / folder / "a.png").points == [(expected, 0)]
    assert file.find(tmp_path / "b.png").num_prompts == 0
    assert file.find(tmp_path / "xa.png").num_prompts == 0


def test_rows_of_a_photo_are_put_together(tmp_path: Path):
    path = tmp_path / "prompts.CSV"
    path.write_text("\ufefflabel,x,y,image,x1,y1,x0,y0\n0,1,2,a,7,8,5,6\n,3,4,a\n,,,b,4,3,2,1\n")
    a, b = (read_prompts(path).find(Path(name)) for name in "ab")
    assert a[:3] == ([(1, 2), (3, 4)], [0, 1], [(5, 6, 7, 8)])
    assert b[:3] == ([], [], [(2, 1, 4, 3)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("[]", "it is no object of photos"),
        ('{"a": 1}', "a: it must be an object of points, labels, boxes"),
        ('{"a": {"box": []}}', "a: it must have points, labels, boxes alone, got 'box'"),
        ('{"a": {"points": [1, 2]}}', "a: points must be a list of lists of 2 numbers"),
        ('{"a": {"boxes": [[1, 2, 3]]}}', "a: boxes must be a list of lists of 4 numbers"),
        ('{"a": {"points": [["1", 2]]}}', "a: points must be a list of lists of 2 numbers"),
        ('{"a": {"labels": [1]}}', "a: a prompt must be given: points X Y or boxes X0"),
        ('{"a": {"points": [[1, 2]], "labels": [2]}}', "a: labels must be 1 (foreground) or 0"),
        ('{"a": {"points": [[1, 2]], "labels": [1, 1]}}', "a: labels must be given once a point"),
        ('{"a": {"boxes": [[3, 2, 1, 4]]}}', "a: boxes must be X0 Y0 X1 Y1 with X0 < X1"),
        ('{"a": {"points": [[1' + 400 * "0" + ", 2]]}}", "int too large to convert to float"),
        ("x,y\n1,2\n", "its columns must be image and some of x0, y0, x1, y1, x, y, label, got x"),
        ("image,z\n", "its columns must be image and some of"),
        ("image,x,y\na,1\n", "line 2: could not convert string to float: ''"),
        ("image,x,y\na,1,2,3\n", "line 2: it has more values than there are columns"),
        ("image,label\na,1\n", "line 2: it has a label and no point"),
        ("image,x,y,label\na,1,2,3\n", "a: labels must be 1 (foreground) or 0"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: str, message: str):
    path = tmp_path / ("prompts.json" if content[:1] in "[{" else "prompts.csv")
    path.write_text(content)
    with pytest.raises(ValueError, match="--prompts must be a file of prompts, got") as caught:
        read_prompts(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "1", "a"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["points", "boxes", "labels", "a"]), inner)
    ),
)


@given(st.text() | VALUES.map(json.dumps), st.sampled_from(["json", "csv"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_content_is_read_or_refused(tmp_path: Path, content: str, suffix: str):
    path = tmp_path / f"any.{suffix}"
    path.write_text(content, "utf-8", "surrogatepass")
    try:
        file = read_prompts(path)
    except ValueError as error:
        assert str(error).startswith("--prompts must be")
    else:
        for lists in file.entries.values():
            assert len(lists.labels) in (0, len(lists.points))
