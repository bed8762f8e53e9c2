"""GGUF files decode as the gguf package and diffusers decode them; damaged ones are refused in one line."""

from __future__ import annotations

import os
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf import GGMLQuantizationType as Kind

from ditf.export.checkpoints.formats.gguf_weights import GGUFWeights
from ditf.export.checkpoints.formats.quantised.dequantised import dequantised
from ditf.export.checkpoints.formats.stored_weights import open_weights
from ditf.runtime.errors import InputError

QUANTISABLE = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.BF16, Kind.F16, Kind.F32)
DECODABLE = (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ4_XS)
"""Types that the gguf package decodes and does not encode."""

SHAPE = (20, 512)


def weight():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) / 50


def any_blocks(kind):
    """Bytes of a type that decode to finite numbers: their half-precision scales have small exponents."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(1).integers(0, 256, (SHAPE[0], SHAPE[1] // block, size), np.uint8)
    scales = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q6_K: (208,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)}
    for first in scales.get(kind, (0,)):
        stored[:, :, first + 1] &= 0x3B
    return stored.reshape(SHAPE[0], -1)


def write(path, tensors, architecture="flux", metadata=None):
    """A GGUF file, by the package's own writer: {name: (stored array, type)}."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        getattr(writer, "add_array" if isinstance(value, list) else "add_uint32")(key, value)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_as(kind):
    return gguf.quants.quantize(weight(), kind) if kind in QUANTISABLE else any_blocks(kind)


@pytest.mark.parametrize("kind", QUANTISABLE + DECODABLE, ids=lambda kind: kind.name)
def test_every_type(tmp_path, kind):
    path = write(tmp_path / "model.gguf", {"img_in.weight": (stored_as(kind), kind)})
    weights = dequantised(open_weights([path]))
    assert weights.shapes == {"img_in.weight": SHAPE}
    assert weights.dtypes == {"img_in.weight": kind.name if "F" in kind.name else "F32"}
    tensor = weights.tensor("img_in.weight")
    loaded = load_gguf_checkpoint(str(path))["img_in.weight"]
    if kind in dequantize_functions:  # diffusers calls them with the type that a pipeline computes in
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = loaded.as_tensor().view(torch.uint8).reshape(-1, size)
        loaded = dequantize_functions[kind](blocks, block, size, torch.float32).reshape(SHAPE)
    torch.testing.assert_close(tensor, loaded.float(), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(tensor, gguf.quants.dequantize(stored_as(kind), kind))
    assert weights.bytes_of == {"img_in.weight": stored_as(kind).nbytes}
    assert torch.equal(weights.rows("img_in.weight", 3, 7), tensor[3:7])
    if kind in QUANTISABLE:
        error = np.abs(tensor.numpy() - weight()).max() / np.abs(weight()).max()
        assert error < {4: 0.08, 5: 0.04}.get(int(kind.name[1]) if kind.name[0] == "Q" else 0, 0.005)


def test_many_blocks_and_the_reader_of_the_package(tmp_path):
    """More blocks than are decoded at once, several tensors, and an array that is not kept."""
    large = np.random.default_rng(2).standard_normal((65, 4, 288)).astype(np.float32)
    tensors = {
        "a": (gguf.quants.quantize(large, Kind.Q8_0), Kind.Q8_0),
        "b": (np.arange(3, dtype=np.float64), Kind.F64),
        "c": (np.arange(6, dtype=np.int32).reshape(2, 3), Kind.I32),
    }
    metadata = {"general.alignment": 64, "a.vocabulary": list(range(100)), "split.count": 1}
    path = write(tmp_path / "many.GGUF", tensors, "sd3", metadata)
    weights = open_weights([path])
    assert weights.architecture == "sd3"
    assert "a.vocabulary" in weights.metadata
    assert weights.metadata["a.vocabulary"] is None
    for read in gguf.GGUFReader(path).tensors:
        assert weights.shapes[read.name] == tuple(reversed(read.shape.tolist()))
        assert weights.bytes_of[read.name] == read.n_bytes
        assert weights.source(read.name) == f"tensor {read.name} of {path}"
    np.testing.assert_array_equal(weights.tensor("a"), gguf.quants.dequantize(*tensors["a"]))
    assert weights.tensor("b").tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"tensor c .* is stored as I32, not as floating-point numbers"):
        weights.tensor("c")
    assert weights.fingerprint() == open_weights([path]).fingerprint()


def test_shapes_that_comfyui_notes(tmp_path):
    """ComfyUI-GGUF flattens a convolution whose rows are no whole blocks, and notes its shape."""
    stored = gguf.quants.quantize(weight().reshape(-1, 64), Kind.Q8_0)
    key = "comfy.gguf.orig_shape.conv.weight"
    path = write(tmp_path / "c.gguf", {"conv.weight": (stored, Kind.Q8_0)}, metadata={key: [16, 80, 2, 2, 2]})
    weights = open_weights([path])
    assert weights.shapes == {"conv.weight": (16, 80, 2, 2, 2)}
    tensor = weights.tensor("conv.weight")
    np.testing.assert_allclose(tensor.flatten(), weight().flatten(), atol=2e-3)
    assert torch.equal(weights.rows("conv.weight", 3, 5), tensor[3:5])
    wrong = write(tmp_path / "w.gguf", {"conv.weight": (stored, Kind.Q8_0)}, metadata={key: [16, 81]})
    with pytest.raises(InputError, match=r"notes the shape \[16, 81\] for a tensor of \[160, 64\]"):
        open_weights([wrong])


