"""The precision recipe: from measured ranges to what a float16 graph computes in float16.

1. Every value that the graph holds in float16 keeps a margin of `HEADROOM` to float16's largest number,
   because other images reach further than the measured ones.
2. If only the output of a branch's last linear is too large, its weights and bias are scaled by a power of
   two, which rounds only subnormals. The scale is undone in float32, where the residual is.
3. If any other value of a branch is too large (a linear's input, a query, a logit), the branch computes in
   float32.
4. The VAE encoder's residual between group norms is scaled as a whole: a group norm does not change under a
   factor on its input if its epsilon has the factor too. Convolutions between two norms are scaled likewise,
   each by its own power of two. The VAE's attention computes in float32 if its logits may overflow. An
   AutoencoderTiny has no norms and only ReLUs, which pass a factor on, so everything in it is scaled by one
   factor that is undone in float32 at its end.
5. If float16 features are too large, or any value is not finite, no graph is made.

See docs/design.md, "Precision".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditf.calib.channels import FLOAT16_MAX
from ditf.runtime.errors import InputError

HEADROOM = 8.0
LIMIT = FLOAT16_MAX / HEADROOM

INNER = ("weight", "input", "output", "query", "key", "logits", "attended", "hidden")
"""Kinds of values inside a branch, in the order in which they are computed."""

LAST = ("scaled weight", "emitted", "gated")
"""Kinds of a branch's last linear: its parameters, and its output without the gate and with it folded in."""

SHOWN = ("norm input", "gate")
"""Kinds that are float32 in every recipe; they are measured for the reader of calibration.json."""

VAE_RESIDUAL, VAE_INNER, VAE_LOGITS = "vae residual", "vae inner", "vae logits"
FEATURES = "features"


@dataclass(frozen=True)
class Extent:
    """The largest |x| that was measured of one value.

    Attributes:
        name: the module of the checkpoint that computes the value.
        branch: the branch that the module belongs to; a recipe puts whole branches in float32.
        kind: one of `INNER`, `LAST`, `SHOWN`, the VAE's kinds or `FEATURES`.
        stream: "image", "text", "both" or "condition".
        max_abs: the largest |x|.
    """

    name: str
    branch: str
    kind: str
    stream: str
    max_abs: float

    @property
    def headroom(self) -> float:
        """How many times larger float16's largest number is."""
        return FLOAT16_MAX / max(self.max_abs, 1e-30)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "branch": self.branch,
            "kind": self.kind,
            "stream": self.stream,
            "max_abs": self.max_abs,
            "headroom": self.headroom,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Extent:
        """The extent of an entry of calibration.json's `ranges`.

        Raises:
            KeyError, TypeError, ValueError: the entry is no extent.
        """
        name, branch, kind, stream = (document[key] for key in ("name", "branch", "kind", "stream"))
        if not all(isinstance(text, str) for text in (name, branch, kind, stream)):
            raise TypeError(f"{name!r:.60} is no name")
        return cls(name, branch, kind, stream, float(document["max_abs"]))


@dataclass(frozen=True)
class Scale:
    """A factor of 2**-exponent on a linear's weights and bias.

    Attributes:
        exponent: 0 or more; 0 means no scale.
        reason: the measured value that asks for the scale.
    """

    exponent: int = 0
    reason: str = ""


_UNSCALED = Scale()


