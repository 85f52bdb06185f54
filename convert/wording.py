"""What the figures of a run are called: models of text and denoisers are measured by different things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Words for what a profile and a selection hold.

    `loss` is what damage "kl" is, `unit` what follows it at an axis and `explained` says it in full; `first_order` is
    that of the first-order effect. `group` is the smallest part that is converted, `tokens` what lengths count, and
    `needles` whether there is retrieval to lose. Methods that do not apply are `foreign`.
    """

    loss: str
    unit: str
    explained: str
    first_order: str
    group: str
    tokens: str
    needles: bool
    foreign: tuple[str, ...] = ()


TEXT = Wording(
    loss="KL",
    unit=", nats",
    explained="KL to the teacher, nats",
    first_order="What the loss of the text should change by, to first order, in nats",
    group="KV group",
    tokens="tokens",
    needles=True,
)
IMAGES = Wording(
    loss="velocity error",
    unit="",
    explained="Velocity error: squared error of the prediction over the square of the teacher's",
    first_order="What the model's own training loss should change by, to first order, relative to its target's square",
    group="head",
    tokens="image tokens",
    needles=False,
    foreign=("moa",),  # it counts distances in a text
)


def of_sites(sites: Any) -> Wording:
    """Those of a profile's sites, plain data: the tokens of a denoiser stand on a grid."""
    return IMAGES if any(site.get("axes") for site in sites if isinstance(site, Mapping)) else TEXT
