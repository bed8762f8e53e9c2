"""Array files from elsewhere must hold plain data within bounds; otherwise one line says what is wrong."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditf.runtime.files.arrays import read_npy, read_npz

LIMIT = 1 << 20


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return file.getvalue()


def with_header(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


ARRAYS = {
    "floats": np.arange(12, dtype=np.float16).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "strings": np.array(["x", "longer"]),
    "scalar": np.float32(3),
    "empty": np.zeros((0, 3)),
}


@pytest.mark.parametrize("compress", [False, True])
def test_reads_what_numpy_writes(compress: bool, tmp_path: Path) -> None:
    (np.savez_compressed if compress else np.savez)(tmp_path / "a.npz", **ARRAYS)  # type: ignore[arg-type]
    with (tmp_path / "a.npz").open("rb") as file:
        from_file = read_npz(file, "a.npz", LIMIT)
    from_bytes = read_npz((tmp_path / "a.npz").read_bytes(), "a.npz", LIMIT)
    for name, array in ARRAYS.items():
        for read in (from_file[name], from_bytes[name], read_npy(npy(array), name, LIMIT)):
            np.testing.assert_array_equal(read, array)
            assert read.dtype == array.dtype
            assert read.flags.writeable
    assert list(from_file) == list(ARRAYS)


def test_what_inflates_beyond_the_limit_is_refused_before_it_is_inflated() -> None:
    bomb = npz(a_npy=npy(np.zeros(64 << 20, np.uint8)))
    assert len(bomb) < LIMIT
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^golden.npz inflates to 67,108,992 bytes, more than 1,048,576$"):
        read_npz(bomb, "golden.npz", LIMIT)
    assert tracemalloc.get_traced_memory()[1] < LIMIT
    tracemalloc.stop()


def test_a_size_in_the_directory_that_is_too_small_bounds_what_is_read() -> None:
    """The archive's directory claims 200 bytes for a member that inflates to 64 MB."""
    bomb = bytearray(npz(a_npy=npy(np.zeros(64 << 20, np.uint8))))
    real = struct.pack("<I", (64 << 20) + 128)
    for at in [at for at in range(len(bomb)) if bomb[at : at + 4] == real]:
        bomb[at : at + 4] = struct.pack("<I", 200)
    tracemalloc.start()
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read_npz(bytes(bomb), "golden.npz", LIMIT)
    assert tracemalloc.get_traced_memory()[1] < LIMIT
    tracemalloc.stop()


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"
NEGATIVE = "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged, or no .npy file"),
        (b"\x93NUMPY", "is damaged, or no .npy file"),
        (b"\x93NUMPY\x03\x00" + bytes(20), "is damaged, or no .npy file"),
        (with_header("-" * 9000 + "1"), "is damaged, or no .npy file"),
        (with_header("(" * 9000), "is damaged, or no .npy file"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31), "is damaged, or no .npy file"),
        (with_header(HUGE, bytes(4)), "has 4 bytes of data, and its header says 4,398,046,511,104"),
        (with_header(NEGATIVE, bytes(4)), "is damaged, or no .npy file"),
        (npy(np.zeros(3))[:-1], "has 23 bytes of data, and its header says 24"),
        (npy(np.zeros(3)) + b"x", "has 25 bytes of data, and its header says 24"),
        (npy(np.array([{}]), allow_pickle=True), "holds object, which is neither numbers nor plain strings"),
        (npy(np.zeros(3, [("x", "f4")])), "which is neither numbers nor plain strings"),
        (npy(np.zeros(LIMIT, np.uint8)), "has 1,048,704 bytes, more than 1,048,576"),
    ],
)
def test_what_is_no_plain_array_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        read_npy(content, "noise.npy", LIMIT)
    assert str(refused.value).startswith("noise.npy ")
    if len(content) <= LIMIT:
        with pytest.raises(ValueError, match=r"^a\.npz"):
            read_npz(npz(x_npy=content), "a.npz", LIMIT)


def test_what_is_no_plain_zip_is_refused() -> None:
    good = npz(x_npy=npy(np.arange(100)))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", npy(np.arange(100)))
    encrypted = bytearray(good)
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    damaged = bytearray(good)
    damaged[60] ^= 0xFF
    for content, problem in [
        (b"PK", "is damaged, or no .npz file"),
        (good[:-30], "is damaged, or no .npz file"),
        (bytes(damaged), "is damaged, or no .npz file"),
        (file.getvalue(), "compressed in a way that numpy does not write"),
        (bytes(encrypted), "is encrypted"),
        (npz(x_py=b"import os"), "holds 'x.py', which is no array"),
    ]:
        with pytest.raises(ValueError, match=problem) as refused:
            read_npz(content, "a.npz", LIMIT)
        assert str(refused.value).startswith("a.npz ")


def test_names_in_messages_hold_no_control_characters() -> None:
    with pytest.raises(ValueError, match="no array") as refused:
        read_npz(npz(**{"\x1b[2J": b""}), "a.npz", LIMIT)
    assert "\x1b" not in str(refused.value)


def test_no_bytes_of_a_damaged_file_raise_anything_else() -> None:
    good = npz(x_npy=npy(np.arange(100)), y_npy=npy(np.array(["ab"])))
    generator = np.random.default_rng(0)
    for _ in range(500):
        content = bytearray(good)
        for at in generator.integers(0, len(content), 3):
            content[at] = generator.integers(256)
        try:
            read_npz(bytes(content), "a.npz", LIMIT)
        except ValueError as error:
            assert str(error).startswith("a.npz")  # noqa: PT017  some of the files are whole
