"""Collecting gradients for the inverse Fisher.

`Batches` draws other samples from a loader for each recomputation. `ready_for_gradients` prepares
the model. `GradientCollector` computes the gradients and keeps their entries for the weights alive.
It does not wait for the device.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from checks import check_integer, is_real, kind
from ranks import Ranks
from reports import LOGGER, warn
from samples import (
    AGREE,
    Factors,
    NotPossible,
    OuterProducts,
    SampleGradients,
    Unlike,
    add_squares_,
    batch_size,
    gradient,
    together,
)

__all__ = ["Batches", "cross_entropy"]

AT_ONCE = 2**23  # numbers in the gradients of batches that a GPU works on at once
CHECK_EVERY = 32  # batches after which a GPU is waited for, to see whether they are finite
QUIET = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross entropy of a batch (inputs, targets): classes (n,), or their probabilities.

    Example:
        >>> float(cross_entropy(lambda x: x, (torch.zeros(2, 4), torch.tensor([0, 3]))))
        1.3862943649291992
    """
    tensors = isinstance(batch, (list, tuple)) and all(isinstance(t, Tensor) for t in batch)
    if not (tensors and len(batch) == 2):
        raise ValueError(f"Expected batches of (inputs, targets), got {kind(batch)}; give a loss")
    inputs, targets = batch
    if isinstance(model, nn.Module) and (p := next(model.parameters(), None)) is not None:
        inputs, targets = inputs.to(p.device), targets.to(p.device)
    outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"The model returns {kind(outputs)}, but cross entropy needs one tensor; give a "
            "loss(model, batch)"
        )
    if targets.is_floating_point() and targets.shape != outputs.shape:
        raise ValueError(
            f"Targets of {targets.dtype} {tuple(targets.shape)} are no classes for outputs "
            f"{tuple(outputs.shape)}; give integers, probabilities of that shape, or a loss"
        )
    return nn.functional.cross_entropy(outputs, targets)


# --- batches --------------------------------------------------------------------------------------


class Batches:
    """The batches of a loader, drawn anew for each recomputation.

    Args:
        loader: iterated over for each recomputation. A list is shuffled. Other loaders should draw
            other samples each time. The `set_epoch` of a loader or its sampler is called with the
            number of the recomputation. The random numbers of torch are seeded: its global
            generator and the `generator` of the loader or its sampler. Those of numpy and Python
            are not.
        seed: of the samples, together with the number of the recomputation.
        drop_smaller: leave out batches smaller than the largest one of a list, or than the first
            one of another loader.

    Example:
        >>> batches = Batches([torch.ones(2), torch.ones(1)], drop_smaller=True)
        >>> list(batches.draw(0))
        [tensor([1., 1.])]
    """

    def __init__(self, loader: Iterable[Any], seed: int = 0, drop_smaller: bool = False):
        if isinstance(loader, str) or not isinstance(loader, Iterable):
            raise ValueError(f"Invalid loader: {loader!r}; it must yield batches, as a list does")
        batch_sampler = getattr(loader, "batch_sampler", None)
        sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", None)
        self.loader, self.drop_smaller = loader, drop_smaller
        self.seed = check_integer("seed", seed, least=0)
        self._sources: tuple[Any, ...] = (loader, batch_sampler, sampler)  # of random numbers
        self._repeats = isinstance(sampler, SequentialSampler)
        self._used_up = False

    @property
    def samples(self) -> int:
        """Samples in a batch, if the loader has a `batch_size` or is a list; otherwise 0."""
        size = getattr(self.loader, "batch_size", None)
        if isinstance(self.loader, Sequence) and len(self.loader):
            size = batch_size(self.loader[0])
        return size if isinstance(size, int) else 0

    @property
    def generators(self) -> list[torch.Generator]:
        """The random number generators of the loader itself."""
        found = (getattr(source, "generator", None) for source in self._sources)
        return [generator for generator in found if isinstance(generator, torch.Generator)]

    def draw(self, number: int, ranks: Ranks | None = None) -> Iterator[Any]:
        """Yields the batches for recomputation `number`. Batches of a list that another rank works
        on are not loaded; None is yielded instead."""
        if self._used_up:
            raise ValueError(
                "The loader is an iterator, which yields its batches only once; give a list, a "
                "DataLoader or another object that can be iterated over for each recomputation"
            )
        self._used_up = isinstance(self.loader, Iterator)
        if number == 1 and self._repeats:
            warn("The loader does not shuffle, so all recomputations use the same samples")
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        for generator in (torch.default_generator, *self.generators):
            generator.manual_seed(seed)
        for source in self._sources:
            if hasattr(source, "set_epoch"):
                source.set_epoch(number)
        if not isinstance(self.loader, Sequence):
            yield from self._of_full_size(self.loader)
            return
        order: Iterable[int] = torch.randperm(len(self.loader), device="cpu").tolist()
        if self.drop_smaller:
            sizes = list(map(batch_size, self.loader))
            order = [i for i in order if sizes[i] == max(sizes)]
        ranks = ranks or Ranks()
        for position, i in enumerate(order):
            yield self.loader[i] if position % ranks.size == ranks.rank else None

    def _of_full_size(self, batches: Iterable[Any]) -> Iterator[Any]:
        full = 0
        for batch in batches:
            size = batch_size(batch) if self.drop_smaller else 0
            full = full or size
            if size > full:
                raise ValueError(f"A batch of {size} came after one of {full}; make them equal")
            if size == full:
                yield batch


