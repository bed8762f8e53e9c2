"""Signatures of bundles and engines, in OpenSSH's format, made and checked by `ssh-keygen -Y`.

The hashes in a bundle show that its files belong together, but not who made them. A signature of
manifest.json, which holds the hashes of the other files, shows both. A signature of engine.json does the same
for an engine's plans.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ditf.runtime.errors import BundleError, InputError, MissingComponent
from ditf.runtime.files.reading import read_regular
from ditf.runtime.files.unfinished import scratch_folder

SIGNATURE_SUFFIX = ".sig"
NAMESPACE = "ditf-bundle"
"""The purpose that a signature states, so that one made for mail or for git is not valid for a bundle."""

_PRINCIPAL = "signer"
_LARGEST = 64 << 10  # bytes of a signature, or of a file of keys
_PUBLIC_KEY = re.compile(r"(?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[\w@.-]+ [A-Za-z0-9+/]+=*(?: .*)?", re.ASCII)
_SECONDS = 60.0  # for a check; signing has no limit, because it may wait for a passphrase or a touch


@dataclass(frozen=True)
class Trust:
    """What a user accepts of a bundle.

    Attributes:
        signers: a file of OpenSSH public keys, one of which must have signed what is opened. None accepts
            bundles without a signature.
        host_code: whether engines may run code of their own on the CPU.
    """

    signers: Optional[Path] = None
    host_code: bool = False

    def check(self, path: Path, content: bytes) -> None:
        """Check the signature that lies beside a file, before the file's content is used.

        Args:
            path: the file; its signature has the same name and the suffix ".sig".
            content: the bytes that were read from it and will be used.

        Raises:
            BundleError: the file is not signed, or not by one of the signers.
            InputError: the file of keys cannot be used.
            MissingComponent: ssh-keygen is not installed.
        """
        if self.signers is None:
            return
        keys = _public_keys(self.signers)
        signature = path.with_name(path.name + SIGNATURE_SUFFIX)
        try:
            signed = read_regular(signature, _LARGEST)
        except OSError as error:
            raise BundleError(
                f"{path} has no signature ({signature.name}: {error.strerror})",
                "get a signed bundle, or sign it: ditf sign BUNDLE --key KEY",
            ) from error
        with scratch_folder("ditf-signature-") as folder:
            allowed, copy = folder / "allowed_signers", folder / "signature"
            allowed.write_text("".join(f'{_PRINCIPAL} namespaces="{NAMESPACE}" {key}\n' for key in keys))
            copy.write_bytes(signed)
            done = _ssh_keygen(
                ["-Y", "verify", "-f", str(allowed), "-I", _PRINCIPAL, "-n", NAMESPACE, "-s", str(copy)],
                content,
                _SECONDS,
            )
        if done.returncode != 0:
            raise BundleError(
                f"{path} is not signed by a key in {self.signers}, or was changed after it was signed",
                "get the bundle again from who signed it",
            )


ANYONE = Trust()
"""The default: no signature is required, and engines run no code of their own on the CPU."""


def signature(content: bytes, key: Path) -> bytes:
    """Sign some bytes and return the signature.

    Args:
        key: the file of a private key, or of a public key whose private key ssh-agent holds.

    Raises:
        InputError: the key cannot sign.
        MissingComponent: ssh-keygen is not installed.
    """
    if not key.is_file():  # ssh-keygen would wait for a FIFO
        why = "it is no file of a key" if key.exists() else "no such file"
        raise InputError(f"{key} cannot sign ({why})", "make a key with: ssh-keygen -t ed25519 -f KEY")
    done = _ssh_keygen(["-Y", "sign", "-f", str(key), "-n", NAMESPACE], content, None)
    if done.returncode != 0 or not done.stdout:
        reason = " ".join(done.stderr.decode("utf-8", "replace").replace("@", " ").split())
        if "too open" in reason:
            raise InputError(f"{key} cannot sign (others may read it)", f"run: chmod 600 {key}")
        raise InputError(
            f"{key} cannot sign ({reason[-160:]})",
            "give an OpenSSH private key and its passphrase, or a public key with ssh-agent",
        )
    return done.stdout


def still_signed(content: bytes, signature: Path) -> bool:
    """Whether a signature by any key is valid for this content."""
    arguments = ["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(signature)]
    return _ssh_keygen(arguments, content, _SECONDS).returncode == 0


def _public_keys(path: Path) -> list[str]:
    """Read a file of public keys: the type and key of each line.

    Raises:
        InputError: the file cannot be read, or holds anything else.
    """
    try:
        text = read_regular(path, _LARGEST).decode("utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "name a file of public keys") from error
    except UnicodeDecodeError:
        text = "binary"
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines or not all(_PUBLIC_KEY.fullmatch(line) for line in lines):
        private = "PRIVATE KEY" in text
        raise InputError(
            f"{path} is {'a private key' if private else 'no file of OpenSSH public keys'}",
            f"name the public one: {path}.pub" if private else "name one such as id_ed25519.pub",
        )
    return [" ".join(line.split(" ")[:2]) for line in lines]


def _ssh_keygen(
    arguments: list[str], content: bytes, seconds: Optional[float]
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["ssh-keygen", *arguments], input=content, capture_output=True, timeout=seconds, check=False
        )
    except FileNotFoundError:
        raise MissingComponent("ssh-keygen is not installed", "run: apt install openssh-client") from None
