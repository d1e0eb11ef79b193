"""The optimizers in float64 NumPy, from their papers, to hold ldm.training.optimizers to.

Each form keeps lists with an array for each parameter, under the names of a training state's groups. `step` takes the
gradients and the learning rate of an update that is applied.
"""

from __future__ import annotations

import math

import numpy as np


class Form:
    groups: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()

    def __init__(self, starts):
        self.p = [np.asarray(start, np.float64).copy() for start in starts]
        self.t = 0

    def zeros(self):
        return [np.zeros_like(p) for p in self.p]

    def step(self, gradients, lr):
        self.t += 1
        self.update([np.asarray(g, np.float64) for g in gradients], lr)


class AdamW(Form):
    """Loshchilov and Hutter 2019, algorithm 2."""

    groups = ("m", "v")

    def __init__(self, starts, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(starts)
        self.m, self.v = self.zeros(), self.zeros()
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def update(self, gradients, lr):
        b1, b2 = self.betas
        for i, g in enumerate(gradients):
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
            m_hat, v_hat = self.m[i] / (1 - b1**self.t), self.v[i] / (1 - b2**self.t)
            self.p[i] = self.p[i] - lr * (m_hat / (np.sqrt(v_hat) + self.eps) + self.weight_decay * self.p[i])


class Lion(Form):
    """Chen et al. 2023, algorithm 2."""

    groups = ("m",)

    def __init__(self, starts, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(starts)
        self.m = self.zeros()
        self.betas, self.weight_decay = betas, weight_decay

    def update(self, gradients, lr):
        b1, b2 = self.betas
        for i, g in enumerate(gradients):
            c = b1 * self.m[i] + (1 - b1) * g
            self.p[i] = self.p[i] - lr * (np.sign(c) + self.weight_decay * self.p[i])
            self.m[i] = b2 * self.m[i] + (1 - b2) * g


class Adafactor(Form):
    """Shazeer and Stern 2018, algorithms 4 and 5, in transformers' order of operations.

    The row's and the column's moments are means, not sums. An array with one axis has a second moment for each element,
    which is called its row here, and no column.
    """

    groups = ("row", "column")

    def __init__(
        self, starts, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8, beta1=None, weight_decay=0.0,
        scale_parameter=False, relative_step=False, warmup_init=False,
    ):  # fmt: skip
        super().__init__(starts)
        self.eps, self.clip_threshold, self.decay_rate, self.beta1 = eps, clip_threshold, decay_rate, beta1
        self.weight_decay, self.scale_parameter = weight_decay, scale_parameter
        self.relative_step, self.warmup_init = relative_step, warmup_init
        self.row = [np.zeros(p.shape[:-1] if p.ndim > 1 else p.shape) for p in self.p]
        self.column = [np.zeros(p.shape[:-2] + p.shape[-1:] if p.ndim > 1 else 1) for p in self.p]
        if beta1 is not None:
            self.groups, self.m = ("row", "column", "m"), self.zeros()

    def update(self, gradients, lr):
        if self.relative_step:
            lr = min(1e-6 * self.t if self.warmup_init else 0.01, self.t**-0.5)
        b = 1 - self.t**self.decay_rate
        for i, g in enumerate(gradients):
            p, u = self.p[i], g**2 + self.eps[0]
            rate = lr * max(self.eps[1], math.sqrt(np.mean(p**2))) if self.scale_parameter else lr
            if p.ndim > 1:
                self.row[i] = b * self.row[i] + (1 - b) * u.mean(-1)
                self.column[i] = b * self.column[i] + (1 - b) * u.mean(-2)
                row, column = self.row[i][..., :, None], self.column[i][..., None, :]
                v = row * column / row.mean(-2, keepdims=True)
            else:
                self.row[i] = v = b * self.row[i] + (1 - b) * u
                self.column[i] = v.mean(keepdims=True)  # nothing depends on it
            h = g / np.sqrt(v)
            h = rate * h / max(1.0, math.sqrt(np.mean(h**2)) / self.clip_threshold)
            if self.beta1 is not None:
                self.m[i] = h = self.beta1 * self.m[i] + (1 - self.beta1) * h
            self.p[i] = p - self.weight_decay * rate * p - h


class AdamWScheduleFree(Form):
    """Defazio et al. 2024, algorithm 1, with the points x, y and z kept apart. p is y."""

    groups = ("v", "z")
    scalars = ("largest_weight", "weight_sum")

    def __init__(self, starts, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, r=0.0, weight_lr_power=2.0):
        super().__init__(starts)
        self.v, self.x, self.z = self.zeros(), [p.copy() for p in self.p], [p.copy() for p in self.p]
        self.betas, self.eps, self.weight_decay, self.r, self.power = betas, eps, weight_decay, r, weight_lr_power
        self.largest_rate = self.weight_sum = 0.0

    @property
    def largest_weight(self):
        return self.largest_rate**self.power

    def update(self, gradients, lr):
        b1, b2 = self.betas
        self.largest_rate = max(self.largest_rate, lr)
        weight = self.t**self.r * self.largest_weight
        self.weight_sum += weight
        c = weight / self.weight_sum
        for i, g in enumerate(gradients):
            self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
            h = g / (np.sqrt(self.v[i] / (1 - b2**self.t)) + self.eps) + self.weight_decay * self.p[i]
            self.z[i] = self.z[i] - lr * h
            self.x[i] = (1 - c) * self.x[i] + c * self.z[i]
            self.p[i] = b1 * self.x[i] + (1 - b1) * self.z[i]


class Prodigy(Form):
    """Mishchenko and Defazio 2023, algorithm 4, with a decayed numerator and s as in its authors' package."""

    groups = ("m", "v", "s", "p0")
    scalars = ("d", "d_max", "d_numerator")

    def __init__(
        self, starts, betas=(0.9, 0.999), beta3=None, eps=1e-8, weight_decay=0.0, use_bias_correction=False,
        safeguard_warmup=False, d0=1e-6, d_coef=1.0, growth_rate=math.inf,
    ):  # fmt: skip
        super().__init__(starts)
        self.m, self.v, self.s, self.p0 = self.zeros(), self.zeros(), self.zeros(), [p.copy() for p in self.p]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.beta3 = math.sqrt(betas[1]) if beta3 is None else beta3
        self.use_bias_correction, self.safeguard_warmup = use_bias_correction, safeguard_warmup
        self.d0 = self.d = self.d_max = d0
        self.d_coef, self.growth_rate, self.d_numerator = d_coef, growth_rate, 0.0

    def update(self, gradients, lr):
        (b1, b2), b3, d = self.betas, self.beta3, self.d
        correction = math.sqrt(1 - b2**self.t) / (1 - b1**self.t) if self.use_bias_correction else 1.0
        dlr = d * lr * correction
        self.d_numerator *= b3
        for i, g in enumerate(gradients):
            self.d_numerator += d / self.d0 * dlr * np.sum(g * (self.p0[i] - self.p[i]))
            self.m[i] = b1 * self.m[i] + d * (1 - b1) * g
            self.v[i] = b2 * self.v[i] + d**2 * (1 - b2) * g**2
            self.s[i] = b3 * self.s[i] + d / self.d0 * (d if self.safeguard_warmup else dlr) * g
        estimate = self.d_coef * self.d_numerator / sum(np.abs(s).sum() for s in self.s)
        if d == self.d0:
            d = max(d, estimate)
        self.d_max = max(self.d_max, estimate)
        self.d = min(self.d_max, d * self.growth_rate)
        for i in range(len(self.p)):
            decayed = self.p[i] - self.weight_decay * dlr * self.p[i]
            self.p[i] = decayed - dlr * self.m[i] / (np.sqrt(self.v[i]) + self.d * self.eps)
