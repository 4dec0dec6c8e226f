"""Gradients of single samples, from the mean loss of a batch of them, and of several batches.

The gradient of a sample is n times the part of a batch's gradient that goes through it, with n
samples in the batch. For a linear layer with inputs aₜ and gradients δₜ of its outputs at the
positions t (words) of the sample, it is

    ∂ℓ/∂W = n Σₜ δₜ aₜᵀ ,  ∂ℓ/∂b = n Σₜ δₜ                                                  (S)

so one backward pass, to the outputs of the layers alone, suffices for a batch. Parameters of other
layers need a batch of one for each sample: all at once by torch.func if the model allows it, else
one after the other. The results are the same if the loss is a mean over samples. Small models on a
GPU, where launches of kernels take the time, get the gradients of several batches in the same way.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from checks import kind
from masks import layer_input_dimension
from reports import warn

TILE = 2**21  # numbers that are formed at once
AGREE = 0.01  # relative error that the mean over samples of a batch may have; half precision


def batch_size(batch: Any) -> int:
    """The length of the first tensor or list of strings in a batch, or 0. The batch may consist of
    nested lists, tuples and dicts."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 0
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if not isinstance(batch, (list, tuple)):
        return 0
    if batch and all(isinstance(part, str) for part in batch):
        return len(batch)
    return next(filter(None, map(batch_size, batch)), 0)


class NotPossible(Exception):
    """The model does not allow this way of computing gradients."""


class Unlike(NotPossible):
    """These batches do not allow it, as they differ in more than the values of tensors."""

    def __str__(self) -> str:
        return "batches differ in structure or shapes"


def join_batches(batches: Sequence[Any], join: Callable[[list[Any]], Any]) -> Any:
    """A batch with the structure of these, of what `join` makes of the same part of each: tensors,
    lists of strings, and all that is not nested. Raises Unlike if structures differ."""
    first = batches[0]
    strings = isinstance(first, (list, tuple)) and all(isinstance(part, str) for part in first)
    if strings or not isinstance(first, (Mapping, list, tuple)):
        return join(list(batches))
    if any(type(batch) is not type(first) or len(batch) != len(first) for batch in batches):
        raise Unlike
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise Unlike
        parts = {key: join_batches([batch[key] for batch in batches], join) for key in first}
        return type(first)(parts)  # type: ignore[call-arg]
    made = [join_batches(each, join) for each in zip(*batches, strict=True)]
    return type(first)(*made) if hasattr(first, "_fields") else type(first)(made)


def map_samples(batch: Any, n: int, change: Callable[[Any], Any]) -> Any:
    """A batch in which tensors and lists of strings with n samples are changed."""

    def changed(parts: list[Any]) -> Any:
        part = parts[0]
        sized = part.ndim if isinstance(part, Tensor) else isinstance(part, (list, tuple))
        return change(part) if sized and len(part) == n else part

    return join_batches([batch], changed)


Factors = tuple[Tensor, Tensor]  # (n, T, p) and (n, T, q): gradients Σₜ leftₜ rightₜᵀ (n, p·q)


class Call(NamedTuple):
    """The inputs of a call of a linear layer, and the edge of the gradient of its output."""

    layer: nn.Module
    inputs: Tensor  # (n, ..., features)
    version: int
    output: GradientEdge

    def factors(self, delta: Tensor, n: int) -> Iterator[tuple[nn.Parameter, Factors]]:
        """The factors of (S) for each parameter of the layer, from the gradient of its output."""
        if self.inputs.ndim < 2 or len(self.inputs) != n:
            raise NotPossible
        if self.inputs._version != self.version:
            raise ValueError(
                f"The input of a {type(self.layer).__name__} is changed in place after the call; "
                "per_sample needs it unchanged: leave out inplace=True, or per_sample"
            )
        wide = torch.promote_types(delta.dtype, torch.float32)
        a = self.inputs.reshape(n, -1, self.inputs.shape[-1]).to(wide)
        delta = n * delta.reshape(n, -1, delta.shape[-1]).to(wide)
        for p in self.layer.parameters(recurse=False):
            if p.ndim == 1:
                yield p, (delta, delta.new_ones(n, delta.shape[1], 1))
            else:
                yield p, ((a, delta) if is_transposed(self.layer) else (delta, a))


