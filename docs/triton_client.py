"""Where points of one image are in another, asked of `ditf serve` or of Triton: the same requests.

pip install 'tritonclient[http]' numpy pillow
python triton_client.py left.jpg right.jpg --points 120,88 300,250 --url 127.0.0.1:8000 --bundle demo-l9-fp16
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import tritonclient.http as protocol
from PIL import Image, ImageOps


def correspond(
    client: protocol.InferenceServerClient,
    bundle: str,
    source: np.ndarray,
    target: np.ndarray,
    points: np.ndarray,
    parameters: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Match points with a bundle's model `correspond`.

    Args:
        source, target: RGB uint8 [H, W, 3], of any size.
        points: float32 [N, 2], (x, y) in the source's pixels.
        parameters: "prompt", of a bundle with several; "method": argmax, window or kernel.
        headers: of HTTP: an API key.

    Returns:
        float32 [N, 2], (x, y) in the target's pixels, and cosines, float32 [N].
    """
    tensors = {"source": source, "target": target, "points": points}
    types = {"source": "UINT8", "target": "UINT8", "points": "FP32"}
    inputs = []
    for name, array in tensors.items():
        tensor = protocol.InferInput(name, list(array.shape), types[name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    answer = client.infer(f"{bundle}.correspond", inputs, headers=headers, parameters=parameters)
    return answer.as_numpy("matches"), answer.as_numpy("scores")


def read_image(path: Path) -> np.ndarray:
    """An image as the server takes it."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--points", nargs="+", required=True, metavar="X,Y")
    parser.add_argument("--url", default="127.0.0.1:8000")
    parser.add_argument("--bundle", required=True, help="its name: models are NAME.correspond, ...")
    arguments = parser.parse_args()
    points = np.array([[float(part) for part in point.split(",")] for point in arguments.points], np.float32)
    key = os.environ.get("DITF_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else None
    with protocol.InferenceServerClient(arguments.url) as client:
        matches, scores = correspond(
            client,
            arguments.bundle,
            read_image(arguments.source),
            read_image(arguments.target),
            points,
            headers=headers,
        )
    print(json.dumps({"matches": matches.tolist(), "scores": scores.tolist()}))


if __name__ == "__main__":
    main()
