from __future__ import annotations

import pytest
from PIL import Image

from ditf.runtime.errors import InputError
from ditf.runtime.images import find_images, image_suffixes, list_images, open_image, skipped_files


def test_list_images_is_sorted_and_only_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.tiff", "notes.txt", "png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG", "c.tiff"]


def test_list_images_of_nothing(tmp_path):
    with pytest.raises(InputError, match="holds no images") as caught:
        list_images(tmp_path)
    assert ".png" in caught.value.fix
    with pytest.raises(InputError, match="is not a directory"):
        list_images(tmp_path / "none")


def test_images_of_a_folder_and_those_below(tmp_path):
    for name in ("b.PNG", "deep/er/a.jpg", "deep/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == [
        "b.PNG",
        "deep/er/a.jpg",
    ]
    with pytest.raises(InputError, match="holds no images"):
        find_images(tmp_path / "folder.png")


def test_what_pillow_reads_is_listed(tmp_path):
    """The files are real ones: an image that is listed can be read."""
    picture = Image.linear_gradient("L").convert("RGB")
    names = [
        f"picture.{suffix}" for suffix in ("avif", "gif", "ico", "jfif", "jp2", "mpo", "pgm", "qoi", "tga")
    ]
    for name in names:
        picture.save(tmp_path / name)
    assert [path.name for path in list_images(tmp_path)] == names
    assert all(open_image(path).mode == "RGB" for path in find_images(tmp_path))


def test_what_pillow_only_knows_by_name_is_not_listed():
    """PostScript is a program; Pillow writes PDF; of the others it reads the header but no pixels."""
    assert not image_suffixes() & {".eps", ".ps", ".pdf", ".mpg", ".h5", ".grib", ".bufr", ".wmf"}


def test_skipped_files_are_named(tmp_path):
    for name in ("a.png", "b.heic", "c.mp4", ".hidden", "deep/d.avif", "deep/e.xml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = list_images(tmp_path)
    assert [path.name for path in listed] == ["a.png"]
    assert skipped_files(tmp_path, listed) == (
        f"{tmp_path}: skipped, because they are no image files: b.heic, c.mp4, deep/"
    )
    assert skipped_files(tmp_path, find_images(tmp_path), below=True) == (
        f"{tmp_path}: skipped, because they are no image files: b.heic, c.mp4, deep/e.xml"
    )
    for index in range(1000):
        (tmp_path / "deep" / f"{index}.txt").touch()
    skipped = skipped_files(tmp_path, find_images(tmp_path), below=True)
    assert skipped is not None
    assert skipped.endswith("b.heic, c.mp4, deep/0.txt, deep/1.txt and 999 more")
    assert skipped_files(tmp_path / "deep", list((tmp_path / "deep").iterdir())) is None


def test_a_plugin_of_the_users_adds_its_suffix(tmp_path, monkeypatch):
    """pillow-heif registers its formats in this way."""
    (tmp_path / "a.heic").touch()
    with pytest.raises(InputError, match="holds no images"):
        list_images(tmp_path)
    monkeypatch.setitem(Image.OPEN, "HEIF", (Image.Image, None))
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert [path.name for path in list_images(tmp_path)] == ["a.heic"]
