"""The precision recipe: from measured ranges to what float16 may compute, in one readable place.

1. Every value that float16 would hold keeps a margin of `HEADROOM` to its largest number: other images
   than the measured ones reach further.
2. A branch whose last linear alone emits too much: its weights and bias are scaled by a power of two, which
   rounds nothing but subnormals, and the scale is undone in float32, where the residual is.
3. A branch with anything else out of range (a linear's input, a query, a logit) computes in float32.
4. The VAE encoder's residual between group norms is scaled as a whole: a group norm does not see a factor
   on its input once its epsilon has it too. Convolutions between two norms likewise, each by its own power.
   Its attention computes in float32 where its logits may overflow. An AutoencoderTiny has no norms and only
   ReLUs, which pass a factor on: everything in it is scaled as a whole, and restored in float32 at its end.
5. Features that are to be float16 and are out of range, or values that are not finite: no graph is made.
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
"""Kinds of values inside a branch, in the order they are computed."""

LAST = ("scaled weight", "emitted", "gated")
"""Of a branch's last linear: parameters, what it emits with its gate apart, and with the gate folded in."""

SHOWN = ("norm input", "gate")
"""Kinds that are float32 in any recipe, measured for people."""

VAE_RESIDUAL, VAE_INNER, VAE_LOGITS = "vae residual", "vae inner", "vae logits"
FEATURES = "features"


@dataclass(frozen=True)
class Extent:
    """The largest |x| that was seen of one value.

    Attributes:
        name: the module of the checkpoint that computes it; branch: what it is recovered with.
        kind: one of `INNER`, `LAST`, `SHOWN`, the VAE's or `FEATURES`.
        stream: "image", "text", "both" or "condition".
    """

    name: str
    branch: str
    kind: str
    stream: str
    max_abs: float

    @property
    def headroom(self) -> float:
        """Times that float16's largest number is larger."""
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
        """Raises: KeyError, TypeError, ValueError where it is no extent."""
        name, branch, kind, stream = (document[key] for key in ("name", "branch", "kind", "stream"))
        if not all(isinstance(text, str) for text in (name, branch, kind, stream)):
            raise TypeError(f"{name!r:.60} is no name")
        return cls(name, branch, kind, stream, float(document["max_abs"]))


@dataclass(frozen=True)
class Scale:
    """Weights and bias carry 2**-exponent, and why; an exponent of 0 is no scale."""

    exponent: int = 0
    reason: str = ""


_UNSCALED = Scale()


@dataclass(frozen=True)
class Recipe:
    """What departs from the precision asked for.

    Attributes:
        float32: branches that compute in float32, and why.
        emitted, gated: scales of branches' last linears, by name, with the gate apart or folded in.
        vae_residual: of the VAE encoder's residual; vae_inner: of its convolutions between norms, by name.
        vae_attention_float32: why the VAE's attention is float32; "" where it is not.
    """

    float32: Mapping[str, str] = field(default_factory=dict)
    emitted: Mapping[str, Scale] = field(default_factory=dict)
    gated: Mapping[str, Scale] = field(default_factory=dict)
    vae_residual: Scale = _UNSCALED
    vae_inner: Mapping[str, Scale] = field(default_factory=dict)
    vae_attention_float32: str = ""

    def scale(self, name: str, folded: bool) -> Scale:
        """Of a branch's last linear."""
        return (self.gated if folded else self.emitted).get(name, _UNSCALED)

    def exceptions(self, used: Mapping[str, Scale] | None = None) -> list[dict[str, str]]:
        """For the manifest and for people: where, what it is, why.

        Args:
            used: scales of the last linears as they were built; before that, those with the gate folded in
                where there are both.
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
        """In a line."""
        exceptions = [f"{entry['where']} {entry['is']}" for entry in self.exceptions()]
        more = f" and {len(exceptions) - 4} more" if len(exceptions) > 4 else ""
        return ", ".join(exceptions[:4]) + more if exceptions else "nothing out of float16's range"


def choose_recipe(extents: Sequence[Extent]) -> Recipe:
    """The recipe for float16.

    Raises:
        InputError: values that no recipe brings into float16's range; names the first.
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
    """Features that are to be float16 have their margin, too.

    Raises:
        InputError: they do not, or are not finite.
    """
    if not max_abs <= LIMIT:
        raise InputError(
            f"the features reach {max_abs:.3g}, which leaves no margin to float16's 65504",
            "export with --features-dtype float32",
        )


def power_of_two(max_abs: float) -> int:
    """The least s >= 0 with max_abs * 2**-s inside the limit."""
    return max(0, math.ceil(math.log2(max(max_abs, 1e-30) / LIMIT)))


def _scales(extents: Iterable[Extent]) -> dict[str, Scale]:
    """By name, of the values that need a scale."""
    scales: dict[str, Scale] = {}
    for extent in extents:
        exponent = power_of_two(extent.max_abs)
        if exponent > scales.get(extent.name, _UNSCALED).exponent:
            scales[extent.name] = Scale(exponent, _reason(extent))
    return scales


def _reason(extent: Extent) -> str:
    stream = f" ({extent.stream} tokens)" if extent.stream == "text" else ""
    return f"{extent.kind} of {extent.name}{stream} reaches {extent.max_abs:.3g}"
