"""CNN6 or LeNet, one photograph, and the float32 update that a client sends of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rgap
from benchmarks.common.judging import decibels
from benchmarks.common.networks import BINARY
from rgap.head.features import HeadCandidate, HeadFailure, solve_head
from rgap.inversion.problem import Problem, prepare
from rgap.inversion.top import head_gradients
from rgap.recursion.reached import Descent
from rgap.recursion.stage import BUDGET
from rgap.update.preflight import ClientView


@dataclass(frozen=True)
class OnePhotograph:
    """What a client has and sends, and the steps from there to its picture.

    Attributes:
        model: of the client.
        picture: [1, 3, 32, 32], float32.
        target: its label.
        loss: of the client.
        update: what it sends.
    """

    model: nn.Module
    picture: Tensor
    target: Tensor
    loss: str
    update: rgap.Update

    @classmethod
    def of(cls, network: str) -> OnePhotograph:
        """The first photograph through a network of ``rgap.models``."""
        model, loss = rgap.models.BUILTIN[network](seed=0), rgap.models.LOSSES[network]
        picture = rgap.photos.load(1, dtype=torch.float32)
        target = torch.tensor([[1.0]]) if loss == BINARY else torch.tensor([3])
        return cls(model, picture, target, loss, rgap.capture(model, picture, target, loss))

    def problem(self) -> Problem:
        """Checked and in float64, with a fresh random generator."""
        return prepare(ClientView.of(self.model, self.update), budget=BUDGET)

    def heads(self, problem: Problem) -> list[HeadCandidate]:
        """Candidates of the head equations, nearest to the true features first."""
        stage = problem.chain.stages[-1]
        sent = head_gradients(stage, problem)
        answer = solve_head(stage, *sent, self.update.loss, problem.precision)
        if isinstance(answer, HeadFailure):
            raise RuntimeError(answer.reason)
        features = problem.chain.trace(self.picture.double())[-1][0]
        for op in stage.lead:
            features = op.forward(features)
        return sorted(answer, key=lambda c: float((c.features.value - features).norm()))

    def descend(self, problem: Problem, head: HeadCandidate) -> Descent:
        """From a candidate of the head to the data."""
        return problem.descend(len(problem.chain.stages) - 1, head.features, head.cotangent)

    def error(self, inputs: Tensor) -> float:
        """Rms error of a recovered picture."""
        return float((inputs.double() - self.picture.double()).square().mean().sqrt())

    def psnr(self, inputs: Tensor) -> float:
        """Of a recovered picture, dB."""
        return decibels(self.error(inputs))
