"""The norm of an update, read off what SGD keeps: without a copy of w_t and without a difference.

`torch.optim.SGD` sets ``w_{t+1} = w_t - lr * direction``. With the gradient g (its sign turned
under ``maximize``), the weight decay λ and the momentum μ, its direction is

    g                   plain
    g + λ w_t           plain, with weight decay
    buffer              momentum: the buffer as it is after the step, whatever λ and dampening
    g + μ buffer        Nesterov; without weight decay (1 + μ) g + μ² times the buffer before

so ``lr * ‖direction‖`` is the norm of the update before w_{t+1} was rounded to the precision of the
weights. The norm of the stored difference contains that rounding, at most ``eps / 2 * ‖w_{t+1}‖``.
Where the weights are coarser than float32 rounding is part of what the update did; there, and for
every other optimizer, the difference is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import optimizer as hooks

from capture.norms import Norms
from capture.scalars import on_device

FINE = (torch.float32, torch.float64)


class SgdUpdateNorms:
    """Finds ``lr * ‖direction‖`` by tensor, where the optimizer allows it; asked anew every step.

    `begin` before the step says whether it does; `end` after the step gives the norms.
    """

    def __init__(
        self, optimizer: optim.Optimizer, parameters: Sequence[Tensor], norms: Norms
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._norms = norms
        self._gradients: Sequence[Tensor | None] = ()
        # Norms of the directions that are known before the step.
        self._known = torch.zeros(len(parameters), dtype=torch.float64)

    def begin(
        self, gradients: Sequence[Tensor | None], grad_norms: Tensor, scale: float | None
    ) -> bool:
        """Take the gradients, and their norms without `scale`; False: the state will not tell.

        The norms are float64 ``[P]``, on the CPU or, if any weights are there, on a GPU; then
        nothing is read from it.
        """
        pairs = list(zip(self._parameters, gradients, strict=True))
        if not self.applies() or not all(_is_fine(weights, grad) for weights, grad in pairs):
            return False
        here = scale is None and not any(weights.is_cuda for weights, _ in pairs)
        if not here and any(map(_needs_sum, self._optimizer.param_groups)):
            return False
        self._gradients = gradients
        self._known = grad_norms.clone()
        groups = self._groups()
        for row, (weights, gradient) in enumerate(pairs):
            group = groups.get(id(weights))
            if group is None:
                self._known[row].zero_()
            elif gradient is not None and _needs_sum(group):
                self._known[row] = self._of_sum(group, weights, gradient)
        return True

    def end(self) -> Tensor:
        """Norm of each update, float64 ``[P]``, where `begin` got norms; 0 without a gradient."""
        groups = self._groups()
        rates = [0.0] * len(self._parameters)
        buffers: list[Tensor | None] = [None] * len(rates)
        pairs = zip(self._parameters, self._gradients, strict=True)
        for row, (weights, gradient) in enumerate(pairs):
            group = groups.get(id(weights))
            if group is not None and gradient is not None:
                rates[row] = abs(float(group["lr"]))
                if group["momentum"] and not group["nesterov"]:
                    buffers[row] = self._buffer(weights)
        self._gradients = ()
        norms = self._known
        if any(buffer is not None for buffer in buffers):
            held = _beside(norms, [buffer is not None for buffer in buffers], torch.bool)
            found = self._norms.of(buffers).to(norms.device, non_blocking=True)
            norms = torch.where(held, found, norms)
        # An infinite direction with a rate of 0 is NaN, as the weights then are.
        return _beside(norms, rates, torch.float64) * norms

    def _of_sum(self, group: Mapping[str, Any], weights: Tensor, gradient: Tensor) -> float:
        """Norm of a direction that is a sum; taken before the step, which may change both terms."""
        # Under `maximize` the direction is -g + …, of which only the norm counts.
        sign = -1.0 if group["maximize"] else 1.0
        if not group["nesterov"]:
            return self._norms.of_sum(gradient, weights, sign * float(group["weight_decay"]))
        momentum, buffer = float(group["momentum"]), self._buffer(weights)
        whole = 1.0 + momentum
        if buffer is None:  # the first step fills it with the gradient
            return whole * float(self._norms.of([gradient])[0])
        return whole * self._norms.of_sum(gradient, buffer, sign * momentum**2 / whole)

    def _buffer(self, weights: Tensor) -> Tensor | None:
        # The state is a defaultdict: asking by [] would add to it.
        found: Tensor | None = self._optimizer.state.get(weights, {}).get("momentum_buffer")
        return found

    def applies(self) -> bool:
        """Whether the optimizer is SGD itself, in a form that this file knows, and not hooked."""
        # A subclass, or another hook around the step, may do anything to the weights.
        if type(self._optimizer) is not optim.SGD or _hook_count(self._optimizer) > 2:
            return False
        return not any(
            group["differentiable"]
            or (group["nesterov"] and group["weight_decay"])
            or on_device(group["lr"])
            for group in self._optimizer.param_groups
        )

    def _groups(self) -> dict[int, dict[str, Any]]:
        """The parameter group of each tensor, by its id; groups may be added at any time."""
        groups = self._optimizer.param_groups
        return {id(weights): group for group in groups for weights in group["params"]}


def _beside(tensor: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """These values on the device of `tensor`, without waiting for it."""
    return torch.tensor(values, dtype=dtype).to(tensor.device, non_blocking=True)


def _is_fine(weights: Tensor, gradient: Tensor | None) -> bool:
    if weights.dtype not in FINE:
        return False
    if gradient is None:
        return True
    sound = gradient.dtype == weights.dtype and gradient.layout == weights.layout == torch.strided
    # Fused SGD takes both in the order of memory, as they come from autograd.
    return sound and _steps(gradient) == _steps(weights)


def _steps(tensor: Tensor) -> list[int]:
    """The strides that matter: those of axes with more than one element."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for length, stride in pairs if length > 1]


def _needs_sum(group: Mapping[str, Any]) -> bool:
    """Whether the direction is a sum of two tensors, which is formed by chunks on the CPU only."""
    return bool(group["nesterov"] or (group["weight_decay"] and not group["momentum"]))


def _hook_count(optimizer: optim.Optimizer) -> int:
    """Hooks around the steps of this optimizer; the recorder's own are two."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    common = (hooks._global_optimizer_pre_hooks, hooks._global_optimizer_post_hooks)
    return sum(len(registered) for registered in (*own, *common))
