"""Which files of a hub model are fetched, and its errors, from a small server that answers as it does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ditf.export.checkpoints.hub import download, download_vae, wanted_files, wanted_vae_files
from ditf.runtime.errors import InputError, MissingComponent

FLUX = [
    "README.md",
    "ae.safetensors",
    "flux1-dev.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]


def test_only_what_an_export_reads_is_fetched():
    wanted = wanted_files(FLUX, None)
    left_out = {
        "README.md",
        "ae.safetensors",
        "flux1-dev.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
    }
    assert set(wanted) == set(FLUX) - left_out  # vae has the variant only


def test_a_variant_is_fetched_where_there_is_one():
    wanted = wanted_files(FLUX, "fp16")
    assert "text_encoder/model.fp16.safetensors" in wanted
    assert "text_encoder/model.safetensors" not in wanted
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in wanted


def test_of_a_vae_nothing_else_is_fetched():
    whole = wanted_vae_files([*FLUX, "vae/config.json"])
    assert sorted(whole) == ["vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"]
    weights = "diffusion_pytorch_model.safetensors"
    top = ["config.json", weights, "diffusion_pytorch_model.bin", "sdxl.vae.safetensors", "images/a.png"]
    assert wanted_vae_files(["README.md", *top]) == ["config.json", weights]
    assert wanted_vae_files(["README.md", "taesd_encoder.pth"]) == []


@pytest.fixture
def hub(monkeypatch):
    """A server that answers every request with one status, hub error code and body."""
    answer = {"status": 404, "code": "RepoNotFound", "body": b""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["status"])
            self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"] if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815  (http.server's own name)

        def log_message(self, *arguments):
            pass

    import huggingface_hub.constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        yield answer
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (404, "RepoNotFound", InputError, "no such model on the hub"),
        (401, "RepoNotFound", InputError, "no such model on the hub"),
        (403, "GatedRepo", InputError, "is gated; accept its licence"),
        (404, "RevisionNotFound", InputError, "has no revision v9"),
        (400, "", MissingComponent, "the hub cannot be reached"),
    ],
)
def test_the_hubs_errors(hub, status, code, error, message):
    hub |= {"status": status, "code": code}
    with pytest.raises(error, match=message):
        download("some/model", "v9", None)
    with pytest.raises(error, match=message):
        download_vae("some/model", "v9")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["README.md", "pytorch_lora_weights.safetensors"], "is a LoRA.*--lora"),
        (["split_files/flux1-dev.safetensors"], "--model, and the pipeline .* with --base"),
        (["config.json", "diffusion_pytorch_model.safetensors"], "--model BASE --transformer DIR"),
        (["unet/config.json", "sd_xl_base_1.0.safetensors"], "has a UNet"),
    ],
)
def test_a_repository_that_is_no_pipeline_is_not_downloaded(hub, files, message):
    listing = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files]
    hub |= {"status": 200, "code": "", "body": json.dumps(listing).encode()}
    with pytest.raises(InputError, match=message):
        download("some/model", None, None)
