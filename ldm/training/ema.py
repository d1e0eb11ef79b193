"""The exponential moving average of the trained parameters, which is what one samples with."""

from __future__ import annotations

from mindspore import Parameter, ParameterTuple, nn, ops

_each = ops.HyperMap()
_ema_one = ops.MultitypeFuncGraph("ema_one")


@_ema_one.register("Function", "Tensor", "Tensor", "Tensor")
def _(kernel, rate, average, parameter):
    return kernel(average, rate, average - parameter)


class EMA(nn.Cell):
    """average += (1 - decay) (parameter - average), as one fused kernel a parameter; starts at the parameters."""

    def __init__(self, parameters: tuple[Parameter, ...]):
        super().__init__(auto_prefix=False)
        self.parameters = ParameterTuple(parameters)
        self.averages = ParameterTuple(
            [Parameter(p.value().copy(), name=f"ema.{p.name}", requires_grad=False) for p in parameters]
        )
        self.kernel = ops.ApplyGradientDescent()

    def construct(self, rate):
        """rate: 1 - decay, an fp32 scalar."""
        return _each(ops.partial(_ema_one, self.kernel, rate), self.averages, self.parameters)
