"""`ditf sign` and --require-signature, with real keys and the real ssh-keygen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ditf as package
from ditf.runtime.bundles.bundle import Bundle
from ditf.runtime.bundles.signing import NAMESPACE, Trust
from ditf.runtime.errors import BundleError, InputError, MissingComponent

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs: mine and others."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "others"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "a comment", "-f", folder / name],
            check=True,
        )
    return folder


@pytest.fixture
def copy(demo_bundle, tmp_path):
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


@pytest.fixture
def signed(ditf, copy, keys):
    done = ditf("sign", copy, "--key", keys / "mine")
    assert done.returncode == 0, done.stderr
    return copy


def edit(bundle, **changes):
    document = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**document, **changes}))


def test_a_signed_bundle_is_opened(signed, keys):
    Bundle.open(signed, Trust(keys / "mine.pub")).verify(["features.onnx"])
    with package.load(signed, require_signature=keys / "mine.pub") as model:
        assert model.features(np.zeros((96, 96, 3), np.uint8)).array.shape == (128, 12, 12)


def test_one_key_of_several(signed, keys, tmp_path):
    both = tmp_path / "both.pub"
    both.write_text(f"# ours\n\n{(keys / 'others.pub').read_text()}{(keys / 'mine.pub').read_text()}")
    Bundle.open(signed, Trust(both))


def test_the_signature_is_openssh_own(signed, keys, tmp_path):
    """Checked by ssh-keygen alone, as someone without ditf would."""
    allowed = tmp_path / "allowed"
    allowed.write_text(f"me@example.org {(keys / 'mine.pub').read_text()}")
    with (signed / "manifest.json").open() as content:
        subprocess.run(
            [
                *("ssh-keygen", "-Y", "verify", "-f", allowed, "-I", "me@example.org"),
                *("-n", NAMESPACE, "-s", signed / "manifest.json.sig"),
            ],
            stdin=content,
            check=True,
            capture_output=True,
        )


@pytest.mark.parametrize("change", ["unsigned", "other key", "altered", "other purpose", "rubbish", "folder"])
def test_what_is_not_signed_as_it_must_be(signed, keys, change):
    signature = signed / "manifest.json.sig"
    signers = keys / "mine.pub"
    if change == "unsigned":
        signature.unlink()
    elif change == "other key":
        signers = keys / "others.pub"
    elif change == "altered":
        edit(signed, prompt="a cat")
    elif change == "other purpose":
        done = subprocess.run(
            ["ssh-keygen", "-Y", "sign", "-f", keys / "mine", "-n", "git"],
            input=(signed / "manifest.json").read_bytes(),
            capture_output=True,
            check=True,
        )
        signature.write_bytes(done.stdout)
    elif change == "rubbish":
        signature.write_bytes(b"\0" * 100)
    else:
        signature.unlink()
        signature.mkdir()
    with pytest.raises(
        BundleError, match="no signature" if change in ("unsigned", "folder") else "not signed"
    ):
        Bundle.open(signed, Trust(signers))


def test_the_signature_is_checked_before_the_manifest_is_read(signed, keys):
    (signed / "manifest.json").write_text("no JSON")
    with pytest.raises(BundleError, match="is not signed by a key in"):
        Bundle.open(signed, Trust(keys / "mine.pub"))


def test_files_that_are_no_public_keys(signed, keys, tmp_path):
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match=r"is a private key; name the public one: .*mine\.pub"):
        Bundle.open(signed, Trust(keys / "mine"))
    for name, problem in (
        ("text", "no file of OpenSSH"),
        ("empty", "no file of"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(InputError, match=problem):
            Bundle.open(signed, Trust(tmp_path / name))


def test_a_line_of_keys_adds_no_options(signed, keys, tmp_path):
    """A line of allowed_signers could let another authority sign; a line of public keys cannot."""
    (tmp_path / "keys").write_text(f'* cert-authority,namespaces="*" {(keys / "others.pub").read_text()}')
    with pytest.raises(InputError, match="no file of OpenSSH public keys"):
        Bundle.open(signed, Trust(tmp_path / "keys"))


def test_without_ssh_keygen(signed, keys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingComponent, match="apt install openssh-client"):
        Bundle.open(signed, Trust(keys / "mine.pub"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["inspect"],
        ["bench", "--seconds", "0.1"],
        ["match", "left.png", "left.png", "--points", "1,1"],
        ["features", "left.png", "-o", "features.npz"],
        ["track", "left.png", "left.png", "--points", "1,1"],
        ["build", "--target", "sm_89"],
        ["engines", "list"],
        ["export-triton", "--repository", "repository"],
        ["eval", "creatures"],
        ["serve", "--port", "0"],
    ],
)
def test_every_verb_refuses_an_unsigned_bundle(ditf, copy, keys, tmp_path, arguments):
    Image.new("RGB", (96, 96)).save(tmp_path / "left.png")
    verbs = arguments[: 2 if arguments[0] in ("engines", "eval") else 1]
    done = ditf(*verbs, copy, *arguments[len(verbs) :], "--quiet", "--require-signature", keys / "mine.pub")
    assert done.returncode == 2, done.stderr
    assert "manifest.json has no signature" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bundle_that_is_damaged_is_not_signed(ditf, copy, keys):
    (copy / "features.onnx").write_bytes(b"x")
    done = ditf("sign", copy, "--key", keys / "mine")
    assert (done.returncode, "features.onnx is truncated" in done.stderr) == (2, True)
    assert not (copy / "manifest.json.sig").exists()


def test_a_key_that_cannot_sign(ditf, copy, tmp_path):
    done = ditf("sign", copy, "--key", tmp_path / "none")
    assert (done.returncode, "cannot sign" in done.stderr, done.stderr.count("\n")) == (2, True, 1)


def test_engines_are_signed_too(ditf, signed, keys):
    """An engine that was built after the bundle was signed is none of the signer's."""
    from ditf.runtime.backends.engine_records import engine_folders, read_record

    assert ditf("build", signed, "--target", "sm_89", "--backend", "tensorrt-rtx").returncode == 0
    [folder] = engine_folders(signed)
    trust = Trust(keys / "mine.pub")
    with pytest.raises(BundleError, match=r"engine\.json has no signature"):
        read_record(folder, trust)
    assert ditf("sign", signed, "--key", keys / "mine").returncode == 0
    assert read_record(folder, trust).target == "sm_89"
    (folder / "engine.json").write_text((folder / "engine.json").read_text().replace("sm_89", "sm_80"))
    with pytest.raises(BundleError, match="not signed by a key in"):
        read_record(folder, trust)


