"""Metrics of ACE's tables that follow from an architecture alone."""

from __future__ import annotations

import torch
from torch import nn

from feint.core.errors import ConfigError
from feint.diagnostics import connected_pixels, gradient_overlap, share_inside, top_pixels
from feint.diagnostics.numbers import Measured, Number, exact
from feint.models import ARCHITECTURES, build
from feint.recipes.metrics import Case, metric

__all__: list[str] = []


@metric("connected in the top overlap", models=True)
def _connected(case: Case) -> Measured:
    """S0 Table 2: share of ACE's connected pixels among those with the largest gradient overlap.

    Fields: `architecture`, `lam` (λ; `inf` is ACE without its skip connection), `p`.
    """
    fields = case.fields
    with torch.random.fork_rng(devices=[]):
        model = build(str(fields["architecture"]), float(fields["lam"])).eval()
    omega = gradient_overlap(model, (3, 32, 32))
    c = connected_pixels(model, 32, 32)
    top = top_pixels(omega, float(fields["p"]))
    return Measured({"omega": omega.numpy()}, {"value": exact(share_inside(c, top))})


@metric("layer", share=False)
def _layer(case: Case) -> Number:
    """A fact of a layer of an architecture: fields `architecture`, `layer`, `what`."""
    with torch.random.fork_rng(devices=[]):
        model = ARCHITECTURES[str(case.fields["architecture"])]()
    layer = model.get_submodule(str(case.fields["layer"]))
    what = str(case.fields["what"])
    if isinstance(layer, nn.Conv2d):
        known = {
            "inputs": layer.in_channels,
            "outputs": layer.out_channels,
            "kernel": layer.kernel_size[0],
            "stride": layer.stride[0],
        }
    elif isinstance(layer, nn.Linear):
        known = {"inputs": layer.in_features, "outputs": layer.out_features}
        if what in ("kernel", "stride"):
            return Number(None)
    else:
        raise ConfigError(f"layer {case.fields['layer']!r} is a {type(layer).__name__}")
    return Number(float(known[what]))
