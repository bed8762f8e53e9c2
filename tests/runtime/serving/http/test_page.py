"""The page's files are read once, and no other file is served."""

from __future__ import annotations

from ditf.runtime.serving.http.page import read_page


def test_a_folder(tmp_path):
    (tmp_path / "index.html").write_text("<p>hello")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "page.js").write_text("1")
    files = read_page(tmp_path)
    assert files["/"] == files["/index.html"] == (b"<p>hello", "text/html")
    assert files["/parts/page.js"][0] == b"1"
    assert "javascript" in files["/parts/page.js"][1]
    assert len(files) == 3


def test_no_folder(tmp_path):
    assert read_page(tmp_path / "absent") == {}
