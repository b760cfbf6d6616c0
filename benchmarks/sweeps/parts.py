"""How often what is determined of a picture comes back, over random convolutions.

Convolutions of random kernel, stride, padding, width and activation under a fully connected layer:
every value that is returned as determined is compared with the truth.

    OMP_NUM_THREADS=1 python -m benchmarks.sweeps.parts --cases 200
"""

from __future__ import annotations

import sys
from collections import Counter

import torch
from random_geometry import chain_of

import rgap
from benchmarks.common.arguments import Arguments


def main() -> int:
    """Print how often each outcome occurs, and every value that leaves its bound; 1 if one does."""
    parser = Arguments(__doc__, cases=2)
    parser.add_argument("--cases", type=int, default=40, help="networks")
    seen: Counter[str] = Counter()
    off = 0
    for seed in range(parser.parse_args().cases):
        net, x = chain_of(seed)
        for dtype in (torch.float64, torch.float32):
            net, x = net.to(dtype), x.to(dtype)
            recovery = rgap.invert(net, rgap.capture(net, x, torch.tensor([2])))
            known = recovery.inputs if recovery.partial is None else recovery.partial
            seen[
                f"{recovery.status.name}{' in parts' if recovery.partial is not None else ''}"
            ] += 1
            if known is None or recovery.error_bound is None:
                continue
            gap = (known - x)[~known.isnan()].abs().max()
            if gap > recovery.error_bound:
                off += 1
                print(f"seed {seed}, {dtype}: off by {gap:.1e}, bound {recovery.error_bound:.1e}")
    print(dict(seen))
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
