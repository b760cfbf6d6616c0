"""Generators: networks that make data of a code, whole or from a block on.

Whatever is searched in place of the data, a code z, features h of a block or the weights θ_b of a
copy for every sample, is one flat row; a :class:`Decoder` makes the batch of it,

    x_b = G(z_b),    x_b = G_K ∘ … ∘ G_{k+1}(h_b),    x_b = G(z_b; θ_b).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from rgap import validation
from rgap.remedy import Remedy
from rgap.update.storage import digest

__all__ = ["Decoder", "FromBlock", "FromWeights", "Generator", "convolutional", "untrained"]

WIDTH = 32  # channels of an untrained generator
SMALLEST = 4  # side of its code, at least
UP = 3  # doublings of a generator that is to be trained
DRAWINGS = 16  # of a generator, to see what it makes
USUAL = (-1.0, 1.0), (0.0, 255.0)  # ranges that networks draw in, beside (0, 1)
FILLED = 0.6  # share of such a range that drawings take at least
TRAINED_TO = "that it was trained to"
BEYOND, OFTEN = 0.05, 0.05  # widths outside a stated range, and the share of values, that deny it


CODES = Remedy("rgap.priors.Generator(network, latent_shape=(128,))", "--generator-codes 128").then(
    " with the shape of its codes"
)


class Decoder(Protocol):
    """From a row to a batch."""

    @property
    def size(self) -> int:
        """Entries of a row."""

    def batch(self, row: Tensor) -> Tensor:
        """``[B, *input_shape]``, differentiable."""


@dataclass(frozen=True, eq=False)
class Generator:
    """A network from codes to data, as the blocks that it is made of.

    Attributes:
        blocks: one after another; each is a network by itself.  A network of another kind becomes
            the only block.
        latent_shape: of one code.
        value_range: of what the last block makes.

    Raises:
        TypeError: no network, or no shape.
        ValueError: a range that is none.

    >>> made = Generator.of(nn.Sequential(nn.Linear(4, 48), nn.Unflatten(1, (3, 4, 4))))
    >>> made.latent_shape, made.fitted((3, 4, 4), None, torch.zeros(1)).latent_shape
    ((4,), (4,))
    """

    blocks: nn.Sequential
    latent_shape: tuple[int, ...]
    value_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        given: nn.Module = self.blocks  # whatever the caller gave
        _require_network(given)
        if not _plain(given):
            object.__setattr__(self, "blocks", nn.Sequential(given))
        latent = validation.shape(self.latent_shape, "latent_shape")
        object.__setattr__(self, "latent_shape", latent)
        bounds = validation.bounds(self.value_range, "write value_range=(0.0, 1.0)")
        if bounds is None:
            raise TypeError(
                "value_range: expected the range of what the generator makes, got None; write "
                "value_range=(0.0, 1.0), or (-1.0, 1.0) after a Tanh"
            )
        object.__setattr__(self, "value_range", bounds)

    @property
    def identity(self) -> str:
        """A fingerprint of layers, weights, codes and range, for a checkpoint."""
        told = f"{self.blocks!r} {self.latent_shape} {self.value_range}"
        weights = digest(*self.blocks.state_dict().values())
        return f"{weights} {hashlib.sha256(told.encode()).hexdigest()[:16]}"

    @property
    def like(self) -> Tensor:
        """Device and precision of its codes."""
        return next(self.blocks.parameters(), torch.zeros(()))

    @classmethod
    def of(cls, generator: nn.Module | Generator) -> Generator:
        """A network as a generator: its children if it is an ``nn.Sequential``, else one block.

        Raises:
            TypeError: no network.
            ValueError: its first layer does not say what shape a code has.
        """
        if isinstance(generator, Generator):
            return generator
        _require_network(generator)
        validation.refuse_broken(generator, "generator", TRAINED_TO)
        whole = generator if _plain(generator) else nn.Sequential(generator)
        assert isinstance(whole, nn.Sequential)
        shape = _codes_of(whole)
        if shape is None:
            raise ValueError(
                f"generator: its first layer does not say what shape a code has; write {CODES}"
            )
        return cls(whole, shape)

    def fitted(
        self, shape: Sequence[int], value_range: tuple[float, float] | None, like: Tensor
    ) -> Generator:
        """A frozen copy in eval mode that makes data of a shape and a range of values.

        Args:
            shape: of one sample.
            value_range: of the data; None: what the generator makes is taken as it is.
            like: device and precision.

        Raises:
            ValueError: it makes another shape, numbers that are not finite or outside its own
                range, other data of the same code, or fails; weights without values.
            TypeError: it makes no tensor.
        """
        validation.refuse_broken(self.blocks, "generator", TRAINED_TO)
        if any(p.is_meta for p in self.blocks.parameters()):
            raise ValueError(
                "generator: its weights are on the meta device and have no values; load them"
            )
        try:
            blocks = copy.deepcopy(self.blocks).to(like).eval().requires_grad_(False)
        except RuntimeError as error:
            raise ValueError(
                "generator: expected a network that can be copied and frozen, it cannot "
                f"({str(error).splitlines()[0]}); write torch.nn.utils.parametrizations in place "
                "of weight_norm or spectral_norm, and no script"
            ) from error
        self._check(blocks, tuple(shape), like, value_range is not None)
        if value_range is None or value_range == self.value_range:
            return Generator(blocks, self.latent_shape, self.value_range)
        (low, high), (bottom, top) = value_range, self.value_range
        scaled = _Affine((high - low) / (top - bottom), low, bottom)
        return Generator(nn.Sequential(*blocks, scaled), self.latent_shape, value_range)

    def _check(
        self, blocks: nn.Sequential, shape: tuple[int, ...], like: Tensor, ranged: bool
    ) -> None:
        """Draw a little, and refuse what cannot be searched; ``ranged``: its range is used."""
        draw = torch.Generator().manual_seed(0)
        codes = torch.randn(DRAWINGS, *self.latent_shape, generator=draw).to(like)
        codes[0] = 0.0
        with torch.random.fork_rng(devices=[codes.device] if codes.is_cuda else []):
            made, again = _drawn(blocks, codes), _drawn(blocks, codes)
            alone = _drawn(blocks, codes[:1])
        if len(made) != len(codes):
            raise ValueError(
                f"generator: expected a sample of each code, it makes {len(made)} of {len(codes)}; "
                "leave the first axis of codes as it is"
            )
        if made.shape[1:] != torch.Size(shape):
            instead = f"a last block that makes {list(shape)}"
            if made.ndim == len(shape) + 1 == 4 and made.shape[1] == shape[0]:
                instead = f"nn.Upsample({shape[1:]}) as its last block"
            raise ValueError(
                f"generator: expected samples of shape {list(shape)}, the data's, it makes "
                f"{list(made.shape[1:])}; write {instead}"
            )
        if made.dtype != like.dtype:
            raise ValueError(
                f"generator: expected {like.dtype} of such codes, it makes {made.dtype}; leave the "
                "precision to the caller in its forward"
            )
        if not made.requires_grad:
            raise ValueError(
                "generator: expected data that can be differentiated by their codes, they cannot; "
                "leave out detach() and numpy() in its forward"
            )
        made, again = made.detach(), again.detach()
        for number, sample in enumerate(made):
            if not bool(torch.isfinite(sample).all()):
                what = "zeros" if number == 0 else "N(0, 1)"
                raise ValueError(
                    f"generator: expected finite data, it makes NaN or infinity of a code of "
                    f"{what}; load its weights again"
                )
        if not torch.allclose(made, again, rtol=1e-4, atol=1e-6):
            raise ValueError(
                "generator: expected the same data of the same code, it makes others every time; "
                "leave out what is random in its forward when it is in eval mode"
            )
        if not torch.allclose(made[:1], alone.detach(), rtol=1e-3, atol=1e-4):
            raise ValueError(
                "generator: expected of a code by itself the same data as among others, it makes "
                "other ones; let its norms use running statistics"
            )
        if not ranged:
            return
        (low, high), slack = self.value_range, BEYOND * (self.value_range[1] - self.value_range[0])
        outside = ((made < low - slack) | (made > high + slack)).double().mean()
        if outside > OFTEN:
            ends = (float(f"{made.min():.2g}"), float(f"{made.max():.2g}"))
            usual = next((r for r in USUAL if _fills(ends, r)), ends)
            told = Remedy(
                f"rgap.priors.Generator(network, latent_shape={self.latent_shape}, "
                f"value_range={usual})",
                "--generator-range {:g},{:g}".format(*usual),
            )
            raise ValueError(
                f"generator: expected data in {self.value_range}, {outside:.0%} of the values that "
                f"it draws are outside, from {ends}; write {told}"
            )


def _codes_of(network: nn.Module) -> tuple[int, ...] | None:
    """The shape of a code as the first layer reads it; None where it does not say."""
    first = next((m for m in network.modules() if isinstance(m, nn.Linear | _Transposed)), None)
    if first is None:
        return None
    return (first.in_features,) if isinstance(first, nn.Linear) else (first.in_channels, 1, 1)


def _plain(network: nn.Module) -> bool:
    """True for children one after another and nothing else, so that they are blocks."""
    own = isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward
    return own and not (network._forward_hooks or network._forward_pre_hooks)


def _fills(ends: tuple[float, float], bounds: tuple[float, float]) -> bool:
    """True if values between the ends are those of a range, and of most of it."""
    inside = bounds[0] <= ends[0] and ends[1] <= bounds[1]
    return inside and ends[1] - ends[0] > FILLED * (bounds[1] - bounds[0])


def _require_network(given: object) -> None:
    if not isinstance(given, nn.Module):
        raise TypeError(
            f"generator: expected a torch.nn.Module or a Generator, got {type(given).__name__}; "
            f"write {CODES}"
        )


def _drawn(blocks: nn.Module, codes: Tensor) -> Tensor:
    """What a generator makes, differentiable."""
    with torch.enable_grad():
        try:
            made: object = blocks(codes.detach().requires_grad_())
        except Exception as error:
            own, asked = _codes_of(blocks), tuple(codes[0].shape)
            told = f"write {CODES}"
            if own is not None and own != asked:
                comma = ",".join(map(str, own))
                told = "write " + str(
                    Remedy(f"Generator(network, latent_shape={own})", f"--generator-codes {comma}")
                )
            elif own is not None:
                told = "write a network that makes data of a batch of codes and nothing else"
            raise ValueError(
                f"generator: expected a network that takes codes of shape {list(asked)}, it does "
                f"not ({error}); {told}"
            ) from error
    if not isinstance(made, Tensor):
        raise TypeError(
            f"generator: expected a tensor of data, it makes a {type(made).__name__}; write a last "
            "block that takes the data out of it"
        )
    return made


_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class _Affine(nn.Module):
    """``low + factor · (x − bottom)``."""

    def __init__(self, factor: float, low: float, bottom: float) -> None:
        super().__init__()
        self.factor, self.low, self.bottom = factor, low, bottom

    def forward(self, x: Tensor) -> Tensor:
        return self.low + self.factor * (x - self.bottom)


@dataclass(frozen=True, eq=False)
class FromBlock:
    """Rows are what goes into a block: codes for block 0, features of the blocks above for others.

    Attributes:
        blocks: those that are still to be gone through.
        shape: of what goes in, [B, ...].
    """

    blocks: nn.Sequential
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Entries of a row."""
        return prod(self.shape)

    def batch(self, row: Tensor) -> Tensor:
        """``G_K ∘ … ∘ G_{k+1}(h)``."""
        made: Tensor = self.blocks(row.reshape(self.shape))
        return made


