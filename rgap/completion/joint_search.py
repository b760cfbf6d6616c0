"""Data of all samples together: known values, and the gradients of the layers next below them.

With v_p the known values nearest to the data, k_p the cotangents there, and j the layers through
which paths lead down from them first, the data of the batch make

    mean_b ‖f_p(x_b) − v_pb‖²/‖v_pb‖²  +  mean_j ‖Σ_b ∂⟨k_pb, f_p(x_b)⟩/∂W_j − G_j‖²/‖G_j‖²

zero.  The values alone leave a search among many local minima where a max-pool hides which entry
of a window they are of: the gradient of the layer below says it, for all samples in one sum.  Kinks
are rounded off, and sharpened level by level; where that ends beside the answer, again from there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import inf

import torch
from torch import Tensor

from rgap.jacobian.frontier import Frontier
from rgap.network.affine import Affine
from rgap.recursion.graph import GraphDescent

__all__ = ["JointSearch"]

LEVELS = 9, 7  # of sharpness, of the first pass and of those after it
BLUNT, SHARP = (2.0, 8.0), (60.0, 200.0)  # the first and the last of each
STEPS, HISTORY = (60, 80), 30  # of L-BFGS a level


class JointSearch:
    """L-BFGS in float32 on the known values of a batch and the gradients below them.

    Args:
        function: the known values nearest to the data, float32.
        cotangents: at these, by place.
        gradients: of layers below them, float64, by place.
        deadline: of ``time.perf_counter``.
    """

    def __init__(
        self,
        function: Frontier,
        cotangents: Mapping[int, Tensor],
        gradients: Mapping[int, Tensor],
        deadline: float,
    ) -> None:
        self.function, self.deadline = function, deadline
        self.cotangents = {place: k.float() for place, k in cotangents.items()}
        self.gradients = {place: g.float() for place, g in gradients.items()}
        self.wanted = [function.known[place].value.float() for place in function.edge]
        whole = sum((v.square().flatten(1).sum(1) for v in self.wanted), start=torch.zeros(()))
        self.sizes = whole.clamp_min(1e-30)

    @staticmethod
    def of(
        function: Frontier, told: GraphDescent, gradients: Mapping[str, Tensor], deadline: float
    ) -> JointSearch | None:
        """None where no gradient below the known values is a function of the data and of them.

        Args:
            function: the known values nearest to the data, float32.
            told: what gradients determine of the network's values.
            gradients: the update, by parameter name.
            deadline: of ``time.perf_counter``.
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
        return JointSearch(function, cotangents, sent, deadline) if sent else None

    def misfit(self, x: Tensor, sharp: Mapping[int, float]) -> Tensor:
        """Of all samples, 2 where values and gradients are 0; in the graph of x."""
        values = self.function.values(x, sharp)
        edge = list(zip(self.function.edge, self.wanted, strict=True))
        missed = [(values[p] - v).square().flatten(1).sum(1) / self.sizes for p, v in edge]
        sent = torch.stack([(values[p] * self.cotangents[p]).sum() for p, _ in edge]).sum()
        outputs = [values[place] for place in self.gradients]
        cotangents = torch.autograd.grad(sent, outputs, create_graph=True)
        rows = []
        for (place, gradient), k in zip(self.gradients.items(), cotangents, strict=True):
            node = self.function.flow.nodes[place]
            assert isinstance(node.link, Affine)
            own = node.link.weight_gradient(values[node.sources[0]], k)
            rows.append((own - gradient).square().sum() / gradient.square().sum())
        return torch.stack(missed).sum(0).mean() + torch.stack(rows).mean()

    @property
    def late(self) -> bool:
        """True if the time is up."""
        return time.perf_counter() > self.deadline

    def descended(self, number: int, x: Tensor, held: Sequence[bool]) -> tuple[Tensor, float]:
        """Where one pass leads, [B, *in_shape], and the misfit there with its last kinks.

        Args:
            number: of the pass.
            x: where it begins.
            held: by sample, whether it is known, and stays.
        """
        later = int(number > 0)
        levels, blunt, sharpest = LEVELS[later], BLUNT[later], SHARP[later]
        x, now = x.float(), inf
        for level in range(levels):
            beta = blunt * (sharpest / blunt) ** (level / (levels - 1))
            x, now = self._level(x, held, self.function.sharpness(x, beta), STEPS[later])
            if self.late:
                break
        return x, now

    def _level(
        self, x: Tensor, held: Sequence[bool], sharp: Mapping[int, float], steps: int
    ) -> tuple[Tensor, float]:
        free = torch.tensor([not known for known in held])
        some = x[free].clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [some], max_iter=steps, history_size=HISTORY, line_search_fn="strong_wolfe",
            tolerance_grad=0.0, tolerance_change=0.0,
        )  # fmt: skip
        now = inf

        def closure() -> Tensor:
            nonlocal now
            with torch.enable_grad():
                value = self.misfit(x.index_put((free,), some), sharp)
                (some.grad,) = torch.autograd.grad(value, some)
            now = float(value.detach())
            return value.detach()

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        return x.index_put((free,), some.detach()), now
