"""Record: optimizers, where their first steps are other programs than those that follow.

Adam makes its moments in the first step, so a recording of that step makes them too, and serves no
second call. Here the state is there before: the optimizer's own code makes it for the time of the
capture (`Creation`), and again at the first call that finds none. RAdam leaves a factor out of its
first steps: what it computes either way is selected in the graph.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.optim import optimizer as _optimizer

from torch_lazy_ext._number import Number, greater, select

# Fused optimizers check the devices of parameters once, and note here that they have.
_NOTE = "_need_device_dtype_check_for_fused"
# By these names a program may see whether there is state already.
_REVEALING = frozenset(("state", "state_dict", "__dict__", "__getstate__", "vars", "_init_group"))


# What state is made in: the same dictionaries each time, since a graph knows them.
_contents: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[torch.Tensor, dict[str, Any]]]
_contents = weakref.WeakKeyDictionary()


class Created:
    """State that optimizers were given for a call; taken back when that fails.

    Attributes:
        steps: what takes it back, the last one first.
        copies: what stands for copies of gradients.
    """

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.copies: list[torch.Tensor] = []

    def undo(self) -> None:
        while self.steps:
            self.steps.pop()()

    def __enter__(self) -> Created:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is not None:
            self.undo()
        elif self.copies:
            versions = (0,) * len(self.copies)  # nobody has written to eager's
            torch._C._autograd._unsafe_set_version_counter(tuple(self.copies), versions)


class Creation:
    """The state that one group of an optimizer lacks in its first step.

    Args:
        gradients: (parameter, shape, strides and dtype of its gradient), for the parameters that
            are to get state.
        lists: how many lists `_init_group` fills.
        noted: only the note is missing.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        gradients: list[tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], torch.dtype]],
        lists: int,
        noted: bool,
    ) -> None:
        self._optimizer = optimizer
        self._group = group
        self._gradients = gradients
        self._lists = lists
        self._noted = noted

    def missing(self) -> bool:
        """Whether the optimizer is as it was, and a step makes the state and does nothing else."""
        optimizer, group = self._optimizer, self._group
        if not any(known is group for known in optimizer.param_groups):
            return False
        if self._noted:
            return bool(vars(optimizer).get(_NOTE))
        if isinstance(optimizer, torch.optim.SGD) and (
            group["momentum"] == 0 or group["dampening"] != 0
        ):
            return False  # there is no state, or the first step is without dampening
        return not any(_has_state(optimizer, p) for p, *_layout in self._gradients)

    def create(self, created: Created) -> None:
        """Make the state, as long as `created` is not undone."""
        optimizer, group = self._optimizer, self._group
        state, attributes = optimizer.state, vars(optimizer)
        parameters = [p for p, *_layout in self._gradients]
        before = [(p, dict(state[p]) if p in state else None) for p in parameters]
        contents = _contents.setdefault(optimizer, {})
        note = attributes.get(_NOTE)

        def undo() -> None:
            for p, content in before:
                made = state.pop(p, None) if content is None else state[p]
                if made is not None:
                    made.clear()
                    made.update(content or {})
            if note is not None:
                attributes[_NOTE] = note

        created.steps.append(undo)
        gradients = [p.grad for p in parameters]
        try:
            for p, shape, strides, dtype in self._gradients:
                p.grad = torch.empty_strided(shape, strides, dtype=dtype, device=p.device)
                if p not in state and not self._noted:
                    if contents.get(p, True):  # none, or in use
                        contents[p] = {}
                    state[p] = contents[p]
            lists: list[list[Any]] = [[] for _ in range(self._lists)]
            optimizer._init_group({**group, "params": parameters}, *lists)  # type: ignore[attr-defined]
            if isinstance(optimizer, torch.optim.SGD) and not self._noted:
                for p in parameters:
                    # The first step copies the gradient. That is what comes of momentum and
                    # gradient, to the bit: -0.0 changes nothing that is added to it.
                    assert p.grad is not None
                    state[p]["momentum_buffer"] = torch.full_like(p.grad, -0.0)
                    if not group["fused"]:
                        created.copies.append(state[p]["momentum_buffer"])
        finally:
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient


def creation(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], lists: int, names: set[str]
) -> Creation | None:
    """What is to be created before a step of the program, as far as its recording knows.

    Args:
        lists: how many lists `_init_group` fills.
        names: the names that the program uses.
    """
    if not type(optimizer).__module__.startswith("torch.optim.") or names & _REVEALING:
        return None
    with_gradient = [(p, grad) for p in group["params"] if (grad := p.grad) is not None]
    lacking = [(p, grad) for p, grad in with_gradient if not _has_state(optimizer, p)]
    if isinstance(optimizer, torch.optim.SGD) and type(group["momentum"]) is int:
        # A float is a number of the capture, at which nobody looks here.
        lacking = lacking if group["momentum"] else []
    noted = not lacking and bool(group.get("fused") and vars(optimizer).get(_NOTE))
    gradients = [
        (p, tuple(grad.shape), tuple(grad.stride()), grad.dtype)
        for p, grad in (with_gradient if noted else lacking)
    ]
    return Creation(optimizer, group, gradients, lists, noted) if gradients else None


