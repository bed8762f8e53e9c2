"""Drawing dense flow."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditf.runtime.drawing.canvas import GAP, fit, side_by_side
from ditf.runtime.matching.flow import warp_image


def draw_flow(source: Image.Image, target: Image.Image, field: np.ndarray, back: np.ndarray) -> Image.Image:
    """Draw source and target, and below them the flow and the source warped over the target.

    In the flow's picture the hue is the direction (red is to the right, green down) and the saturation is the
    length. A twentieth of the pixels is longer than the length of full saturation, which the caption gives.
    Where the flow is right, the half-transparent warped source falls onto the target.

    Args:
        source, target: RGB images.
        field: float32 [H, W, 2], flow from the source to the target in pixels.
        back: the same from the target to the source.
    """
    length = float(np.percentile(np.linalg.norm(field, axis=2), 95))
    flow = fit(Image.fromarray(flow_colours(field, length)))
    warped = Image.fromarray(warp_image(np.asarray(source), back))
    over = fit(Image.blend(target, warped, 0.5))
    rows = [side_by_side([fit(source), fit(target)]), side_by_side([flow, over])]
    canvas = Image.new("RGB", (rows[0].width, sum(row.height for row in rows) + GAP), "white")
    canvas.paste(rows[0], (0, 0))
    canvas.paste(rows[1], (0, rows[0].height + GAP))
    if flow.width > 160 and flow.height > 40:
        _caption(
            canvas, (8, canvas.height - rows[1].height + flow.height - 8), f"full colour: {length:.0f} px"
        )
    return canvas


def flow_colours(field: np.ndarray, length: float) -> np.ndarray:
    """Colour a flow, uint8 [H, W, 3]: the hue is its direction, the saturation its length over `length`."""
    angle = np.arctan2(field[..., 1], field[..., 0]) / (2 * np.pi) % 1.0
    strength = np.clip(np.linalg.norm(field, axis=2) / max(length, 1e-6), 0.0, 1.0)
    channels = [np.rint(channel * 255).astype(np.uint8) for channel in (angle, strength, np.ones_like(angle))]
    return np.asarray(Image.merge("HSV", [Image.fromarray(channel) for channel in channels]).convert("RGB"))


def _caption(canvas: Image.Image, place: tuple[int, int], text: str) -> None:
    """Write text on white, with its lower left corner at a place."""
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    left, top, right, bottom = draw.textbbox(place, text, font, "ls")
    draw.rectangle((left - 4, top - 4, right + 4, bottom + 4), fill="white")
    draw.text(place, text, "black", font, "ls")
