"""A sampler's arithmetic on a device: its latents stay there from the first step to the last.

The samplers are written for NumPy, which says what they compute. They only add and subtract arrays, and multiply and
divide them by numbers, so what a step computes from the latents, the network's outputs and fresh noise is one sum of
arrays with factors. A DeviceArray collects the factors on the host, and the device computes the sum at once when the
network asks for it: one small graph and one copy of the factors for each call of the network, and no copy back to the
host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Union

import numpy as np
from mindspore import Tensor, mint, nn

from ldm.diffusion.guidance import guidance_inputs, timestep_inputs

MOST_TERMS = 8  # of a sum. A longer one is computed at once, so that old arrays are not kept


class WeightedSum(nn.Cell):
    """The sum of arrays of one shape, each times its factor (count,) float32."""

    def construct(self, factors: Tensor, *arrays: Tensor) -> Tensor:
        parts = mint.chunk(factors, len(arrays))  # views on Ascend, where an index is a kernel
        total = parts[0] * arrays[0]
        for i in range(1, len(arrays)):
            total = total + parts[i] * arrays[i]
        return total


class DeviceArray:
    """A sum of arrays on the device with factors, for the arithmetic of ldm.diffusion.samplers.

    Args:
        terms: Arrays of one shape, float32, and the factor of each.
        weighted_sum: Computes the sum. One for all arrays of a pipeline, so that it is compiled once.
    """

    __array_ufunc__ = None  # so that NumPy leaves `number * array` to this class
    __slots__ = ("_terms", "_weighted_sum")

    def __init__(self, terms: list[tuple[Tensor, float]], weighted_sum: WeightedSum) -> None:
        self._terms = terms
        self._weighted_sum = weighted_sum

    @property
    def tensor(self) -> Tensor:
        """The sum, which is computed when it is first asked for."""
        if len(self._terms) != 1 or self._terms[0][1] != 1.0:
            arrays, factors = [array for array, _ in self._terms], [factor for _, factor in self._terms]
            # Sums of 2, 4, 8 ... terms, so that few of them are compiled.
            spare = (1 << (len(arrays) - 1).bit_length()) - len(arrays)
            arrays, factors = [*arrays, *arrays[:1] * spare], [*factors, *[0.0] * spare]
            total = self._weighted_sum(Tensor(np.array(factors, np.float32)), *arrays)
            self._terms = [(total, 1.0)]
        return self._terms[0][0]

    def asnumpy(self) -> np.ndarray:
        """Copy the sum to the host."""
        return self.tensor.asnumpy()

    def __add__(self, other: DeviceArray) -> DeviceArray:
        return self._plus(other, 1.0)

    def __sub__(self, other: DeviceArray) -> DeviceArray:
        return self._plus(other, -1.0)

    def __mul__(self, factor: Union[float, np.ndarray, Tensor]) -> DeviceArray:
        """Multiply by a number, or by an array that broadcasts to this one, such as a mask."""
        if isinstance(factor, (np.ndarray, Tensor)) and factor.ndim:
            product = self.tensor * (Tensor(factor) if isinstance(factor, np.ndarray) else factor)
            return DeviceArray([(product, 1.0)], self._weighted_sum)
        return DeviceArray([(array, own * float(factor)) for array, own in self._terms], self._weighted_sum)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> DeviceArray:
        return self * (1.0 / float(divisor))

    def __neg__(self) -> DeviceArray:
        return self * -1.0

    def _plus(self, other: DeviceArray, sign: float) -> DeviceArray:
        factors: dict[int, tuple[Tensor, float]] = {id(array): (array, own) for array, own in self._terms}
        for array, factor in other._terms:
            known = factors.get(id(array), (array, 0.0))[1]
            factors[id(array)] = (array, known + sign * factor)
        total = DeviceArray(list(factors.values()), self._weighted_sum)
        if len(factors) > MOST_TERMS:
            total.tensor  # noqa: B018
        return total


class GuidedUNet(nn.Cell):
    """The UNet with classifier-free guidance in one graph. ldm.diffusion.guidance says what it computes.

    Args:
        unet: The network. Its parameters keep their names.
    """

    def __init__(self, unet: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text_embeddings: Tensor,
        scale: Tensor,
        rescale: Tensor | None = None,
        extra_channels: Tensor | None = None,
    ) -> Tensor:
        """Return the guided output (N, C, h, w) for latents (N, C, h, w), of which the UNet gets two copies.

        Args:
            latents: float32.
            timesteps: (2N,).
            text_embeddings: Those of the negative prompts before those of the prompts, (2N, 77 k, D) float32.
            scale: The guidance scale, (1,) float32.
            rescale: Share of the guided output that gets the standard deviation of the positive one, (1,) float32.
                None for 0.
            extra_channels: Of an inpainting model, (N, E, h, w) float32.
        """
        if extra_channels is not None:
            latents = mint.cat((latents, extra_channels), 1)
        output = self.unet(mint.cat((latents, latents)), timesteps, text_embeddings)
        negative, positive = mint.chunk(output, 2)
        guided = negative + scale * (positive - negative)
        if rescale is None:
            return guided
        ratio = _std(positive) / _std(guided)
        return guided * (rescale * ratio + (1.0 - rescale))


class DeviceSampling:
    """What a pipeline samples with on a device: the guided UNet and the sampler's arithmetic, compiled once.

    Args:
        unet: The network.
    """

    def __init__(self, unet: nn.Cell) -> None:
        self.unet = unet
        self.guided_unet = GuidedUNet(unet)
        self.weighted_sum = WeightedSum()

    def array(self, array: np.ndarray | Tensor) -> DeviceArray:
        """Return an array for the samplers. One of NumPy is copied to the device."""
        tensor = Tensor(np.ascontiguousarray(array, np.float32)) if isinstance(array, np.ndarray) else array
        return DeviceArray([(tensor, 1.0)], self.weighted_sum)

    def drawn(self, draw_noise: Callable[[], np.ndarray]) -> Callable[[], DeviceArray]:
        """Return what draws noise on the host and copies it to the device."""
        return lambda: self.array(draw_noise())

    def denoiser(
        self,
        text_embeddings: np.ndarray,
        negative_text_embeddings: np.ndarray | None,
        scale: float,
        rescale: float = 0.0,
        extra_channels: np.ndarray | None = None,
    ) -> Callable[[DeviceArray, float], DeviceArray]:
        """Return the samplers' `denoise`. Arguments and errors are those of ldm.diffusion.guidance.GuidedDenoiser."""
        embeddings = guidance_inputs(text_embeddings, negative_text_embeddings, scale)
        # The scale is an input of the graph, which would be compiled again for another number.
        scale_input = Tensor(np.array([scale], np.float32))
        rescale_input = Tensor(np.array([rescale], np.float32)) if rescale else None
        extra = None if extra_channels is None else Tensor(np.ascontiguousarray(extra_channels, np.float32))

        def denoise(latents: DeviceArray, timestep: float) -> DeviceArray:
            timesteps = timestep_inputs(timestep, len(embeddings))
            if scale != 1.0:
                return self.array(
                    self.guided_unet(latents.tensor, timesteps, embeddings, scale_input, rescale_input, extra)
                )
            inputs = latents.tensor if extra is None else mint.cat((latents.tensor, extra), 1)
            return self.array(self.unet(inputs, timesteps, embeddings))

        return denoise


def _std(arrays: Tensor) -> Tensor:
    """Return the standard deviation of each array of a batch, (N, 1, 1, 1)."""
    axes = (1, 2, 3)
    centred = arrays - mint.mean(arrays, axes, True)
    return mint.sqrt(mint.mean(centred * centred, axes, True))
