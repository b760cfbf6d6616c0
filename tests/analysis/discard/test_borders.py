"""Ranks of layers behind a border that shows values again, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rgap.analysis import audit

BORDERS = {
    "reflect": nn.ReflectionPad2d,
    "replicate": nn.ReplicationPad2d,
    "circular": nn.CircularPad2d,
}


def measured(model: nn.Sequential, first: int, place: int, batch: int) -> tuple[int, int]:
    """Entries of what the layer and the steps before it are given, and the rank of all equations.

    Those are the gradient of the weight for the layer's own cotangents, and its outputs.
    """
    x = torch.rand(batch, 2, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    u, layer = model[:first](x).detach(), model[place]
    z = model[first : place + 1](u)
    y = torch.arange(batch) % 3
    k = torch.autograd.grad(F.cross_entropy(model[place + 1 :](z), y), z)[0]

    def equations(flat: Tensor) -> Tensor:
        shown = model[first:place](flat.reshape(u.shape))
        weight = layer.weight.detach().requires_grad_()
        values = {"weight": weight, "bias": layer.bias}
        z = torch.func.functional_call(layer, values, (shown,))
        slope = torch.autograd.grad((z * k).sum(), weight, create_graph=True)[0].flatten()
        return torch.cat([slope / k.norm(), z.flatten()])

    jacobian = torch.autograd.functional.jacobian(equations, u.flatten())
    return u.numel(), int(torch.linalg.matrix_rank(jacobian, rtol=1e-10))


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_repeating_border_is_no_unknown(border: str, fused: bool) -> None:
    torch.manual_seed(0)
    if fused:
        steps = [nn.Conv2d(3, 2, 3, 2, 1, padding_mode=border)]
    else:
        steps = [BORDERS[border](1), nn.Conv2d(3, 2, 3, 2, 1)]
    body = [nn.Conv2d(2, 3, 3, 1, 1), nn.Sigmoid(), *steps, nn.Sigmoid(), nn.Flatten()]
    width = nn.Sequential(*body)(torch.zeros(1, 2, 5, 5)).shape[1]
    model = nn.Sequential(*body, nn.Linear(width, 3)).double().eval()
    place = 2 + len(steps) - 1
    for batch in (1, 3):
        unknowns, joint = measured(model, 2, place, batch)
        for method in ("exact", "formula"):
            rows = {row.layer: row for row in audit(model, (2, 5, 5), (batch,), method=method).rows}
            row = rows[str(place)]
            assert row.unknowns == unknowns, (method, row)
            assert row.joint_rank == joint if row.exact else row.joint_rank >= joint, (method, row)
            assert row.gradient_rank <= unknowns and row.nullity == unknowns - row.joint_rank
            assert row.exact or method == "formula" or not fused