def joined_factors(parts: Sequence[Factors], p: nn.Parameter, n: int) -> Factors:
    """The factors of all calls of a layer, joined."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return p.new_zeros(n, 0, p.shape[0]), p.new_zeros(n, 0, p[0].numel())
    left, right = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return left, right


class OuterProducts:
    """Gradients G (n, d) of samples for the weights alive, in factors. Columns are formed when they
    are read, in order.

    Args:
        batches: the factors of the parameters for each batch.
        alive: indices (d,) of the weights alive among all parameters.
        like: an empty tensor of the type and on the device of the gradients.
        squares: (d,), to which the squares of columns are added when they are formed.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[Factors]],
        alive: Tensor,
        like: Tensor,
        squares: Tensor,
    ):
        self.batches, self.alive, self.like, self.squares = batches, alive, like, squares
        self.sizes = [len(factors[0][0]) for factors in batches]
        self.shape = sum(self.sizes), len(alive)
        # Tiles are some rows of a parameter each: (parameter, rows, first weight among all).
        self.tiles: list[tuple[int, slice, int]] = []
        total = 0
        for i, (left, right) in enumerate(batches[0]):
            p, q = left.shape[2], right.shape[2]
            height = max(1, TILE // (self.shape[0] * q))
            for start in range(0, p, height):
                self.tiles.append((i, slice(start, min(start + height, p)), total + start * q))
            total += p * q
        firsts = torch.tensor([first for *_, first in self.tiles], device=alive.device)
        self.starts = [*torch.searchsorted(alive, firsts).tolist(), len(alive)]
        self.complete = total == len(alive)
        self.at, self.tile = -1, like  # the tile that has been formed last

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        """G[:, columns]"""
        at, stop = index[1].start, index[1].stop
        pieces = []
        while at < stop:
            i = bisect_right(self.starts, at) - 1
            if i != self.at:
                self.at, self.tile = i, self._formed(i)
            pieces.append(self.tile[:, at - self.starts[i] : stop - self.starts[i]])
            at += pieces[-1].shape[1]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _formed(self, i: int) -> Tensor:
        param, rows, first = self.tiles[i]
        width = (rows.stop - rows.start) * self.batches[0][param][1].shape[2]
        tile = self.like.new_empty(self.shape[0], width)
        for part, factors in zip(tile.split(self.sizes), self.batches, strict=True):
            left, right = factors[param]
            part.copy_(torch.bmm(left[:, :, rows].mT, right).flatten(1))
        columns = slice(self.starts[i], self.starts[i + 1])
        if not self.complete:
            tile = tile.index_select(1, self.alive[columns] - first)
        add_squares_(self.squares[columns], tile)
        return tile


def add_squares_(squares: Tensor, rows: Tensor) -> None:
    """Adds the squares of gradients (n, d) to `squares` (d,), in float64."""
    width = max(1, TILE // (32 if rows.device.type == "cpu" else 1) // len(rows))
    for part, those in zip(rows.split(width, 1), squares.split(width), strict=True):
        those += part.double().square().sum(0)  # a copy, as double() of float64 is none


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
        known = {
            id(p)
            for layer in self.layers
            for p in layer.parameters(recurse=False)
            if p.ndim in (1, 2)
        }
        self.compared = False  # with the gradient of a batch of several samples
        self.ways = [self._one_by_one, self._by_vmap]  # the last that is possible is taken
        if all(id(p) in known for p in params.values()):
            self.ways.append(self._by_layers)

    def __call__(self, batch: Any) -> list[Tensor]:
        n = self.size(batch)
        while True:
            try:
                found = self.ways[-1](batch, n)
                break
            except NotPossible:
                self.ways.pop()
        if not self.compared and n > 1:
            self._compare(batch, found)
        return found

    def factors(self, batch: Any) -> list[Factors] | None:
        """The gradients of a batch by (S), for each parameter; None if that is not possible. The
        first batch is compared with its gradient, also without one sample: others than the layers
        may use the weights, or samples may not be along dimension 0."""
        if self.ways[-1] != self._by_layers:
            return None
        try:
            return self._factors(batch, self.size(batch))
        except NotPossible:
            self.ways.pop()
            return None

    def size(self, batch: Any) -> int:
        n = batch_size(batch)
        if n == 0:
            raise ValueError(
                f"per_sample needs batches of tensors with samples along dimension 0, got "
                f"{kind(batch)}; without per_sample each batch is one gradient"
            )
        return n

    def _by_layers(self, batch: Any, n: int) -> list[Tensor]:
        return [torch.bmm(left.mT, right).flatten(1) for left, right in self._factors(batch, n)]

    def _factors(self, batch: Any, n: int) -> list[Factors]:
        with recorded(self.layers) as calls:
            loss = self.checked_loss(batch)
        targets: list[Any] = [call.output for call in calls]
        if not self.compared:
            targets += self.params.values()
        found = torch.autograd.grad(loss, targets, allow_unused=True)
        parts: dict[int, list[Factors]] = {id(p): [] for p in self.params.values()}
        for call, delta in zip(calls, found, strict=False):
            if delta is not None:  # else the loss does not depend on this output
                for p, (left, right) in call.factors(delta, n):
                    if id(p) not in parts:
                        continue
                    if left.shape[2:] + right.shape[2:] != (*p.shape, 1)[:2]:
                        raise NotPossible
                    parts[id(p)].append((left, right))
        factors = [joined_factors(parts[id(p)], p, n) for p in self.params.values()]
        for (left, right), expected in zip(factors, found[len(calls) :], strict=False):
            mean = (left.flatten(0, 1).mT @ right.flatten(0, 1)).flatten().double() / n
            expected = torch.zeros_like(mean) if expected is None else expected.flatten().double()
            if not (mean - expected).norm() <= AGREE * expected.norm():
                raise NotPossible
        if not self.compared and n > 1:
            self._check_dimension(batch, n)
            self.compared = True
        return factors

    def _check_dimension(self, batch: Any, n: int) -> None:
        """Raises NotPossible if inputs of layers are not one shorter with one sample less. Their
        dimension 0 can have length n by chance, which the mean of the gradients does not show."""
        try:
            with recorded(self.layers) as calls:
                self.checked_loss(map_samples(batch, n, itemgetter(slice(n - 1))))
        except Exception as error:  # of any kind, such as a model for batches of n only
            raise NotPossible from error
        if any(len(call.inputs) != n - 1 for call in calls):
            raise NotPossible

    def _compare(self, batch: Any, found: Sequence[Tensor]) -> None:
        """Warns if the mean of the gradients of samples is not the gradient of the batch, by more
        than rounding: where they nearly cancel, errors are relative to their root mean square."""
        loss, n = self.checked_loss(batch), len(found[0])
        grads = torch.autograd.grad(loss, list(self.params.values()), materialize_grads=True)
        error, size, typical = 0.0, 0.0, 0.0
        for rows, grad in zip(found, grads, strict=True):
            expected = grad.to_dense().flatten().double()
            error = math.hypot(error, (rows.mean(0, dtype=torch.float64) - expected).norm())
            size = math.hypot(size, expected.norm())
            typical = math.hypot(typical, rows.norm(dtype=torch.float64) / math.sqrt(n))
        if error > AGREE * max(size, typical):
            warn(
                "The mean of the gradients of samples differs from the gradient of their batch by "
                f"{error / max(size, typical):.0%}; the loss should be a mean over samples, and "
                "tensors of a batch that are not samples, such as masks, should not have length "
                f"{n} in dimension 0 (give mask[None])"
            )
        self.compared = True

    def _by_vmap(self, batch: Any, n: int) -> list[Tensor]:
        """Batches of one, all at once."""
        return together(self.model, self.loss, self.params, samples_of(batch, n), "different")

    def _one_by_one(self, batch: Any, n: int) -> list[Tensor]:
        """Batches of one, each with a backward pass."""
        rows = [gradient(self.checked_loss(one), self.params) for one in samples_of(batch, n)]
        return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def samples_of(batch: Any, n: int) -> list[Any]:
    """The n samples of a batch, each as a batch of one."""
    return [map_samples(batch, n, itemgetter(slice(i, i + 1))) for i in range(n)]


# --- gradients of batches -------------------------------------------------------------------------


def gradient(loss: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradient of a loss, (1, numel) for each parameter."""
    grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return [grad.to_dense().reshape(1, -1) for grad in grads]  # an Embedding has sparse ones


def together(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    params: Mapping[str, Tensor],
    batches: Sequence[Any],
    randomness: str = "error",
) -> list[Tensor]:
    """The gradients of k batches, (k, numel) for each parameter, all at once by torch.func. Raises
    Unlike for batches that cannot be stacked, and NotPossible if torch.func refuses the model, or
    if the model keeps something from one batch to the next. It is left as it was."""
    tensors: list[list[Tensor]] = []  # of each tensor in a batch, that of each batch
    join_batches(batches, lambda parts: tensors.append(parts) if stackable(parts) else None)
    shared = [all(one is parts[0] for one in parts) for parts in tensors]
    places = [None if same and not all(shared) else 0 for same in shared]
    stacks = [
        parts[0] if place is None else torch.stack(parts)
        for parts, place in zip(tensors, places, strict=True)
    ]
    wrapped = Wrapped(model, loss)
    constant = {f"model.{name}": p.detach() for name, p in params.items()}
    buffers = {name: buffer.clone() for name, buffer in wrapped.named_buffers()}
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]

    def loss_of(params: dict[str, Tensor], *parts: Tensor) -> Tensor:
        own, used = iter(parts), {**params, **buffers}
        batch = join_batches(batches, lambda p: next(own) if isinstance(p[0], Tensor) else p[0])
        loss = torch.func.functional_call(wrapped, used, (batch,))
        if any(used[name] is not buffer or buffer._version for name, buffer in buffers.items()):
            raise NotPossible("the model changes its buffers, which later batches may depend on")
        return loss

    vmapped = torch.func.vmap(torch.func.grad(loss_of), (None, *places), randomness=randomness)
    try:
        grads = vmapped(constant, *stacks)
    except Exception as error:  # of any kind; if it is not due to torch.func, it comes again
        raise NotPossible(f"{type(error).__name__}: {error}") from error
    finally:
        changed = [(now, before) for now, before in attributes if not same_objects(now, before)]
        for now, before in changed:
            now.clear()
            now.update(before)
    if changed:
        raise NotPossible("the model changes its attributes, which later batches may depend on")
    return [grad.detach().reshape(len(batches), -1) for grad in grads.values()]


def same_objects(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def stackable(parts: Sequence[Any]) -> bool:
    """Whether these are tensors. Raises Unlike if they differ in shape, type or device, or are
    anything else that differs."""
    first = parts[0]
    if isinstance(first, Tensor):
        like = first.shape, first.dtype, first.device
        if any((one.shape, one.dtype, one.device) != like for one in parts):
            raise Unlike
    elif any(one is not first and (type(one) is not type(first) or one != first) for one in parts):
        raise Unlike
    return isinstance(first, Tensor)


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
    convolution = isinstance(layer, nn.modules.conv._ConvNd)
    return layer_input_dimension(layer) == 0 and not convolution


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """The calls of the layers in here that have gradients. Raises NotPossible for a layer that
    returns something other than a tensor."""
    calls: list[Call] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise NotPossible
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