@dataclass(frozen=True, eq=False)
class FromWeights:
    """Rows are the weights of one copy of the generator for every sample.

    Attributes:
        blocks: the generator.
        codes: of the samples, held, ``[B, *latent_shape]``.
    """

    blocks: nn.Sequential
    codes: Tensor

    @property
    def size(self) -> int:
        """Entries of a row."""
        return len(self.codes) * sum(p.numel() for p in self.blocks.parameters())

    def begin(self) -> Tensor:
        """The generator's own weights, for every sample."""
        weights = [p.detach().flatten() for p in self.blocks.parameters()]
        return torch.cat(weights).repeat(len(self.codes))

    def batch(self, row: Tensor) -> Tensor:
        """``G(z_b; θ_b)``."""
        names = [name for name, _ in self.blocks.named_parameters()]
        sizes = [p.numel() for p in self.blocks.parameters()]
        shapes = [p.shape for p in self.blocks.parameters()]
        parts = torch.split(row.reshape(len(self.codes), -1), sizes, 1)
        weights = {
            name: part.reshape(-1, *shape)
            for name, part, shape in zip(names, parts, shapes, strict=True)
        }

        def one(own: dict[str, Tensor], code: Tensor) -> Tensor:
            made: Tensor = functional_call(self.blocks, own, (code[None],))
            return made[0]

        return vmap(one)(weights, self.codes)