def _has_state(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> bool:
    content = optimizer.state.get(p, {})
    if isinstance(optimizer, torch.optim.SGD):
        return content.get("momentum_buffer") is not None
    return bool(content)


def create(creations: list[Creation]) -> Created:
    created = Created()
    try:
        for c in creations:
            c.create(created)
    except BaseException:
        created.undo()
        raise
    return created


def single_tensor_radam(
    original: Callable[..., None],
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    state_steps: list[torch.Tensor],
    **options: Any,
) -> None:
    """`torch.optim.radam._single_tensor_radam`, with both ways of the first steps in the graph.

    Source: L. Liu et al., "On the variance of the adaptive learning rate and beyond", ICLR 2020;
    what is rounded when is as in PyTorch.
    """
    if options["capturable"] or options["differentiable"]:
        original(params, grads, exp_avgs, exp_avg_sqs, state_steps, **options)
        return
    beta1, beta2, lr = options["beta1"], options["beta2"], _optimizer._to_scalar(options["lr"])
    weight_decay, eps = options["weight_decay"], options["eps"]
    for param, grad, exp_avg, exp_avg_sq, step_t in zip(
        params, grads, exp_avgs, exp_avg_sqs, state_steps
    ):
        if options["maximize"]:
            grad = -grad
        if torch.is_complex(param):
            param, grad, exp_avg, exp_avg_sq = map(
                torch.view_as_real, (param, grad, exp_avg, exp_avg_sq)
            )
        step_t += 1
        step = step_t.item()
        if weight_decay != 0:
            if options["decoupled_weight_decay"]:
                param.mul_(1 - lr * weight_decay)
            else:
                grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = exp_avg / (1 - beta1**step) * lr
        bias_correction2 = 1 - beta2**step
        length, rectification = _rectification(beta2, step, bias_correction2)
        adaptive = (bias_correction2**0.5) / exp_avg_sq.sqrt().add_(eps)
        rectified = update * adaptive * rectification
        if isinstance(length, Number):
            update = torch.where(greater(length, 5.0), rectified, update)
        elif length > 5.0:
            update = rectified
        param.add_(update, alpha=-1.0)


def multi_tensor_radam(
    original: Callable[..., None],
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    state_steps: list[torch.Tensor],
    **options: Any,
) -> None:
    """`torch.optim.radam._multi_tensor_radam` in the same way."""
    if not params or options["capturable"] or options["differentiable"]:
        original(params, grads, exp_avgs, exp_avg_sqs, state_steps, **options)
        return
    beta1, beta2, lr = options["beta1"], options["beta2"], _optimizer._to_scalar(options["lr"])
    weight_decay = options["weight_decay"]
    grouped = torch.optim.Optimizer._group_tensors_by_device_and_dtype(
        [params, grads, exp_avgs, exp_avg_sqs, state_steps]  # type: ignore[list-item]
    )
    for lists, _indices in grouped.values():
        params_, grads_, avgs, avg_sqs, steps = (cast(list[torch.Tensor], v) for v in lists)
        if steps[0].is_cpu:
            torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
        else:
            torch._foreach_add_(steps, 1)
        if options["has_complex"]:
            _optimizer._view_as_real(params_, grads_, avgs, avg_sqs)
        if options["maximize"]:
            grads_ = list(torch._foreach_neg(grads_))
        if weight_decay != 0:
            if options["decoupled_weight_decay"]:
                torch._foreach_mul_(params_, 1 - lr * weight_decay)
            elif options["maximize"]:
                torch._foreach_add_(grads_, params_, alpha=weight_decay)
            else:
                grads_ = list(torch._foreach_add(grads_, params_, alpha=weight_decay))
        torch._foreach_lerp_(avgs, grads_, 1 - beta1)
        torch._foreach_mul_(avg_sqs, beta2)
        torch._foreach_addcmul_(avg_sqs, grads_, grads_, 1 - beta2)
        plain, rectified = [], []
        for step_t in steps:
            step = step_t.item()
            correction1, correction2 = 1 - beta1**step, 1 - beta2**step
            length, rectification = _rectification(beta2, step, correction2)
            if isinstance(length, Number):
                rectification = select(length, 5.0, rectification, 0.0)
                unrectified: Any = select(length, 5.0, 0.0, 1.0)
            else:
                rectification = rectification if length > 5 else 0
                unrectified = 0 if length > 5 else 1.0
            plain.append((lr * unrectified / correction1) * -1)
            rectified.append((correction2**0.5) * (lr * rectification / correction1) * -1)
        buffer = torch._foreach_sqrt(avg_sqs)
        torch._foreach_add_(buffer, options["eps"])
        torch._foreach_div_(buffer, rectified)
        torch._foreach_reciprocal_(buffer)
        torch._foreach_add_(buffer, plain)
        torch._foreach_addcmul_(params_, avgs, buffer)


def _rectification(beta2: Any, step: Any, bias_correction2: Any) -> tuple[Any, Any]:
    """The length of the moving average, and the factor that counts where that is above 5."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * (beta2**step) / bias_correction2
    factor = (length - 4) * (length - 2) * longest
    divisor = (longest - 4) * (longest - 2) * length
    if isinstance(length, Number):
        # Below 5 nobody asks for the quotient: it may be negative, with a complex root, or none.
        factor = select(length, 5.0, factor, 1.0)
        divisor = select(length, 5.0, divisor, 1.0)
    elif length <= 5:
        return length, 1.0
    factor = factor / divisor
    return length, factor**0.5


RADAM = {
    "_single_tensor_radam": single_tensor_radam,
    "_multi_tensor_radam": multi_tensor_radam,
}
