"""Gradient checkpointing (Chen et al. 2016): the UNet's blocks are computed again for their gradients.

The forward pass keeps the input of every residual block, transformer and resampling, and nothing within them. The
backward pass goes through them from the last to the first and computes each again. It is written out here, because
`Cell.recompute` has no effect on the CPU, and a cell with its own `bprop` may not read trained parameters.

`ops.depend` ties the second computation of a block to the gradient of its output. Without it the compiler would take the
values of the first computation, which are the same, and keep them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.diffusion.loss import DiffusionLoss
from ldm.models.attention import SpatialTransformer
from ldm.models.unet import PassThrough, ResBlock, TimestepBlock, UNetModel
from ldm.ops import add, shared_cell

Tensors = tuple[Tensor, ...]
_BLOCK = 3  # cells of a TimestepBlock


class _Gradient(nn.Cell):
    """(inputs of a cell, gradient of its output) -> (gradients of the inputs, gradients of its trained parameters)."""

    def __init__(self, cell: nn.Cell, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.cell, self.parameters = cell, ParameterTuple(parameters)
        self.gradient = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, inputs: Tensors, d: Tensor) -> tuple[Tensors, Tensors]:
        return self.gradient(self.cell, self.parameters)(*inputs, d)


class _GradientOfInputs(_Gradient):
    """The same for a cell without trained parameters."""

    def __init__(self, cell: nn.Cell):
        super().__init__(cell, ())
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, inputs: Tensors, d: Tensor) -> tuple[Tensors, Tensors]:
        return self.gradient(self.cell)(*inputs, d), ()


def _gradient(cell: nn.Cell, parameters: Sequence[Parameter]) -> nn.Cell:
    return _Gradient(cell, parameters) if parameters else _GradientOfInputs(cell)


class _Backward(nn.Cell):
    """Backward pass of a cell of (x, emb, context).

    construct(x, emb, context, gradients of the output, of emb so far, of context so far) -> (gradients of x, of emb, of
    context, of the parameters). A resampling reads neither emb nor context.
    """

    def __init__(self, cell: nn.Cell, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.gradient = _gradient(cell, parameters)

    def construct(
        self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor, d_emb: Tensor, d_context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        inputs, parameters = self.gradient((ops.depend(x, d), emb, context), d)
        return inputs[0], d_emb, d_context, parameters


class _BackwardOfResBlock(_Backward):
    """The same for a cell that reads emb."""

    def construct(
        self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor, d_emb: Tensor, d_context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        inputs, parameters = self.gradient((ops.depend(x, d), emb, context), d)
        return inputs[0], add(d_emb, inputs[1]), d_context, parameters


class _BackwardOfTransformer(_Backward):
    """The same for a cell that reads context."""

    def construct(
        self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor, d_emb: Tensor, d_context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        inputs, parameters = self.gradient((ops.depend(x, d), emb, context), d)
        return inputs[0], d_emb, add(d_context, inputs[2]), parameters


class _BackwardOfPassThrough(nn.Cell):
    """The same for PassThrough."""

    def construct(
        self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor, d_emb: Tensor, d_context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        return d, d_emb, d_context, ()


def _backward(cell: nn.Cell, parameters: Sequence[Parameter]) -> nn.Cell:
    if isinstance(cell, PassThrough):
        return shared_cell(_BackwardOfPassThrough)
    if isinstance(cell, ResBlock):
        return _BackwardOfResBlock(cell, parameters)
    return (_BackwardOfTransformer if isinstance(cell, SpatialTransformer) else _Backward)(cell, parameters)


class _Forward(nn.Cell):
    """A block of the UNet: (x, emb, context) -> (its output, the inputs of its cells)."""

    def __init__(self, cells: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.first, self.second, self.third = cells

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, Tensors]:
        y = self.first(x, emb, context)
        z = self.second(y, emb, context)
        return self.third(z, emb, context), (x, y, z)


class _BackwardOfBlock(nn.Cell):
    """Backward pass of a block: what _Backward takes and returns, with the inputs of the block's cells."""

    def __init__(self, cells: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.first, self.second, self.third = cells

    def construct(
        self, kept: Tensors, emb: Tensor, context: Tensor, d: Tensor, d_emb: Tensor, d_context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
        d, d_emb, d_context, of_third = self.third(kept[2], emb, context, d, d_emb, d_context)
        d, d_emb, d_context, of_second = self.second(kept[1], emb, context, d, d_emb, d_context)
        d, d_emb, d_context, of_first = self.first(kept[0], emb, context, d, d_emb, d_context)
        return d, d_emb, d_context, of_first + of_second + of_third


class CheckpointedGradients(nn.Cell):
    """Scaled loss and gradients with the memory of one block, in the place of ops.value_and_grad.

    construct(loss scale, latents, noise, timesteps, text embeddings or tokens, *weights) -> (scaled loss, gradients of
    `parameters`). The inputs are those of DiffusionLoss, after the loss scale.

    Args:
        loss: The loss of a UNet.
        text_encoder: Encodes the tokens, if it is trained. None: there are text embeddings.
        parameters: The trained parameters, which are all in these two networks.
    """

    def __init__(self, loss: DiffusionLoss, text_encoder: nn.Cell | None, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        unet: UNetModel = loss.unet
        self.loss, self.unet, self.text_encoder = loss, unet, text_encoder
        trained = {id(parameter) for parameter in parameters}
        found: list[Parameter] = []

        def own(cell: nn.Cell) -> list[Parameter]:
            parameters = [p for p in cell.get_parameters() if id(p) in trained]
            found.extend(parameters)
            return parameters

        def passes(blocks: Iterable[nn.Cell]) -> tuple[nn.CellList, nn.CellList]:
            forward, backward = [], []
            for block in blocks:
                cells = list(block.cell_list) if isinstance(block, TimestepBlock) else [block]
                cells += [shared_cell(PassThrough)] * (_BLOCK - len(cells))
                forward.append(_Forward(cells))
                backward.append(_BackwardOfBlock([_backward(cell, own(cell)) for cell in cells]))
            return nn.CellList(forward, auto_prefix=False), nn.CellList(backward[::-1], auto_prefix=False)

        # The gradients are put together in the order of `found`.
        self.input_blocks, self.input_backward = passes(unet.input_blocks)
        (self.middle_block,), (self.middle_backward,) = passes([unet.middle_block])
        self.output_blocks, self.output_backward = passes(unet.output_blocks)
        self.out_gradient = _gradient(unet.out, own(unet.out))
        self.time_gradient = _gradient(unet.time_embed, own(unet.time_embed))
        self.text_gradient = None if text_encoder is None else _gradient(text_encoder, own(text_encoder))
        if len(found) != len(parameters):
            raise ValueError(f"{len(found)} of {len(parameters)} trained parameters are in the networks of the loss")
        places = {id(parameter): i for i, parameter in enumerate(found)}
        self.places = tuple(places[id(parameter)] for parameter in parameters)
        self.loss_and_gradient = ops.value_and_grad(self.scaled_loss, 0)
        self.zeros_like = ops.ZerosLike()

    def scaled_loss(
        self, prediction: Tensor, target: Tensor, timesteps: Tensor, loss_scale: Tensor, *weights: Tensor
    ) -> Tensor:
        return self.loss.of_prediction(prediction, target, timesteps, *weights) * loss_scale

    def construct(
        self, loss_scale: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, texts: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensors]:
        embeddings = texts if self.text_encoder is None else self.text_encoder(texts)
        noisy_latents, target = self.loss.inputs_and_targets(latents, noise, timesteps)
        h, emb, context = self.unet.prepare(noisy_latents, timesteps, embeddings)

        of_input: tuple[Tensors, ...] = ()
        skips: Tensors = ()
        for block in self.input_blocks:
            h, inputs = block(h, emb, context)
            of_input, skips = of_input + (inputs,), skips + (h,)
        h, of_middle = self.middle_block(h, emb, context)
        of_output: tuple[Tensors, ...] = ()
        channels: tuple[int, ...] = ()
        for block in self.output_blocks:
            channels = channels + (h.shape[1],)
            h, inputs = block(self.unet.concat_channels((h, skips[-1])), emb, context)
            of_output, skips = of_output + (inputs,), skips[:-1]
        prediction = self.unet.out(h)

        loss, d = self.loss_and_gradient(prediction.astype(ms.float32), target, timesteps, loss_scale, *weights)
        (d,), gradients = self.out_gradient((ops.depend(h, d),), d.astype(prediction.dtype))
        d_emb, d_context = self.zeros_like(emb), self.zeros_like(context)
        d_skips: Tensors = ()
        for block in self.output_backward:
            d, d_emb, d_context, more = block(of_output[-1], emb, context, d, d_emb, d_context)
            gradients = more + gradients
            d, d_skip = d[:, : channels[-1]], d[:, channels[-1] :]
            d_skips = d_skips + (d_skip,)
            of_output, channels = of_output[:-1], channels[:-1]
        d, d_emb, d_context, more = self.middle_backward(of_middle, emb, context, d, d_emb, d_context)
        gradients = more + gradients
        for block in self.input_backward:
            d = add(d, d_skips[-1])
            d, d_emb, d_context, more = block(of_input[-1], emb, context, d, d_emb, d_context)
            gradients = more + gradients
            of_input, d_skips = of_input[:-1], d_skips[:-1]
        _, more = self.time_gradient((self.unet.embed_timesteps(timesteps),), d_emb)
        gradients = gradients + more
        if self.text_gradient is not None:
            d = d_context.reshape(embeddings.shape).astype(embeddings.dtype)
            _, more = self.text_gradient((ops.depend(texts, d),), d)
            gradients = gradients + more

        ordered: Tensors = ()
        for place in self.places:
            ordered = ordered + (gradients[place],)
        return loss, ordered