def convolutional(
    shape: Sequence[int], latent: int = 64, width: int = 32, seed: int = 0
) -> Generator:
    """A generator of pictures to be trained: transposed convolutions that double the side, σ last.

    ``[latent] → [4 width, s, s] → [2 width, 2s, 2s] → [width, 4s, 4s] → [channels, 8s, 8s]``, batch
    norm and ReLU between.

    Source: Radford, Metz and Chintala (2016), smaller.

    Args:
        shape: of one sample, [channels, side, side].
        latent: numbers of a code.
        width: channels before the last block.
        seed: of the weights.

    Raises:
        ValueError: samples that are no square pictures of a side that 8 divides.

    >>> convolutional((1, 32, 32)).blocks(torch.zeros(2, 64)).shape
    torch.Size([2, 1, 32, 32])
    """
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2**UP:
        raise ValueError(
            f"generator: expected square pictures, [channels, side, side], of a side that {2**UP} "
            f"divides, got {list(shape)}; write (3, 32, 32), or a network of your own"
        )
    channels, side = shape[0], shape[1] // 2**UP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = width * 2 ** (UP - 1)
        blocks: list[nn.Module] = [
            nn.Sequential(
                nn.Linear(latent, wide * side**2),
                nn.Unflatten(1, (wide, side, side)),
                nn.BatchNorm2d(wide),
                nn.ReLU(),
            )
        ]
        for _ in range(UP - 1):
            half = nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1, bias=False)
            blocks.append(nn.Sequential(half, nn.BatchNorm2d(wide // 2), nn.ReLU()))
            wide //= 2
        blocks.append(nn.Sequential(nn.ConvTranspose2d(wide, channels, 4, 2, 1), nn.Sigmoid()))
    return Generator(nn.Sequential(*blocks), (latent,))


def untrained(shape: Sequence[int], seed: int) -> Generator:
    """A convolutional generator with random weights, whose structure alone is the prior.

    1×1 convolutions, ReLU, a normalisation of every channel and doubling, down to σ.

    Source: Ulyanov, Vedaldi and Lempitsky (2018); of 1×1 convolutions: Heckel and Hand (2019).

    Args:
        shape: of one sample, [channels, height, width].
        seed: of the weights.

    Raises:
        ValueError: samples that are no pictures.
    """
    if len(shape) != 3:
        raise ValueError(
            f"method 'untrained' draws pictures, [channels, height, width], got samples of "
            f"{list(shape)}; write generator=, a network of your own"
        )
    sizes = [tuple(shape[1:])]
    while min(sizes[0]) > SMALLEST:
        sizes.insert(0, tuple(-(-side // 2) for side in sizes[0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks: list[nn.Module] = []
        for size in sizes[1:]:
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(WIDTH, WIDTH, 1),
                    nn.Upsample(size, mode="bilinear"),
                    nn.ReLU(),
                    nn.GroupNorm(WIDTH, WIDTH),
                )
            )
        blocks.append(nn.Sequential(nn.Conv2d(WIDTH, shape[0], 1), nn.Sigmoid()))
    return Generator(nn.Sequential(*blocks), (WIDTH, *sizes[0]))
