"""Data of all samples together: known values, and the gradients of the layers next below them.

With v_p the known values nearest to the data, k_p the cotangents there, and j the layers through
which paths lead down from them first, the data of the batch make

    mean_b ‖f_p(x_b) − v_pb‖²/‖v_pb‖²  +  mean_j ‖Σ_b ∂⟨k_pb, f_p(x_b)⟩/∂W_j − G_j‖²/‖G_j‖²

zero.  The values alone leave a search among many local minima where a max-pool hides which entry
of a window they are of: the gradient of the layer below says it, for all samples in one sum.  Kinks
are rounded off, and sharpened level by level; where that ends beside the answer, again from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rgap.jacobian.frontier import Frontier
from rgap.machine.clock import Clock
from rgap.network.affine import Affine
from rgap.recursion.graph import GraphDescent
from rgap.solvers.lbfgs import lowered

__all__ = ["JointSearch"]

LEVELS = 9, 7  # of sharpness, of the first pass and of those after it
BLUNT, SHARP = (2.0, 8.0), (60.0, 200.0)  # the first and the last of the first and second pass
SHARPER = 2.0  # factor on both with every pass after the second
STEPS = 60, 80  # of L-BFGS a level


class JointSearch:
    """L-BFGS in float32 on the known values of a batch and the gradients below them.

    Args:
        function: the known values nearest to the data, float32.
        cotangents: at these, by place.
        gradients: of layers below them, float64, by place.
        clock: when no further level is begun.
    """

    def __init__(
        self,
        function: Frontier,
        cotangents: Mapping[int, Tensor],
        gradients: Mapping[int, Tensor],
        clock: Clock,
    ) -> None:
        self.function, self.clock = function, clock
        self.cotangents = {place: k.float() for place, k in cotangents.items()}
        self.gradients = {place: g.float() for place, g in gradients.items()}
        self.wanted = [function.known[place].value.float() for place in function.edge]
        whole = sum((v.square().flatten(1).sum(1) for v in self.wanted), start=torch.zeros(()))
        self.sizes = whole.clamp_min(1e-30)

    @staticmethod
    def of(
        function: Frontier, told: GraphDescent, gradients: Mapping[str, Tensor], clock: Clock
    ) -> JointSearch | None:
        """None where no gradient below the known values is a function of the data and of them.

        Args:
            function: the known values nearest to the data, float32.
            told: what gradients determine of the network's values.
            gradients: the update, by parameter name.
            clock: when no further level is begun.
        """
        nodes, edge, sent = function.flow.nodes, set(function.edge), dict[int, Tensor]()
        if not edge <= told.cotangents.keys() - told.ends.keys():
            return None
        if any(edge & set(node.sources) for _, node in function.between()):
            return None  # its cotangent has what comes from the other known value in it
        open_, seen = list(edge), set[int]()
        while open_:
            place = open_.pop()
            link = nodes[place].link
            if place in seen or not place:
                continue
            seen.add(place)
            if not isinstance(link, Affine):
                open_ += nodes[place].sources
            elif not nodes[place].shared and link.weight_name in gradients:
                gradient = link.sent(gradients)
                if bool(gradient.any()):
                    sent[place] = gradient
        cotangents = {place: told.cotangents[place].value for place in edge}
        return JointSearch(function, cotangents, sent, clock) if sent else None

    def sent(self, values: Mapping[int, Tensor], rows: Tensor) -> list[Tensor]:
        """What some samples send at the layers, in the graph of what the values are made of.

        Args:
            values: of the network, of these samples.
            rows: which of the batch they are, [B].
        """
        edge = [(values[p] * self.cotangents[p][rows]).sum() for p in self.function.edge]
        outputs = [values[place] for place in self.gradients]
        cotangents = torch.autograd.grad(torch.stack(edge).sum(), outputs, create_graph=True)
        made = []
        for place, k in zip(self.gradients, cotangents, strict=True):
            node = self.function.flow.nodes[place]
            assert isinstance(node.link, Affine)
            made.append(node.link.weight_gradient(values[node.sources[0]], k))
        return made

    def misfit(
        self, x: Tensor, rows: Tensor, left: Sequence[Tensor], sharp: Mapping[int, float]
    ) -> Tensor:
        """Of some samples, in the graph of x.

        Args:
            x: these samples.
            rows: which of the batch they are, [B].
            left: of every gradient, without what the others send.
            sharp: by place of a step with a kink, how sharp it is.
        """
        values = self.function.values(x, sharp)
        missed = [
            (values[place] - wanted[rows]).square().flatten(1).sum(1) / self.sizes[rows]
            for place, wanted in zip(self.function.edge, self.wanted, strict=True)
        ]
        own = zip(self.sent(values, rows), left, strict=True)
        apart = [(mine - g).square().sum() / g.square().sum() for mine, g in own]
        return torch.stack(missed).sum(0).mean() + torch.stack(apart).mean()

    @property
    def late(self) -> bool:
        """True if the time is up."""
        return self.clock.late

    def descended(self, x: Tensor, held: Sequence[bool], number: int) -> tuple[Tensor, float]:
        """Where one pass leads, [B, *in_shape], and the misfit there of samples that are not held.

        Args:
            x: where it begins.
            held: by sample, whether it is known, and stays.
            number: passes before it.
        """
        later = int(number > 0)
        levels, more = LEVELS[later], SHARPER ** max(number - 1, 0)
        blunt, sharpest = more * BLUNT[later], more * SHARP[later]
        free, x = torch.tensor([not known for known in held]), x.float()
        left = list(self.gradients.values())
        if not bool(free.all()):
            others = x[~free].requires_grad_()
            known = self.sent(self.function.values(others), ~free)
            left = [g - own.detach() for g, own in zip(left, known, strict=True)]
        some = x[free]
        for level in range(levels):
            beta = blunt * (sharpest / blunt) ** (level / (levels - 1))
            sharp = self.function.sharpness(some, beta)
            missed_by = partial(self.misfit, rows=free, left=left, sharp=sharp)
            some = lowered(some, STEPS[later], missed_by, self.clock.deadline)
            if self.late:
                break
        with torch.enable_grad():  # its own gradients are part of it
            missed = self.misfit(some.clone().requires_grad_(), free, left, {})
        return x.index_put((free,), some), float(missed.detach())
