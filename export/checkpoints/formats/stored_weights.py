"""Opens the files that weights are stored in, whatever their format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ditf.export.checkpoints.formats.gguf_header import MAGIC
from ditf.export.checkpoints.formats.gguf_weights import GGUFWeights
from ditf.export.checkpoints.formats.safetensors_weights import SafetensorsWeights
from ditf.export.checkpoints.weights import Weights
from ditf.runtime.errors import InputError
from ditf.runtime.files.reading import open_regular


def open_weights(files: Sequence[Path]) -> Weights:
    """Open the files of one model's weights: safetensors files, or one GGUF file.

    Names are those of the files. `quantised.dequantised` makes numbers of what is quantised.

    Args:
        files: safetensors files that share no name, or one GGUF file.

    Raises:
        InputError: a file is missing, truncated, or of another format than its name says.
    """
    kinds = {path: _is_gguf(path) for path in files}
    if not any(kinds.values()):
        return SafetensorsWeights(files)
    if len(files) > 1:
        raise InputError(f"{files[0]} and {files[1]} are not one model's files", "give one GGUF file")
    return GGUFWeights(files[0])


def _is_gguf(path: Path) -> bool:
    named = path.suffix.lower()
    try:
        with open_regular(path) as file:
            begins = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})", "check the path") from error
    if begins and named == ".safetensors":
        raise InputError(f"{path} is a GGUF file", "rename it to .gguf")
    return begins or named == ".gguf"