@dataclass(frozen=True)
class Recipe:
    """The exceptions from the precision that was asked for.

    Attributes:
        float32: branches that compute in float32, and the reason for each.
        emitted: scales of the branches' last linears, by name, if the gate is not folded into them.
        gated: the same scales if the gate is folded in.
        vae_residual: the scale of the VAE encoder's residual.
        vae_inner: scales of the VAE encoder's convolutions between norms, by name.
        vae_attention_float32: the reason why the VAE's attention is float32; "" if it is not.
    """

    float32: Mapping[str, str] = field(default_factory=dict)
    emitted: Mapping[str, Scale] = field(default_factory=dict)
    gated: Mapping[str, Scale] = field(default_factory=dict)
    vae_residual: Scale = _UNSCALED
    vae_inner: Mapping[str, Scale] = field(default_factory=dict)
    vae_attention_float32: str = ""

    def scale(self, name: str, folded: bool) -> Scale:
        """The scale of a branch's last linear.

        Args:
            name: the linear's.
            folded: whether the gate is folded into its weights.
        """
        return (self.gated if folded else self.emitted).get(name, _UNSCALED)

    def exceptions(self, used: Mapping[str, Scale] | None = None) -> list[dict[str, str]]:
        """The exceptions as the manifest lists them: "where", "is" and "why".

        Args:
            used: scales of the last linears as they were built. By default, all scales; `gated` counts where
                a linear has both.
        """
        if used is None:
            used = {**self.emitted, **self.gated}
        scales = {**used, **self.vae_inner}
        if self.vae_residual.exponent:
            scales["VAE residual"] = self.vae_residual
        rows = [("float32", branch, reason) for branch, reason in self.float32.items()]
        rows += [(f"scaled by 2**-{scale.exponent}", name, scale.reason) for name, scale in scales.items()]
        if self.vae_attention_float32:
            rows.append(("float32", "VAE attention", self.vae_attention_float32))
        return [{"where": where, "is": what, "why": why} for what, where, why in rows]

    def summary(self) -> str:
        """The exceptions in one line."""
        exceptions = [f"{entry['where']} {entry['is']}" for entry in self.exceptions()]
        more = f" and {len(exceptions) - 4} more" if len(exceptions) > 4 else ""
        return ", ".join(exceptions[:4]) + more if exceptions else "nothing out of float16's range"


def choose_recipe(extents: Sequence[Extent]) -> Recipe:
    """Choose the recipe of a float16 graph.

    Args:
        extents: the measured values; `FEATURES` only if the features are float16.

    Raises:
        InputError: a value is not finite, or the features have no margin; the message names the first.
    """
    for extent in extents:
        if not math.isfinite(extent.max_abs):
            raise InputError(
                f"the {extent.kind} of {extent.name} is not finite on the calibration images",
                "check the checkpoint's weights",
            )
        if extent.kind == FEATURES:
            check_features(extent.max_abs)
    float32: dict[str, str] = {}
    for extent in extents:
        if extent.kind in INNER and extent.max_abs > LIMIT:
            float32.setdefault(extent.branch, _reason(extent))
    halves = [extent for extent in extents if extent.branch not in float32]
    residual = [extent for extent in extents if extent.kind == VAE_RESIDUAL]
    widest = max(_scales(residual).values(), key=lambda scale: scale.exponent, default=_UNSCALED)
    logits = [extent for extent in extents if extent.kind == VAE_LOGITS and extent.max_abs > LIMIT]
    return Recipe(
        float32=float32,
        emitted=_scales(e for e in halves if e.kind in ("emitted", "scaled weight")),
        gated=_scales(e for e in halves if e.kind in ("gated", "scaled weight")),
        vae_residual=widest,
        vae_inner=_scales(e for e in extents if e.kind == VAE_INNER),
        vae_attention_float32=_reason(logits[0]) if logits else "",
    )


def check_features(max_abs: float) -> None:
    """Check that float16 features keep the margin of `HEADROOM`.

    Raises:
        InputError: they do not, or they are not finite.
    """
    if not max_abs <= LIMIT:
        raise InputError(
            f"the features reach {max_abs:.3g}, which leaves no margin to float16's 65504",
            "export with --features-dtype float32",
        )


def power_of_two(max_abs: float) -> int:
    """The smallest s >= 0 for which max_abs * 2**-s is at most `LIMIT`."""
    return max(0, math.ceil(math.log2(max(max_abs, 1e-30) / LIMIT)))


def _scales(extents: Iterable[Extent]) -> dict[str, Scale]:
    """The scales of the values that need one, by name."""
    scales: dict[str, Scale] = {}
    for extent in extents:
        exponent = power_of_two(extent.max_abs)
        if exponent > scales.get(extent.name, _UNSCALED).exponent:
            scales[extent.name] = Scale(exponent, _reason(extent))
    return scales


def _reason(extent: Extent) -> str:
    stream = f" ({extent.stream} tokens)" if extent.stream == "text" else ""
    return f"{extent.kind} of {extent.name}{stream} reaches {extent.max_abs:.3g}"