# --- the model ------------------------------------------------------------------------------------


@contextmanager
def ready_for_gradients(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor],
    mode: str,
    generators: Sequence[torch.Generator],
) -> Iterator[None]:
    """Sets weights and mode of the model: "eval", "train" or "as is". Batch norm and dropout are
    always as in evaluation. Recurrent layers train without dropout, as cuDNN has no gradients for
    them in evaluation. On exit, mode, weights, buffers and random numbers are restored. Raises
    ValueError if there can be no gradients."""
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode allows no gradients; prune outside of it")
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(f"The weights {name} have NaN or Inf; there is nothing to prune")
    modes = {module: module.training for module in model.modules()}
    recurrent = {m: m.dropout for m in model.modules() if isinstance(m, nn.RNNBase)}
    before = [(t, t.clone()) for t in (*params.values(), *model.buffers())]
    frozen = [p for p in params.values() if not p.requires_grad]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        with torch.random.fork_rng(devices):
            if mode != "as is":
                model.train(mode == "train")
            for module in model.modules():
                if isinstance(module, QUIET):
                    module.training = False
            for module in recurrent:
                module.training, module.dropout = True, 0.0
            for name, p in params.items():
                p.copy_(weights[name])
            for p in frozen:
                p.requires_grad_(True)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for module, dropout in recurrent.items():
            module.dropout = dropout
        for p in frozen:
            p.requires_grad_(False)
        for generator, state in states:
            generator.set_state(state)
        for tensor, value in before:
            if 0 not in tensor.stride():  # one that is expanded can't be written to in place
                tensor.copy_(value)


# --- gradients ------------------------------------------------------------------------------------