def test_every_verb_that_opens_a_bundle_has_the_option():
    from typer.main import get_command

    from ditf.cli.main import app

    def commands(group):
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else [command]

    for command in commands(get_command(app)):
        names = {parameter.name for parameter in command.params}
        if names & {"bundle", "bundles"} and command.name not in ("sign", "export"):
            assert "signature" in names, command.name


def test_the_commands_of_security_md(root, demo_bundle, tmp_path):
    """As they stand there, in a shell."""
    [block] = re.findall(r"```sh\n(.*?)```", (root / "SECURITY.md").read_text("utf-8"), re.DOTALL)
    shutil.copytree(demo_bundle, tmp_path / "bundles" / "demo-l9-fp16")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "signed bundles/demo-l9-fp16/manifest.json" in done.stdout


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_signature_is_not_written_through_what_the_bundle_brought(ditf, copy, keys, tmp_path, kind):
    (tmp_path / "victim").write_text("mine")
    place = copy / "manifest.json.sig"
    place.symlink_to(tmp_path / "victim") if kind == "link" else os.mkfifo(place)
    done = ditf("sign", copy, "--key", keys / "mine")
    assert (done.returncode, "is no regular file" in done.stderr) == (2, True)
    assert (tmp_path / "victim").read_text() == "mine"


def test_keys_are_not_overwritten(ditf, signed, keys, tmp_path):
    private, public = (shutil.copy(keys / name, tmp_path) for name in ("mine", "mine.pub"))
    before = [Path(one).read_bytes() for one in (private, public)]
    done = ditf("sign", signed, "--key", private, "--json", private)
    assert (done.returncode, "would overwrite" in done.stderr) == (2, True)
    done = ditf("inspect", signed, "--require-signature", public, "--json", public)
    assert (done.returncode, "would overwrite" in done.stderr) == (2, True)
    assert [Path(one).read_bytes() for one in (private, public)] == before


def test_a_key_that_is_a_fifo(ditf, copy, tmp_path):
    os.mkfifo(tmp_path / "key")
    done = ditf("sign", copy, "--key", tmp_path / "key")
    assert (done.returncode, "it is no file of a key" in done.stderr) == (2, True)


def test_an_unsigned_engine_is_neither_reused_nor_called_fitting(ditf, signed, keys, built_bundle):
    arguments = ("--require-signature", keys / "mine.pub")
    shutil.copytree(built_bundle / "engines", signed / "engines")
    listed = ditf("engines", "list", signed, *arguments)
    assert "has no signature" in listed.stdout
    assert "fits the bundle" not in listed.stdout
    built = ditf("build", signed, "--target", "sm_89", "--backend", "tensorrt-rtx", *arguments)
    assert "has no signature" in built.stderr + built.stdout
    assert "was there" not in built.stdout


def test_engines_behind_a_link_are_left_alone(ditf, copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (copy / "engines").symlink_to(tmp_path / "elsewhere")
    for arguments in (("engines", "prune", copy), ("build", copy, "--target", "sm_89")):
        done = ditf(*arguments)
        assert (done.returncode, "engines is a link" in done.stderr) == (2, True), done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_engine_that_was_changed_is_not_signed_again(ditf, signed, keys, built_bundle):
    """Whoever swaps a plan and its hash must not get the next release's signature for it."""
    shutil.copytree(built_bundle / "engines", signed / "engines")
    assert ditf("sign", signed, "--key", keys / "mine").returncode == 0
    assert "  signed" in ditf("inspect", signed, "--require-signature", keys / "mine.pub").stdout
    [record] = (signed / "engines").glob("*/engine.json")
    record.write_text(record.read_text().replace('"peak_bytes": ', '"peak_bytes": 1'))
    done = ditf("sign", signed, "--key", keys / "mine")
    assert (done.returncode, "engine.json has changed since it was signed" in done.stderr) == (2, True)
    assert "not signed: " in ditf("inspect", signed, "--require-signature", keys / "mine.pub").stdout
    record.with_name("engine.json.sig").unlink()
    assert ditf("sign", signed, "--key", keys / "mine").returncode == 0


@pytest.mark.parametrize(
    ("content", "fix"), [("readable", "chmod 600"), ("junk", "give an OpenSSH private key")]
)
def test_keys_that_cannot_sign_say_why(ditf, copy, keys, tmp_path, content, fix):
    key = tmp_path / "key"
    key.write_bytes((keys / "mine").read_bytes() if content == "readable" else b"junk")
    key.chmod(0o644 if content == "readable" else 0o600)
    done = ditf("sign", copy, "--key", key)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert fix in done.stderr
