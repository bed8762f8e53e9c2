"""`ditf sign`: sign a bundle and its engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditf.cli.support.options import BundleArgument, JsonOption, verb
from ditf.cli.support.output import show, write_json
from ditf.cli.support.paths import check_writable
from ditf.runtime.backends.engine_records import (
    RECORD,
    engine_folders,
    parse_record,
    record_content,
    verify_plans,
)
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.manifest import MANIFEST, manifest_content, parse_manifest
from ditf.runtime.bundles.signing import SIGNATURE_SUFFIX, signature, still_signed
from ditf.runtime.errors import InputError
from ditf.runtime.files.writing import write_whole


@verb()
def sign(
    bundle: BundleArgument,
    key: Annotated[
        Path,
        typer.Option(
            "--key", metavar="KEY", help="OpenSSH private key, or the public key of one that ssh-agent holds."
        ),
    ],
    json_file: JsonOption = None,
) -> None:
    """Sign a bundle and its engines, for users who open them with --require-signature.

    Every hash is checked first. The signatures cover manifest.json and each engine.json, which hold
    the hashes of all other files, and lie beside them.
    """
    check_writable(json_file, inputs=(bundle, key))
    contents = {bundle / MANIFEST: manifest_content(bundle)}
    opened = Bundle(bundle, parse_manifest(bundle, contents[bundle / MANIFEST]))
    opened.verify(opened.manifest.files)
    for folder in engine_folders(bundle):
        content = record_content(folder)
        verify_plans(folder, parse_record(folder, content))
        contents[folder / RECORD] = content
    for path, content in contents.items():
        _check_place(path.with_name(path.name + SIGNATURE_SUFFIX), content)
    signed = {path: signature(content, key) for path, content in contents.items()}
    for path, made in signed.items():
        write_whole(path.with_name(path.name + SIGNATURE_SUFFIX), made)
        show(f"signed {path}")
    write_json(json_file, {"bundle": str(bundle), "signed": [str(path) for path in signed]})


def _check_place(path: Path, content: bytes) -> None:
    """Refuse to write a signature through a link or FIFO in the bundle, or to sign changed content silently.

    Raises:
        InputError: `path` is no regular file, or holds a signature of other content.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is no regular file", "remove it")
    if path.exists() and not still_signed(content, path):
        raise InputError(
            f"{path.with_suffix('')} has changed since it was signed",
            f"get it again or build it again, or remove {path} to sign it as it is now",
        )
