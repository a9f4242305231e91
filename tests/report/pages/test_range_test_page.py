"""The picture of a range test."""

import pytest

import conservtl as ctl
from conservtl.report import check_picture, range_test_sentence, write_range_test

RESULT = {
    "rates": [10 ** (-6 + i / 10) for i in range(30)],
    "losses": [2 - i / 20 for i in range(30)],
    "smoothed": [2 - i / 20 for i in range(30)],
    "suggestion": 3e-5,
    "steepest": 1e-5,
    "diverged": False,
    "spec": {"task": "speech"},
}


def test_the_page_says_the_suggestion_and_marks_it(tmp_path):
    pytest.importorskip("matplotlib")
    write_range_test(RESULT, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert range_test_sentence(RESULT) in page
    assert "suggested 3.0e-05" in page
    assert ">1e-5<" in page  # decades as words: no formula is left unread
    assert "mathdefault" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_a_png_is_one(tmp_path):
    pytest.importorskip("matplotlib")
    write_range_test(RESULT, tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_another_kind_is_refused_before_time_is_spent(tmp_path):
    with pytest.raises(ctl.SpecError, match=r"\.html or \.png"):
        check_picture(tmp_path / "a.jpg")
