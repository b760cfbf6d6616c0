"""Train the denoiser that the prior ``denoiser`` is made of, on a folder of photographs.

    python -m benchmarks.training.denoiser --output rgap/data/denoiser.safetensors    that shipped
    python -m benchmarks.training.denoiser --pictures FOLDER --output own.safetensors
    python -m benchmarks.training.denoiser --checkpoint run.safetensors ...    after a kill

The folder is that of Debian's packages lomiri-wallpapers-16.04 and -20.04 (apt install); who made
the photographs, and under which licence, is in rgap/data/LEARNED.md.  None of them is among those
that the library is measured on.  Windows of 32×32 pixels at several sizes get white noise of a size
σ drawn log-uniformly from where the prior is used, and the gradient step of the energy is to take
it away:

    ‖D_σ(x + σ n) − x‖²/σ²,    D_σ(y) = y − σ² ∇E_σ(y),    E_σ(y) = ½ ‖f((y − mean)/σ, σ)‖².

Printed: PSNR of held-out windows with noise of 0.02, 0.05 and 0.1, denoised (a picture with such
noise has 34.0, 26.0 and 20.0 dB).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.arguments import Arguments
from benchmarks.common.descent import Plan, Source, descent
from rgap.photos import folder
from rgap.priors.denoiser import SIGMAS, DenoiserPrior, Features, centred
from rgap.update.storage import written

BATCH, STEPS, HELD_OUT = 24, 100, 200
RATE = 3e-3
SHOWN = 0.02, 0.05, 0.1  # σ of the test
FIRST, SIDE = 4, 3  # pixels of a kernel, of the first layer and of the others


class Network(nn.Module):
    """The parameters of f.

    Args:
        width: channels between the layers.
        depth: layers.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [(3, FIRST)] + [(width, SIDE)] * (depth - 1)
        made = [torch.empty(width, before, side, side) for before, side in sizes]
        for number, kernel in enumerate(made):
            nn.init.kaiming_normal_(kernel, nonlinearity="relu" if number else "linear")
        self.kernels = nn.ParameterList(made)
        self.biases = nn.ParameterList([torch.zeros(width) for _ in sizes])
        self.tilts = nn.ParameterList([torch.zeros(width) for _ in sizes])

    def features(self) -> Features:
        """The network with the parameters as they are."""
        return Features(list(self.kernels), list(self.biases), list(self.tilts))

    def loss(self, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """What the gradient step leaves of the noise, in the mean over entries and in units of σ².

        Args:
            clean: pictures, [B, 3, H, W].
            sigma: of their noise, [B].
            noise: white, like the pictures.
        """
        unit = sigma[:, None, None, None]
        u = centred(clean + unit * noise, unit).requires_grad_()
        energy = 0.5 * self.features().layers(u, sigma)[0].square().sum()
        (step,) = torch.autograd.grad(energy, u, create_graph=True)
        left = noise - centred(step, 1.0)
        return left.square().mean()


def main() -> int:
    """Train, and write the network."""
    parser = Arguments(__doc__, pictures="rgap/data", size=64, epochs=2, width=4, steps=2)
    parser.add_argument("--pictures", type=Path, default=Path("/usr/share/backgrounds"))
    parser.add_argument("--size", type=int, default=768, help="largest side, in pixels")
    parser.add_argument("--width", type=int, default=32, help="channels between the layers")
    parser.add_argument("--depth", type=int, default=5, help="layers")
    parser.add_argument("--epochs", type=int, default=60, help="at most")
    parser.add_argument("--steps", type=int, default=STEPS, help="of an epoch")
    parser.add_argument("--seconds", type=float, default=840.0, help="after which no epoch begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written every epoch, gone on from")
    parser.result("f, a safetensors file; that shipped: rgap/data/denoiser.safetensors")
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    source = Source(folder(options.pictures, options.size).float(), 0)
    fixed = torch.Generator().manual_seed(options.seed + 1)
    held = source.batch(HELD_OUT, fixed)
    noise = torch.randn(held.shape, generator=fixed)
    torch.manual_seed(options.seed)
    model = Network(options.width, options.depth)
    low, high = (math.log(sigma) for sigma in SIGMAS)

    def loss() -> Tensor:
        x = source.batch(BATCH, draw)
        sigma = (low + (high - low) * torch.rand(BATCH, generator=draw)).exp()
        return model.loss(x, sigma, torch.randn(x.shape, generator=draw))

    def test() -> str:
        prior = DenoiserPrior(model.features())
        told = []
        for sigma in SHOWN:
            denoised = prior.smoothed(sigma).denoised(held + sigma * noise)
            off = (denoised - held).square().mean((1, 2, 3))
            told.append(f"{float((-10.0 * off.log10()).mean()):.2f}")
        return f"{', '.join(told)} dB"

    plan = Plan(options.epochs, options.steps, options.seconds, options.checkpoint)
    descent(model, torch.optim.Adam(model.parameters(), RATE), loss, test, plan, draw)
    if options.output is not None:
        tensors = {n: t.contiguous() for n, t in model.features().tensors().items()}
        written(options.output, tensors, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
