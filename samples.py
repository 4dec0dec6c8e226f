"""Gradients of single samples, from the mean loss of a batch of them.

The gradient of a sample is n times the part of a batch's gradient that goes through it, with n
samples in the batch. For a linear layer with inputs aₜ and gradients δₜ of its outputs at the
positions t (words) of the sample, it is

    ∂ℓ/∂W = n Σₜ δₜ aₜᵀ ,  ∂ℓ/∂b = n Σₜ δₜ                                                  (S)

so one backward pass, to the outputs of the layers alone, does for a batch. Parameters of other
layers need a batch of one a sample: all at once by torch.func where the model allows it, else
one after the other. Numbers are the same where the loss is a mean over samples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from checks import kind

AGREE = 0.01  # relative error that the sum over samples of the first batch may have; half precision


def batch_size(batch: Any) -> int:
    """The length of the first tensor or list of strings in a batch, which may consist of nested
    lists, tuples and dicts; else 0."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 0
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, (list, tuple)):
        return 0
    if batch and all(isinstance(part, str) for part in batch):
        return len(batch)
    return next(filter(None, map(batch_size, batch)), 0)


def map_samples(batch: Any, n: int, change: Callable[[Any], Any]) -> Any:
    """A batch in which tensors and lists of strings with n samples are changed."""
    if isinstance(batch, Tensor):
        return change(batch) if batch.ndim and len(batch) == n else batch
    if isinstance(batch, Mapping):
        parts = {key: map_samples(part, n, change) for key, part in batch.items()}
        return type(batch)(parts)  # type: ignore[call-arg]
    if not isinstance(batch, (list, tuple)):
        return batch
    if len(batch) == n and all(isinstance(part, str) for part in batch):
        return change(batch)
    changed = [map_samples(part, n, change) for part in batch]
    return type(batch)(*changed) if hasattr(batch, "_fields") else type(batch)(changed)


class Call(NamedTuple):
    """What a linear layer was called with, and where the gradient of its output comes from."""

    layer: nn.Module
    inputs: Tensor  # (n, ..., features)
    version: int
    output: GradientEdge


class NotPossible(Exception):
    """The model does not allow this way of computing gradients."""


class SampleGradients:
    """Gradients of the samples in a batch, (n, numel) for each of some parameters.

    Args:
        model, loss: loss(model, batch) is the mean loss of a batch.
        params: the parameters, by name.
        checked_loss: the loss of a batch, or a ValueError.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        params: Mapping[str, nn.Parameter],
        checked_loss: Callable[[Any], Tensor],
    ):
        self.model, self.loss, self.params = model, loss, dict(params)
        self.checked_loss = checked_loss
        self.layers = linear_layers(model, params)
        known = {id(p) for layer in self.layers for p in layer.parameters(recurse=False)}
        self.compared = False  # (S) with the gradient of a batch
        self.ways = [self._one_by_one, self._by_vmap]  # the last that is possible is taken
        if all(id(p) in known for p in params.values()):
            self.ways.append(self._by_layers)

    def __call__(self, batch: Any) -> list[Tensor]:
        n = batch_size(batch)
        if n == 0:
            raise ValueError(
                f"per_sample needs batches of tensors with samples along dimension 0, got "
                f"{kind(batch)}; without per_sample each batch is one gradient"
            )
        while True:
            try:
                return self.ways[-1](batch, n)
            except NotPossible:
                self.ways.pop()

    def _by_layers(self, batch: Any, n: int) -> list[Tensor]:
        """By (S), which is compared with the gradient of the first batch: weights may be used by
        others than their layers, or samples not be along dimension 0."""
        with recorded(self.layers) as calls:
            loss = self.checked_loss(batch)
        targets: list[Any] = [call.output for call in calls]
        if not self.compared:
            targets += self.params.values()
        found = torch.autograd.grad(loss, targets, allow_unused=True)
        grads = self._from_calls(calls, found[: len(calls)], n)
        for mine, expected in zip(grads, found[len(calls) :], strict=False):
            mean = mine.sum(0).double() / n
            expected = torch.zeros_like(mean) if expected is None else expected.flatten().double()
            if not (mean - expected).norm() <= AGREE * expected.norm():
                raise NotPossible
        self.compared = True
        return grads

    def _from_calls(
        self, calls: Sequence[Call], deltas: Sequence[Tensor | None], n: int
    ) -> list[Tensor]:
        grads: dict[int, Tensor] = {}
        for call, delta in zip(calls, deltas, strict=True):
            if delta is None:  # the loss does not depend on this output
                continue
            if call.inputs.ndim < 2 or len(call.inputs) != n:
                raise NotPossible
            if call.inputs._version != call.version:
                raise ValueError(
                    f"The input of a {type(call.layer).__name__} is changed in place after it; "
                    "per_sample needs it as it was"
                )
            a = call.inputs.reshape(n, -1, call.inputs.shape[-1]).to(delta.dtype)
            delta = n * delta.reshape(n, -1, delta.shape[-1])
            left, right = (a, delta) if is_transposed(call.layer) else (delta, a)
            for p in call.layer.parameters(recurse=False):
                part = delta.sum(1) if p.ndim == 1 else torch.bmm(left.mT, right).flatten(1)
                grads[id(p)] = grads[id(p)] + part if id(p) in grads else part
        params = self.params.values()
        return [grads[id(p)] if id(p) in grads else p.new_zeros(n, p.numel()) for p in params]

    def _by_vmap(self, batch: Any, n: int) -> list[Tensor]:
        """Batches of one, all at once."""
        tensors: list[Tensor] = []
        map_samples(batch, n, tensors.append)
        wrapped = Wrapped(self.model, self.loss)

        def loss(params: dict[str, Tensor], *samples: Tensor) -> Tensor:
            parts = iter(samples)
            one = map_samples(batch, n, lambda _: next(parts))
            return torch.func.functional_call(wrapped, params, (one,))

        params = {f"model.{name}": p.detach() for name, p in self.params.items()}
        places = (None, *(0 for _ in tensors))
        vmapped = torch.func.vmap(torch.func.grad(loss), places, randomness="different")
        try:
            grads = vmapped(params, *(tensor[:, None] for tensor in tensors))
        except Exception as error:  # of any kind; if it is not due to vmap, it comes again
            raise NotPossible from error
        return [grad.flatten(1) for grad in grads.values()]

    def _one_by_one(self, batch: Any, n: int) -> list[Tensor]:
        """Batches of one, each with a backward pass."""
        rows = []
        for i in range(n):
            loss = self.checked_loss(map_samples(batch, n, itemgetter(slice(i, i + 1))))
            grads = torch.autograd.grad(loss, list(self.params.values()), materialize_grads=True)
            rows.append([grad.to_dense().flatten() for grad in grads])
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


class Wrapped(nn.Module):
    """A model with its loss, for torch.func."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def linear_layers(model: nn.Module, params: Mapping[str, nn.Parameter]) -> list[nn.Module]:
    """The linear layers that have some of the parameters; Conv1D is that of transformers' GPT-2."""
    wanted = set(map(id, params.values()))
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) or is_transposed(module)
        if any(id(p) in wanted for p in module.parameters(recurse=False))
    ]


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is a linear layer with weights (inputs, outputs)."""
    return any(base.__name__ == "Conv1D" for base in type(layer).__mro__)


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """The calls of the layers in here that have gradients."""
    calls: list[Call] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()  # of a view the edge would be lost if it were changed in place
        if output.requires_grad and inputs:
            a = inputs[0].detach()
            calls.append(Call(layer, a, a._version, get_gradient_edge(output)))
        return output

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
