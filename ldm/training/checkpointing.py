"""Gradient checkpointing (Chen et al. 2016): the UNet's blocks are computed again for their gradients.

The forward pass keeps the input of every residual block, transformer and resampling. The backward pass goes through
them from the last to the first and computes each again. It is written out here, because `Cell.recompute` has no effect
on the CPU, and a cell with its own `bprop` may not read trained parameters.

`ops.depend` ties the second computation of a block to the gradient of its output. Without it the compiler would take
the values of the first computation, which are the same, and keep them. It does so for what does not depend on a block's
input: projections of the time and text embeddings, which are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ldm.diffusion.loss import DiffusionLoss
from ldm.models.attention import SpatialTransformer
from ldm.models.unet import PassThrough, ResBlock, TimestepBlock, UNetModel
from ldm.ops import add, shared_cell
from ldm.training.step_operators import pick

Tensors = tuple[Tensor, ...]
# (gradient of x, of emb if it is read, of context if it is read, of the trained parameters)
Gradients = tuple[Tensor, Tensors, Tensors, Tensors]
CELLS = 3  # of a TimestepBlock


class _Gradient(nn.Cell):
    """(inputs of a cell, gradient of its output) -> (gradients of the inputs, gradients of its trained parameters)."""

    def __init__(self, cell: nn.Cell, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.cell, self.parameters = cell, ParameterTuple(parameters)
        self.gradient = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, inputs: Tensors, d: Tensor) -> tuple[Tensors, Tensors]:
        return self.gradient(self.cell, self.parameters)(*inputs, d)


class _GradientOfInputs(nn.Cell):
    """_Gradient of a cell without trained parameters."""

    def __init__(self, cell: nn.Cell):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, inputs: Tensors, d: Tensor) -> tuple[Tensors, Tensors]:
        return self.gradient(self.cell)(*inputs, d), ()


def _gradient(cell: nn.Cell, parameters: Sequence[Parameter]) -> nn.Cell:
    return _Gradient(cell, parameters) if parameters else _GradientOfInputs(cell)


class _Backward(nn.Cell):
    """Backward pass of a cell of (x, emb, context) that reads x alone: a resampling, or the first convolution.

    construct(x, emb, context, gradient of the output) -> Gradients.
    """

    def __init__(self, cell: nn.Cell, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.gradient = _gradient(cell, parameters)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor) -> Gradients:
        inputs, parameters = self.gradient((ops.depend(x, d), emb, context), d)
        return inputs[0], (), (), parameters


class _BackwardOfResBlock(_Backward):
    """_Backward of a cell that reads emb too."""

    def construct(self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor) -> Gradients:
        inputs, parameters = self.gradient((ops.depend(x, d), emb, context), d)
        return inputs[0], (inputs[1],), (), parameters


class _BackwardOfTransformer(_Backward):
    """_Backward of a cell that reads context too."""

    def construct(self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor) -> Gradients:
        inputs, parameters = self.gradient((ops.depend(x, d), emb, context), d)
        return inputs[0], (), (inputs[2],), parameters


class _BackwardOfPassThrough(nn.Cell):
    """_Backward of PassThrough."""

    def construct(self, x: Tensor, emb: Tensor, context: Tensor, d: Tensor) -> Gradients:
        return d, (), (), ()


def _backward(cell: nn.Cell, parameters: Sequence[Parameter]) -> nn.Cell:
    if isinstance(cell, PassThrough):
        return shared_cell(_BackwardOfPassThrough)
    if isinstance(cell, ResBlock):
        return _BackwardOfResBlock(cell, parameters)
    return (_BackwardOfTransformer if isinstance(cell, SpatialTransformer) else _Backward)(cell, parameters)


class _Forward(nn.Cell):
    """A block of the UNet: (x, emb, context) -> (its output, the inputs of its three cells)."""

    def __init__(self, cells: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.first, self.second, self.third = cells

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> tuple[Tensor, Tensors]:
        y = self.first(x, emb, context)
        z = self.second(y, emb, context)
        return self.third(z, emb, context), (x, y, z)


class _BackwardOfBlock(nn.Cell):
    """(inputs of a block's three cells, emb, context, gradient of its output) -> Gradients."""

    def __init__(self, cells: Sequence[nn.Cell]):
        super().__init__(auto_prefix=False)
        self.first, self.second, self.third = cells

    def construct(self, kept: Tensors, emb: Tensor, context: Tensor, d: Tensor) -> Gradients:
        d, emb3, context3, of_third = self.third(kept[2], emb, context, d)
        d, emb2, context2, of_second = self.second(kept[1], emb, context, d)
        d, emb1, context1, of_first = self.first(kept[0], emb, context, d)
        return d, emb3 + emb2 + emb1, context3 + context2 + context1, of_first + of_second + of_third


class _Concat(nn.Cell):
    """(h, skip) -> both as channels of one."""

    def __init__(self, concat_channels: nn.Cell):
        super().__init__(auto_prefix=False)
        self.concat_channels = concat_channels

    def construct(self, h: Tensor, skip: Tensor) -> Tensor:
        return self.concat_channels((h, skip))


class CheckpointedGradients(nn.Cell):
    """Scaled loss and gradients with the memory of one block beside the kept inputs, in place of ops.value_and_grad.

    construct(loss scale, *what DiffusionLoss takes, with tokens in place of text embeddings if there is a text encoder)
    -> (scaled loss, gradients of `parameters`).

    Args:
        loss: The loss of a UNet.
        text_encoder: Encodes the tokens, if it is trained. It is computed again as a whole. None: there are text
            embeddings.
        parameters: The trained parameters, which are all in these two networks.

    Raises:
        ValueError: A trained parameter is in neither network.
    """

    def __init__(self, loss: DiffusionLoss, text_encoder: nn.Cell | None, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        unet: UNetModel = loss.unet
        self.loss, self.unet, self.text_encoder = loss, unet, text_encoder
        trained = {id(parameter) for parameter in parameters}
        found: list[Parameter] = []  # in the order in which `construct` puts the gradients together

        def own(cell: nn.Cell) -> list[Parameter]:
            of_cell = [parameter for parameter in cell.get_parameters() if id(parameter) in trained]
            found.extend(of_cell)
            return of_cell

        def passes(blocks: Iterable[nn.Cell]) -> tuple[list[nn.Cell], list[nn.Cell]]:
            forward: list[nn.Cell] = []
            backward: list[nn.Cell] = []
            for block in blocks:
                cells = list(block.cell_list) if isinstance(block, TimestepBlock) else [block]
                cells += [shared_cell(PassThrough)] * (CELLS - len(cells))
                forward.append(_Forward(cells))
                backward.insert(0, _BackwardOfBlock([_backward(cell, own(cell)) for cell in cells]))
            return forward, backward

        inputs, (middle,), outputs = (
            passes(unet.input_blocks), zip(*passes([unet.middle_block])), passes(unet.output_blocks)
        )  # fmt: skip
        self.input_blocks, self.input_backward = (nn.CellList(cells, auto_prefix=False) for cells in inputs)
        self.middle_block, self.middle_backward = middle
        self.output_blocks, self.output_backward = (nn.CellList(cells, auto_prefix=False) for cells in outputs)
        self.out_gradient = _gradient(unet.out, own(unet.out))
        of_time, of_text = own(unet.time_embed), [] if text_encoder is None else own(text_encoder)
        self.time_gradient = _gradient(unet.time_embed, of_time) if of_time else None
        self.text_gradient = _gradient(text_encoder, of_text) if of_text else None
        if len(found) != len(parameters):
            raise ValueError(f"{len(found)} of {len(parameters)} trained parameters are in the networks of the loss")
        places = {id(parameter): i for i, parameter in enumerate(found)}
        self.places = tuple(places[id(parameter)] for parameter in parameters)
        self.loss_and_gradient = ops.value_and_grad(self.scaled_loss, 0)
        self.concat = _Concat(unet.concat_channels)
        self.concat_gradient = _GradientOfInputs(self.concat)  # reads the shapes alone

    def scaled_loss(
        self, prediction: Tensor, target: Tensor, timesteps: Tensor, loss_scale: Tensor, *weights: Tensor
    ) -> Tensor:
        return self.loss.of_prediction(prediction, target, timesteps, *weights) * loss_scale

    def construct(
        self, loss_scale: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, texts: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensors]:
        embeddings = texts if self.text_encoder is None else self.text_encoder(texts)
        noisy_latents, target = self.loss.input_and_target(latents, noise, timesteps)
        h, emb, context = self.unet.block_inputs(noisy_latents, timesteps, embeddings)

        of_input: tuple[Tensors, ...] = ()
        skips: Tensors = ()
        for block in self.input_blocks:
            h, kept = block(h, emb, context)
            of_input, skips = of_input + (kept,), skips + (h,)
        h, of_middle = self.middle_block(h, emb, context)
        of_output: tuple[Tensors, ...] = ()
        pairs: tuple[Tensors, ...] = ()
        for block in self.output_blocks:
            pairs = pairs + ((h, skips[-1]),)
            h, kept = block(self.concat(h, skips[-1]), emb, context)
            of_output, skips = of_output + (kept,), skips[:-1]
        prediction = self.unet.out(h)

        loss, d = self.loss_and_gradient(prediction.astype(ms.float32), target, timesteps, loss_scale, *weights)
        (d,), gradients = self.out_gradient((ops.depend(h, d),), d.astype(prediction.dtype))
        d_embs: Tensors = ()
        d_contexts: Tensors = ()
        d_skips: Tensors = ()
        for block in self.output_backward:
            d, of_emb, of_context, more = block(of_output[-1], emb, context, d)
            d_embs, d_contexts, gradients = d_embs + of_emb, d_contexts + of_context, more + gradients
            (d, d_skip), _ = self.concat_gradient(pairs[-1], d)
            d_skips = d_skips + (d_skip,)
            of_output, pairs = of_output[:-1], pairs[:-1]
        d, of_emb, of_context, more = self.middle_backward(of_middle, emb, context, d)
        d_embs, d_contexts, gradients = d_embs + of_emb, d_contexts + of_context, more + gradients
        for block in self.input_backward:
            d, of_emb, of_context, more = block(of_input[-1], emb, context, add(d, d_skips[-1]))
            d_embs, d_contexts, gradients = d_embs + of_emb, d_contexts + of_context, more + gradients
            of_input, d_skips = of_input[:-1], d_skips[:-1]

        if self.time_gradient is not None:
            _, more = self.time_gradient((self.unet.embed_timesteps(timesteps),), _sum(d_embs))
            gradients = gradients + more
        if self.text_gradient is not None:
            d = _sum(d_contexts).reshape(embeddings.shape).astype(embeddings.dtype)
            _, more = self.text_gradient((ops.depend(texts, d),), d)
            gradients = gradients + more
        return loss, pick(gradients, self.places)


def _sum(terms: Tensors) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = add(total, term)
    return total