@pytest.mark.parametrize(("name", "rank"), [("x_pad_token", 2), ("pos_embed", 3), ("m.register_tokens", 3)])
def test_a_first_dimension_of_one(tmp_path, name, rank):
    """llama.cpp's tools leave it out (ComfyUI-GGUF #379, #136); the package's own writer keeps it."""
    whole = np.arange(12, dtype=np.float32).reshape((1, 12) if rank == 2 else (1, 3, 4))
    for stored in (whole, whole[0]):
        weights = open_weights([write(tmp_path / "m.gguf", {name: (stored, Kind.F32)})])
        assert weights.shapes == {name: whole.shape}
        np.testing.assert_array_equal(weights.tensor(name), whole)


def test_infinite_blocks_are_found(tmp_path):
    stored = gguf.quants.quantize(weight(), Kind.Q8_0)
    stored[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    weights = open_weights([write(tmp_path / "i.gguf", {"q.weight": (stored, Kind.Q8_0)})])
    with pytest.raises(InputError, match=r"tensor q\.weight of .*i\.gguf holds NaN or infinity"):
        weights.tensor("q.weight")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    arrays = {"a.list": [1, 2, 3]}
    return write(path, {"q.weight": (stored_as(Kind.Q4_0), Kind.Q4_0)}, metadata=arrays).read_bytes()


def test_truncated_anywhere(tmp_path, whole):
    path = tmp_path / "cut.gguf"
    header = whole.index(b"q.weight") + 40
    for length in [*range(header), header + 500, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"not a readable GGUF file .*; download the file") as caught:
            open_weights([path])
        assert "\n" not in str(caught.value)


def test_changed_bytes_give_a_tensor_or_an_input_error(tmp_path, whole):
    """One byte of the header changed to each of several values; any other exception fails the test."""
    path = tmp_path / "changed.gguf"
    refused = 0
    for position in range(whole.index(b"q.weight") + 36):
        for value in (0, 9, 0x7F, 0xFF):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            try:
                weights = open_weights([path])
                for name in weights.shapes:
                    weights.tensor(name)
            except InputError:
                refused += 1
    assert refused > 200


def header(tensors=0, pairs=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


HOSTILE = {
    "2**60 tensors": (header(tensors=1 << 60), "cut off"),
    "2**60 pairs": (header(pairs=1 << 60), "cut off"),
    "an array of 2**60 numbers": (
        header(pairs=1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 1 << 60) + bytes(1 << 20),
        "more than 64 MB",
    ),
    "an array of 2**60 texts": (
        header(pairs=1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 1 << 60) + bytes(1 << 20),
        "cut off",
    ),
    "arrays of arrays": (
        header(pairs=1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1) + bytes(100),
        "arrays of arrays",
    ),
    "a name of 2**62 bytes": (header(pairs=1) + struct.pack("<Q", 1 << 62), "more than 64 MB"),
    "a name that is not UTF-8": (header(pairs=1) + struct.pack("<Q1s", 1, b"\xff"), "not UTF-8"),
    "a value of type 99": (header(pairs=1) + struct.pack("<Q1sI", 1, b"k", 99), "unknown type 99"),
    "version 4": (header(version=4), "version 4, or another byte order"),
    "another byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "or another byte order"),
    "2**31 dimensions": (header(tensors=1) + struct.pack("<Q1sI", 1, b"t", 1 << 31), "2147483648 dimensions"),
    "rows that are no blocks": (
        header(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 33, Kind.Q8_0, 0),
        "33 elements, no multiple of 32",
    ),
    "a tensor behind the end": (
        header(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, Kind.Q8_0, 1 << 60),
        "ends at byte",
    ),
    "the same name twice": (
        header(tensors=2) + 2 * struct.pack("<Q1sIQIQ", 1, b"t", 1, 0, 0, 0) + bytes(64),
        "it has 't' twice",
    ),
    "no alignment": (
        header(pairs=1) + struct.pack("<Q17sII", 17, b"general.alignment", 4, 0),
        "its alignment is 0",
    ),
    "no GGUF": (b"PK\x03\x04" + bytes(100), "does not begin with GGUF"),
    "nothing": (b"", "does not begin with GGUF"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(InputError, match=rf"{message}.*; download the file again"):
        open_weights([path])
    assert time.process_time() - started < 2


@pytest.mark.parametrize(("kind", "message"), [(9999, "does not know; run: pip"), (9, "Q8_1.*cannot decode")])
def test_types_that_cannot_be_decoded(tmp_path, kind, message):
    path = tmp_path / "type.gguf"
    path.write_bytes(header(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, kind, 0) + bytes(200))
    with pytest.raises(InputError, match=message):
        open_weights([path])


def test_one_of_several_parts(tmp_path):
    path = write(tmp_path / "p.gguf", {"a": (weight(), Kind.F32)}, metadata={"split.count": 3})
    with pytest.raises(InputError, match="is one of 3 parts; join them with llama-gguf-split --merge"):
        open_weights([path])


def test_the_format_is_that_of_the_content(tmp_path, whole):
    renamed = tmp_path / "model.safetensors"
    renamed.write_bytes(whole)
    with pytest.raises(InputError, match=r"model\.safetensors is a GGUF file; rename it to \.gguf"):
        open_weights([renamed])
    unnamed = tmp_path / "blob"
    unnamed.write_bytes(whole)
    assert isinstance(open_weights([unnamed]), GGUFWeights)
    with pytest.raises(InputError, match="are not one model's files"):
        open_weights([unnamed, renamed.rename(tmp_path / "other.gguf")])


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    for name, message in (("fifo.gguf", "a FIFO, not a regular file"), ("none.gguf", "No such file")):
        with pytest.raises(InputError, match=message):
            open_weights([tmp_path / name])