class GradientCollector:
    """Gradients of a loss for the weights alive, as rows on one device.

    Args:
        model, loss: a gradient is that of loss(model, batch).
        params: the parameters, by name.
        alive: indices (d,) of the weights alive among all of `params`, flattened one after another.
        count: m, the number of gradients.
        like: an empty tensor of the type and on the device of the gradients.
        ranks: the processes that share the work.
        per_sample: each sample of a batch makes a gradient; see `samples`.
        batches_at_once: whose gradients are computed together, if torch.func allows it; None for
            as many as suit a GPU, and for one after the other on a CPU, where it does not pay.

    After all rows, `squares` (d,) is the sum of the squared gradients of all ranks, in float64.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        params: Mapping[str, nn.Parameter],
        alive: Tensor,
        count: int,
        like: Tensor,
        ranks: Ranks,
        per_sample: bool = False,
        batches_at_once: int | None = None,
    ):
        self.model, self.loss, self.params = model, loss, dict(params)
        self.alive, self.count, self.like, self.ranks = alive, count, like, ranks
        on_gpu = all(p.is_cuda for p in params.values())
        suitable = AT_ONCE // sum(p.numel() for p in params.values()) if on_gpu else 1
        self.batches_at_once = batches_at_once or max(1, suitable)
        self.compared = False  # gradients of several batches at once with that of one alone
        self.checked = False
        self.samples = SampleGradients(model, loss, params, self._loss) if per_sample else None
        self.squares = torch.zeros(len(alive), dtype=torch.float64, device=like.device)
        self.finite: list[tuple[int, Tensor]] = []  # batches that have not been checked yet

    def rows(self, batches: Iterable[Any], at_once: int, columns: int) -> Iterator[Tensor]:
        """Yields the gradients (n, columns) of all ranks for this rank's columns, about `at_once`
        of each rank at a time. Their memory is reused for the next ones."""
        return self._rows(enumerate(batches), self.count, at_once, columns)

    def rows_to_sum(
        self, batches: Iterable[Any], at_once: int, columns: int
    ) -> Iterator[Tensor | OuterProducts]:
        """The same for `sum_gradients`: in factors if they are of samples and linear layers."""
        source: Iterator[tuple[int, Any]] = enumerate(batches)
        found: list[list[Factors]] = []
        count, waiting = self.count, 0
        for number, batch in source if self.samples and self.ranks.size == 1 else ():
            factors = self._factors(batch, count)
            if factors is None:
                source = chain([(number, batch)], source)
                break
            found.append(factors)
            sums = torch.stack([f.sum() for pair in factors for f in pair])
            self._note([number], sums.isfinite().all()[None])
            count, waiting = count - len(factors[0][0]), waiting + len(factors[0][0])
            if count == 0 or waiting >= at_once:
                yield OuterProducts(found, self.alive, self.like, self.squares)
                found, waiting = [], 0
            if count == 0:
                break
        self._check()
        if found:
            yield OuterProducts(found, self.alive, self.like, self.squares)
        yield from self._rows(source, count, at_once, columns)

    def _rows(
        self, source: Iterator[tuple[int, Any]], left: int, at_once: int, columns: int
    ) -> Iterator[Tensor]:
        rank, size = self.ranks.rank, self.ranks.size
        own = (numbered for numbered in source if numbered[0] % size == rank)
        buffer = self.like.new_empty(at_once if self.samples is None else 0, len(self.alive))
        while left:
            if self.samples is None:
                counts, rows = self._rows_of_batches(own, left, buffer)
            else:
                counts, rows = self._rows_of_samples(self.samples, own, left, at_once)
            left -= sum(counts)
            yield self.ranks.exchange(rows, counts, columns)
        self.squares = self.ranks.sum(self.squares)

    def _rows_of_batches(
        self, own: Iterator[tuple[int, Any]], left: int, buffer: Tensor
    ) -> tuple[list[int], Tensor]:
        """The numbers of the next gradients of each rank, as many as a buffer holds, and the
        gradients of this rank."""
        rank, size = self.ranks.rank, self.ranks.size
        counts = [min(len(buffer), len(range(other, left, size))) for other in range(size)]
        rows, filled = buffer[: counts[rank]], 0
        with self.ranks.agreed():
            while numbered := list(islice(own, min(self.batches_at_once, len(rows) - filled))):
                rows[filled : filled + len(numbered)] = self._gradients(numbered)
                filled += len(numbered)
            self._check()
            if filled < len(rows):
                raise self._too_few("batches")
        return counts, rows

    def _rows_of_samples(
        self, samples: SampleGradients, own: Iterator[tuple[int, Any]], left: int, at_once: int
    ) -> tuple[list[int], Tensor]:
        """The same for samples, from a batch of each rank, then the next ones. The order of the
        batches decides which samples are left out, so one process would take the same ones."""
        counts, parts = [0] * self.ranks.size, [self.like.new_empty(0, len(self.alive))]
        while sum(counts) < min(left, at_once * self.ranks.size):
            with self.ranks.agreed():
                numbered = next(own, None)
                size = samples.size(numbered[1]) if numbered else 0
            sizes = self.ranks.gather(torch.tensor([size], device=self.like.device))
            if not bool(sizes.any()):
                raise self._too_few("samples")
            for rank, n in enumerate(sizes.flatten().tolist()):
                added = min(n, left - sum(counts))
                counts[rank] += added
                if rank == self.ranks.rank:
                    most = added
            with self.ranks.agreed():
                if numbered and most:
                    number, batch = numbered
                    torch.clear_autocast_cache()
                    with torch.enable_grad():
                        rows = self._flat(samples(batch))[:most]
                    parts.append(self._columns_alive([number], rows))
                    self._check()
        return counts, torch.cat(parts)

    def _too_few(self, things: str) -> ValueError:
        return ValueError(
            f"Wanted {self.count} gradients, but the loader has fewer {things}; ask for fewer "
            "gradients or smaller batches, or give more data"
        )

    def mean_square(self, masks: Mapping[str, Tensor]) -> float:
        """The mean square of all gradients. Warns of parameters with these masks whose gradients
        are zero. Raises ValueError if all are zero."""
        mean_square = float(self.squares.mean()) / self.count
        if mean_square == 0.0:
            raise ValueError(
                "All gradients are zero; check that the loss depends on the weights (the cross "
                "entropy of a single output does not), and in float16 that it is large enough"
            )
        parts = self.squares.split([int(mask.sum()) for mask in masks.values()])
        without = [
            name for name, part in zip(masks, parts, strict=True) if len(part) and not part.any()
        ]
        if without:
            warn(
                f"The gradients of {', '.join(without)} are zero, so the magnitude alone decides "
                "which of these weights are pruned"
            )
        return mean_square

    def _note(self, numbers: Sequence[int], finite: Tensor) -> None:
        """Takes note of whether batches (n,) are finite, and checks several at once."""
        self.finite += zip(numbers, finite, strict=True)
        if finite.device.type == "cpu" or numbers[0] == 0 or len(self.finite) >= CHECK_EVERY:
            self._check()

    def _check(self) -> None:
        """Raises ValueError if gradients of the batches noted are not finite. Waits for a GPU."""
        finite = torch.stack([one for _, one in self.finite]).tolist() if self.finite else []
        if not all(finite):
            raise ValueError(
                f"The gradients of batch {self.finite[finite.index(False)][0]} (the first is 0) "
                "have NaN or Inf; check the loss of that batch, and in float16 the size of the loss"
            )
        self.finite.clear()

    def _gradients(self, numbered: Sequence[tuple[int, Any]]) -> Tensor:
        """The gradients (n, d) of batches: together if there are several and it is possible."""
        numbers, batches = zip(*numbered, strict=True)
        if len(batches) == 1:
            return self._columns_alive(numbers, self._alone(batches[0]))
        try:
            return self._columns_alive(numbers, self._together(batches))
        except NotPossible as refusal:
            LOGGER.debug("gradients of batches one after the other: %s", refusal)
            if not isinstance(refusal, Unlike):
                self.batches_at_once = 1
        # Not above, where the refusal keeps the memory of the attempt.
        return torch.cat([self._gradients([one]) for one in numbered])

    def _alone(self, batch: Any) -> Tensor:
        """The gradient of a batch for all parameters, (1, numbers)."""
        torch.clear_autocast_cache()  # casts of other weights, or without a graph
        with torch.enable_grad():
            return self._flat(gradient(self._loss(batch), self.params))

    def _together(self, batches: Sequence[Any]) -> Tensor:
        """The gradients of batches for all parameters, (n, numbers). Raises NotPossible."""
        torch.clear_autocast_cache()
        with torch.enable_grad():
            rows = self._flat(together(self.model, self.loss, self.params, batches))
        if not self.compared:
            one, several = self._alone(batches[-1]).double(), rows[-1:].double()
            if not (several - one).norm() <= AGREE * one.norm():
                raise NotPossible("torch.func gives other numbers for this model and loss")
            self.compared = True
        return rows

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        """Gradients for all parameters as one matrix."""
        return torch.cat([part.to(self.like) for part in parts], dim=1)

    def _columns_alive(self, numbers: Sequence[int], rows: Tensor) -> Tensor:
        """The columns of the weights alive, in gradients of batches with these numbers."""
        if rows.shape[1] > len(self.alive):
            rows = rows.index_select(1, self.alive)
        add_squares_(self.squares, rows)
        finite = rows.isfinite().all(1)
        self._note(numbers, finite if len(numbers) > 1 else finite.all()[None])
        return rows

    def _factors(self, batch: Any, most: int) -> list[Factors] | None:
        """The gradients of the first `most` samples in a batch, if linear layers give them."""
        torch.clear_autocast_cache()
        with torch.enable_grad():
            factors = self.samples.factors(batch) if self.samples else None
        return factors and [(left[:most], right[:most]) for left, right in factors]

    def _loss(self, batch: Any) -> Tensor:
        """The loss of a batch, with a graph."""
        loss = self.loss(self.model, batch)
        if not (is_real(loss) and loss.numel() == 1 and loss.requires_grad):
            raise ValueError(
                "Expected loss(model, batch) to return a tensor of one number, with a "
                f"graph, got {kind(loss)}; return the mean over the batch, not its item()"
            )
        if not self.checked and has_reentrant_checkpoint(loss):
            raise ValueError(
                "The model uses reentrant checkpointing, which gives no gradients of single "
                "parameters; use torch.utils.checkpoint with use_reentrant=False"
            )
        self.checked = True
        return loss


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph of a loss has a node of torch.utils.checkpoint with use_reentrant=True."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            if node.name() == "CheckpointFunctionBackward":
                return True
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return False
