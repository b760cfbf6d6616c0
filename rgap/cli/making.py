"""The generator of a search or of a completion: a network from codes to data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from rgap.cli.options import optional, range_of, whole_numbers

if TYPE_CHECKING:
    from torch import nn

    from rgap.priors.generator import Generator

__all__ = ["Making"]


@dataclass(frozen=True, kw_only=True)
class Making:
    """A generator, where its weights come from, and what its layers do not say."""

    panel: ClassVar[str] = "Generator"
    generator: Annotated[
        str | None,
        optional(
            "Network from codes to data, for latent, gias and gifd, or what a completion is to be "
            "near; PACKAGE.MODULE:FUNCTION.",
            "NETWORK",
        ),
    ] = None
    generator_weights: Annotated[
        Path | None, optional("Its weights, a .safetensors file.", "FILE")
    ] = None
    generator_codes: Annotated[
        str | None,
        optional("Of one code, as in 128 or 4,8,8; default: as its first layer reads.", "SHAPE"),
    ] = None
    generator_range: Annotated[
        str | None, optional("Range that it draws in, as in -1,1; default: 0,1.", "RANGE")
    ] = None

    def made(self) -> nn.Module | Generator | None:
        """The generator; None where none is named."""
        from torch import nn

        from rgap.models.spec import resolve_generator
        from rgap.priors.generator import Generator

        if self.generator is None:
            for option in ("generator_weights", "generator_codes", "generator_range"):
                if getattr(self, option) is not None:
                    raise ValueError(
                        f"--{option.replace('_', '-')}: expected the network that it is of; write "
                        "--generator PACKAGE.MODULE:FUNCTION too"
                    )
            return None
        try:
            network = resolve_generator(self.generator, self.generator_weights)
        except ValueError as error:
            about, _, words = str(error).partition(": ")
            option = "--generator-weights" if about == "weights" else "--generator"
            raise ValueError(f"{option}: {words or about}") from error
        if isinstance(network, Generator):
            if self.generator_codes is None and self.generator_range is None:
                return network
            network = network.blocks
        codes, bounds = None, Generator.value_range
        if self.generator_range is not None:
            bounds = range_of(self.generator_range, "--generator-range", "-1,1")
        if self.generator_codes is not None:
            codes = whole_numbers(self.generator_codes, "--generator-codes", "128")
        if codes is None and bounds == Generator.value_range:
            return network
        blocks = network if isinstance(network, nn.Sequential) else nn.Sequential(network)
        return Generator(blocks, codes or Generator.of(network).latent_shape, bounds)
