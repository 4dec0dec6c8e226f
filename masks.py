"""Which weights are pruned: layers, patterns, and masks.

`select_weights` finds the weights of a model, `Pattern` chooses those that go, and
`MagnitudePruner` keeps the masks, which are True for the weights that stay.
"""

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from checks import check_choice, kind
from levels import Wanted, levels_of_groups, matching, split_into_portions
from reports import Reporter, warn

__all__ = ["MagnitudePruner", "Pattern", "select_weights"]

LARGE = 0.01  # the fraction of all parameters from which leaving out a weight is worth a warning


# --- which layers ---------------------------------------------------------------------------------

# Layers that are pruned, with their subclasses, and the dimension of the input in their weights.
# Conv1D is the linear layer of transformers' GPT-2, known by its name.
INPUT_DIMENSION = {
    **dict.fromkeys(("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention"), 1),
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Conv1D"), 0),
}
WEIGHTS = "weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"


def layer_input_dimension(module: nn.Module) -> int | None:
    """The dimension of the input in the weights of a layer; None if it is not pruned by default."""
    for cls in type(module).__mro__:
        library = cls.__module__.startswith(("torch.nn.modules", "transformers.pytorch_utils"))
        if library and cls.__name__ in INPUT_DIMENSION:
            return INPUT_DIMENSION[cls.__name__]
    return None


def select_weights(
    model: nn.Module,
    params: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    pattern: "Pattern | None" = None,
) -> dict[str, int]:
    """The names of the parameters to prune, each with the dimension of its input.

    Without `params` these are the weights of linear, convolution and attention layers that fit the
    pattern and are not shared with an embedding. A warning names other large weights that are not
    in `ignore`. Both lists may hold names, globs and regular expressions, compiled or not.

    Raises:
        ValueError: for lists that match no parameter, and if there is nothing to prune.

    Example:
        >>> select_weights(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), ignore=["1.*"])
        {'0.weight': 1}
    """
    pattern = pattern or Pattern()
    known = dict(model.named_parameters())
    ignored = set(matching(known, "ignore", ignore))
    dimensions, embedded = {}, set()
    for module in model.modules():
        dimension = layer_input_dimension(module)
        weights = [p for name, p in module.named_parameters(recurse=False) if name in WEIGHTS]
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            embedded |= set(map(id, weights))
        elif dimension is not None:
            dimensions.update({id(p): dimension for p in weights})
    if params is not None:
        chosen = [name for name in matching(known, "params", params) if name not in ignored]
        for name in chosen:
            if not pattern.fits(known[name], dimensions.get(id(known[name]), 1)):
                shape, group = tuple(known[name].shape), pattern.group
                raise ValueError(f"Groups of {group} do not divide the input of {name}, {shape}")
    else:
        suitable = {
            name
            for name, p in known.items()
            if id(p) in dimensions and id(p) not in embedded and pattern.fits(p, dimensions[id(p)])
        }
        chosen = [name for name in known if name in suitable - ignored]
        total = sum(p.numel() for p in known.values() if not nn.parameter.is_lazy(p))
        left_out = [
            name
            for name, p in known.items()
            if name not in suitable | ignored and p.ndim > 1 and p.numel() >= LARGE * total
        ]
        if left_out and chosen:
            warn(
                f"Not pruned: {', '.join(left_out)}. Their layers are of another kind, share their "
                "weights with an embedding or do not fit the pattern; name them in params to prune "
                "them, or in ignore to leave them out without this warning"
            )
    if not chosen:
        advice = "name them in params"
        if pattern.group > 1:
            advice = f"no layer's input is divisible by {pattern.group}, choose another pattern"
        raise ValueError(f"There are no weights to prune; {advice}")
    return {name: dimensions.get(id(known[name]), 1) for name in chosen}


# --- which weights of a layer ---------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """At most `kept` of every `group` weights along the input stay, if `kept` is not 0. Weights go
    in blocks of `block`.

    Example:
        >>> Pattern.parse("2:4")
        Pattern(block=1, kept=2, group=4)
    """

    block: int = 1
    kept: int = 0
    group: int = 1

    @staticmethod
    def parse(pattern: str) -> "Pattern":
        """From "unstructured", "N:M" (at most N nonzeros in M) or "Bx1" (B zeros or none)."""
        name = str(pattern)
        sizes = [int(n) for n in re.findall(r"\d+", name)]
        if name == "unstructured":
            return Pattern()
        if re.fullmatch(r"\d+:\d+", name) and 0 < sizes[0] < sizes[1]:
            return Pattern(kept=sizes[0], group=sizes[1])
        if re.fullmatch(r"\d+x1", name) and sizes[0] > 1:
            return Pattern(block=sizes[0], group=sizes[0])
        raise ValueError(
            f"Invalid pattern: {pattern!r}; it must be 'unstructured', 'N:M' with 0 < N < M such "
            "as '2:4', or 'Bx1' such as '4x1'"
        )

    @property
    def least_sparsity(self) -> float:
        """The least sparsity at which all groups of N:M have their zeros."""
        return 1 - self.kept / self.group if self.kept else 0.0

    def fits(self, weight: Tensor, dimension: int) -> bool:
        """Whether the size of groups divides this dimension of the weight, the input."""
        return self.group == 1 or (weight.ndim > 1 and weight.shape[dimension] % self.group == 0)

    def zeros_needed(self, mask: Tensor, dimension: int) -> int:
        """The zeros of the parameter once each group has the zeros of N:M."""
        if not self.kept:
            return 0
        zeros = (~self._split(mask, dimension)).sum((1, 2))
        return int(zeros.clamp(min=self.group - self.kept).sum())

    def choose(
        self, saliencies: list[Tensor], alive: list[Tensor], dimensions: list[int], count: int
    ) -> list[Tensor]:
        """Masks (True stays) once `count` weights alive are gone, or fewer by a part of a block.

        Blocks go in the order of their summed saliencies, the lowest first; equal ones by position.
        With N:M, weights that the pattern demands go before all others.
        """
        largest = max((float(s.max()) for s in saliencies if s.numel()), default=0.0) or 1.0
        device = saliencies[0].device
        scores, sizes, demanded = [], [], []
        for saliency, mask, dimension in zip(saliencies, alive, dimensions, strict=True):
            size = self._split(mask.to(device), dimension).sum(2)
            score = (saliency / largest).float() * mask.to(device)
            score = self._split(score, dimension).sum(2).where(size > 0, -1)
            if self.kept:
                demanded.append((_ranks(score) < self.group - self.kept).flatten())
            scores.append(score.flatten())
            sizes.append(size.flatten())
        stays = self._stays(torch.cat(scores), torch.cat(sizes), demanded, count)
        parts = stays.split([len(score) for score in scores])
        return [
            mask & self._join(part, mask.shape, dimension).to(mask.device)
            for part, mask, dimension in zip(parts, alive, dimensions, strict=True)
        ]

    def _stays(self, score: Tensor, size: Tensor, demanded: list[Tensor], count: int) -> Tensor:
        """The blocks of all layers (n,) that stay once `count` weights are gone, from their scores
        and their numbers of weights alive."""
        alive = size > 0
        if self.block > 1:  # they differ in size
            order = score.where(alive, torch.inf).argsort(stable=True)
            gone = size[order].cumsum(0) <= count
            return torch.ones_like(alive).index_put_((order,), ~gone)
        if not self.kept:
            return ~lowest(score, alive, count)
        first = torch.cat(demanded) & alive
        number = min(count, int(first.sum()))
        gone = lowest(score, first, number)
        return ~(gone | lowest(score, alive & ~gone, count - number))

    def _split(self, weight: Tensor, dimension: int) -> Tensor:
        """To (groups, blocks of a group, block), neighbours along the input."""
        rows = weight if self.group == 1 else weight.movedim(dimension, -1)
        return rows.reshape(-1, self.group // self.block, self.block)

    def _join(self, blocks: Tensor, shape: torch.Size, dimension: int) -> Tensor:
        """The inverse of `_split`, with one entry for each block."""
        if self.group == 1:
            return blocks.view(shape)
        others = shape[:dimension] + shape[dimension + 1 :]
        rows = blocks[:, None].expand(-1, self.block).reshape(*others, shape[dimension])
        return rows.movedim(-1, dimension)


def lowest(score: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` lowest scores (n,) `among` these, as a mask; equal ones by position."""
    if count <= 0:
        return torch.zeros_like(among)
    candidates = score.where(among, torch.inf)
    if score.is_cuda:  # where kthvalue of one long row uses a single multiprocessor
        threshold = candidates.sort().values[count - 1]
    else:
        threshold = candidates.kthvalue(count).values
    below = candidates < threshold
    equal = (candidates == threshold) & among
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))


def _ranks(score: Tensor) -> Tensor:
    """The rank of each score in its row (n, group); equal ones by position."""
    position = torch.arange(score.shape[1], device=score.device)
    ranks = torch.zeros(score.shape, dtype=torch.int16, device=score.device)
    for j, other in enumerate(score.split(1, dim=1)):
        ranks += (other < score) | ((other == score) & (position > j))
    return ranks


# --- masks in force -------------------------------------------------------------------------------


class MagnitudePruner:
    """Zeroes the smallest weights of a model and keeps them zero.

    `masks` are True for the weights that stay, by parameter name. Pruned weights stay pruned.
    Parameters are looked up by name each time, as frameworks may replace them.

    Args:
        model: any module. It is pruned in place.
        params: the parameters to prune: names in `model.named_parameters()`, globs or regular
            expressions. By default the weights of Linear, Conv, ConvTranspose and
            MultiheadAttention layers and of transformers' Conv1D that fit the pattern and are not
            shared with an embedding.
        ignore: parameters to leave out, likewise.
        scope: "global": the weights of all layers compete; "layer": each layer has a sparsity.
        pattern: "unstructured"; "N:M" such as "2:4", at most N of every M weights along the input
            stay; "Bx1" such as "4x1", every B weights along the input go or stay together.
        masks: by parameter name, False for weights that are pruned already.
        keep_zeros: weights that are exactly zero count as pruned, too.
        portions: parts of the parameters that are pruned one after the other: a list such as
            ["stem.weight", ["layers.0.*", "layers.1.*"]], or the largest number of parts of about
            the same size. Weights of different portions do not compete.

    Raises:
        ValueError: for arguments outside these ranges. So do all methods.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0]))
        >>> MagnitudePruner(model).prune(0.5)
        {'weight': tensor([[False, False,  True,  True]])}
        >>> model.weight.data
        tensor([[ 0.,  0.,  3., -4.]])
    """

    _one_level = False  # whether only one level is pruned, as by the pruner of a portion

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[str] | None = None,
        *,
        ignore: Sequence[str] = (),
        scope: str = "global",
        pattern: str = "unstructured",
        masks: Mapping[str, Tensor] | None = None,
        keep_zeros: bool = False,
        portions: int | Sequence[str | Sequence[str]] | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise ValueError(f"Invalid model: {kind(model)}; it must be a torch.nn.Module")
        if torch_prune.is_pruned(model):
            raise ValueError(
                "The model carries masks of torch.nn.utils.prune; make them permanent with its "
                "remove function first"
            )
        check_model(model)
        self.model, self.pattern = model, Pattern.parse(pattern)
        self.scope = check_choice("scope", scope, ["global", "layer"])
        self.input_dimensions = select_weights(model, params, ignore, self.pattern)
        sizes = {name: p.numel() for name, p in self.params.items()}
        self.portions = split_into_portions(sizes, portions)
        self._report = Reporter()
        self.seconds = {"gradients": 0.0, "inverse": 0.0}  # spent so far
        self.masks = {
            name: p.detach() != 0 if keep_zeros else torch.ones_like(p, dtype=torch.bool)
            for name, p in self.params.items()
        }
        for name, mask in (masks or {}).items():
            shape = getattr(mask, "shape", None)
            if name not in self.masks or shape != self.masks[name].shape:
                expected = {name: tuple(mask.shape) for name, mask in self.masks.items()}
                raise ValueError(f"Invalid mask for {name!r} of shape {shape}; shapes: {expected}")
            self.masks[name] = self.masks[name] & mask.to(self.masks[name])
        self.apply_masks()

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters that the model has now; also while `register` is in force."""
        found = {}
        for name in self.input_dimensions:
            path, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(path)
            p = module._parameters.get(attribute, module._parameters.get(f"{attribute}_orig"))
            if p is None:
                raise ValueError(f"The model no longer has a parameter {name!r}")
            found[name] = p
        return found

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all prunable weights."""
        return self._zeros(self.masks) / sum(mask.numel() for mask in self.masks.values())

    @torch.no_grad()
    def prune(
        self, target: float | Iterable[float] | Mapping[Any, float], *, partial: bool = False
    ) -> dict[str, Tensor]:
        """Prunes to the sparsity `target` in [0, 1] and returns the masks.

        Exactly round(target·n) of n weights are pruned, of all layers or of each layer by `scope`;
        with blocks, as many blocks as fit. With scope "layer", `target` may be a list in the order
        of `masks`. A target below the present sparsity is refused.

        By layer: a dict such as {"encoder.*": 0.5, re.compile("head.*"): 0.8} from names, globs or
        regular expressions to sparsities. The weights that one key matches compete, or each layer
        has that sparsity, by `scope`. Weights that no key matches stay as they are.

        The least target for N:M is 1 − N/M. If groups already have more zeros than the pattern
        demands, more weights may be pruned than the target says. With `partial`, a lower target is
        allowed, which leaves more than N weights in some groups.
        """
        wanted = self.zeros_wanted(target, partial)
        if all(zeros == self._zeros(names) for names, zeros in wanted):
            self.apply_masks()
            return self.masks
        try:
            pruned = self._pruned if len(self.portions) == 1 else self._pruned_in_portions
            self._write(*pruned(wanted))
            zeros, n = self._zeros(self.masks), sum(mask.numel() for mask in self.masks.values())
            self._report.say(f"pruned {zeros:,} of {n:,} weights, sparsity {zeros / n:.4f}")
        finally:
            self._report.clear()
        return self.masks

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets pruned weights to zero again."""
        for name, p in self.params.items():
            p.masked_fill_(~self.masks[name].to(p.device), 0)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Applies the masks after each step of any optimizer, also of one that Accelerate or
        Lightning wraps, until remove() of the handle that it returns."""
        given = optimizer
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer  # type: ignore[attr-defined]
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"Expected an optimizer of torch.optim, got {kind(given)}")
        return optimizer.register_step_post_hook(lambda *_: self.apply_masks())

    def register(self) -> None:
        """Shows the masks to other tools as those of torch.nn.utils.prune, until `remove`.

        Meanwhile the weights of the layers are computed from masks. torch cannot copy them and
        saves them under other names: call `remove` before copy.deepcopy and before saving.
        """
        self.remove()
        for name, p in self.params.items():
            for module in self.model.modules():
                for attribute, other in list(module.named_parameters(recurse=False)):
                    if other is p:  # which several modules have if they are tied
                        torch_prune.custom_from_mask(module, attribute, self.masks[name])

    def remove(self) -> None:
        """Ends `register`: the model is a plain one again, with the same weights."""
        for module, attribute in self._registered():
            torch_prune.remove(module, attribute)

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run; save the model's own state at the same time."""
        return {"masks": {name: mask.clone() for name, mask in self.masks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state; load the model's own state before."""
        self._check_fit(state)
        self._write(state["masks"])

    # --- what MFACPruner does differently

    def _pruned(self, wanted: Wanted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masks with as many zeros as wanted, and the weights that change."""
        self.apply_masks()
        saliencies = {name: p.double().square() for name, p in self.params.items()}
        return self._choose(self.masks, saliencies, wanted), {}

    def release(self) -> None:
        """Frees memory that is kept between levels: none, here."""

    # --- internals

    def _pruned_in_portions(self, wanted: Wanted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same for portions. A pruner for each writes to the model, as later ones compute its
        gradients. If one fails, the model gets back the weights that it had."""
        before, masks = self._copied_weights(), dict(self.masks)
        try:
            for number, names in enumerate(self.portions, start=1):
                part = copy.copy(self)
                part.input_dimensions = {name: self.input_dimensions[name] for name in names}
                part.masks = {name: self.masks[name] for name in names}
                part.portions, part._one_level = [names], True
                part._report = self._report.within(f"portion {number} of {len(self.portions)}")
                part.release()
                own = [(group, zeros) for group, zeros in wanted if group[0] in part.masks]
                if any(zeros > part._zeros(group) for group, zeros in own):
                    part._write(*part._pruned(own))
                    masks |= part.masks
        except BaseException:
            with self._unregistered() as params:
                for name, p in params.items():
                    p.copy_(before[name])
            raise
        return masks, {}

    def _registered(self) -> list[tuple[nn.Module, str]]:
        """The layers that torch.nn.utils.prune masks, with the names of their weights."""
        ours = set(map(id, self.params.values()))
        return [
            (module, name.removesuffix("_orig"))
            for module in self.model.modules()
            for name, p in module.named_parameters(recurse=False)
            if id(p) in ours and name.endswith("_orig")
            if f"{name.removesuffix('_orig')}_mask" in module._buffers
        ]

    @contextlib.contextmanager
    def _unregistered(self) -> Iterator[dict[str, nn.Parameter]]:
        """Yields the parameters of the plain model. On exit it is registered as before."""
        registered = bool(self._registered())
        self.remove()
        try:
            yield self.params
        finally:
            if registered:
                self.register()

    def _choose(
        self,
        masks: dict[str, Tensor],
        saliencies: dict[str, Tensor],
        wanted: Wanted,
    ) -> dict[str, Tensor]:
        """The masks with more zeros, as many as wanted."""
        if not all(bool(values.isfinite().all()) for values in saliencies.values()):
            raise ValueError("The weights or their saliencies have NaN or Inf; nothing was pruned")
        chosen: dict[str, Tensor] = {}
        for names, zeros in wanted:
            device = saliencies[names[0]].device
            parts = self.pattern.choose(
                [saliencies[name].to(device) for name in names],
                [masks[name] for name in names],
                [self.input_dimensions[name] for name in names],
                zeros - sum(int((~masks[name]).sum()) for name in names),
            )
            chosen.update(zip(names, parts, strict=True))
        return chosen

    def zeros_wanted(
        self, target: float | Iterable[float] | Mapping[Any, float], partial: bool = False
    ) -> Wanted:
        """[(names of parameters that compete, number of their zeros)] that `prune` would make.
        Raises ValueError for targets that `prune` refuses."""
        groups = self.portions if self.scope == "global" else [[name] for name in self.masks]
        least = 0.0 if partial else self.pattern.least_sparsity
        wanted = []
        for group, sparsity in levels_of_groups(target, groups):
            n, present = sum(self.masks[name].numel() for name in group), self._zeros(group)
            if sparsity is None:
                wanted.append((group, present))
                continue
            if not 0.0 <= sparsity <= 1.0 or round(sparsity * n) < round(least * n):
                why = ", as fewer zeros do not make the pattern" if least else ""
                raise ValueError(
                    f"Invalid sparsity: {sparsity}; it must be from {least:g} to 1{why}"
                )
            zeros = round(sparsity * n)
            if zeros < present:
                where = "" if len(group) == len(self.masks) else f" in {', '.join(group)}"
                raise ValueError(
                    f"Target sparsity {sparsity:g} ({zeros} of {n} weights) is below the present "
                    f"{present / n:g} ({present}){where}; pruned weights do not come back"
                )
            if not partial:
                needed = (
                    self.pattern.zeros_needed(self.masks[name], self.input_dimensions[name])
                    for name in group
                )
                zeros = max(zeros, sum(needed))
            wanted.append((group, zeros))
        return wanted

    def _check_fit(self, state: Any) -> None:
        """Raises ValueError if this is no state of a pruner for the same parameters."""
        names, maker = list(self.state_dict()), type(self).__name__
        if not (isinstance(state, Mapping) and state.keys() == set(names)):
            found = list(state) if isinstance(state, Mapping) else kind(state)
            raise ValueError(f"Expected {names} as in state_dict() of {maker}, got {found}")
        shapes = {name: mask.shape for name, mask in self.masks.items()}
        for part in ("masks", *(part for part in self.START if state.get(part))):
            saved = state[part] if isinstance(state[part], Mapping) else {}
            if {name: getattr(value, "shape", None) for name, value in saved.items()} != shapes:
                raise ValueError(f"The saved {part} belong to other parameters than this pruner's")

    START: tuple[str, ...] = ()  # parts of a state with an entry for each parameter, or empty

    def _write(
        self, masks: dict[str, Tensor], weights: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Sets the masks, and writes new weights of some parameters."""
        params = self.params
        registered = bool(self._registered())
        rounded = {name: value.to(params[name]) for name, value in weights.items()}
        for name, value in rounded.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"The new weights of {name}, up to {float(weights[name].abs().max()):.3g}, do "
                    f"not fit {value.dtype}; use a higher damp, or float32. Nothing was pruned"
                )
        for name, value in rounded.items():
            params[name].copy_(value)
        self.masks = {name: masks[name].to(p.device, torch.bool) for name, p in params.items()}
        self.apply_masks()
        if registered:
            self.register()

    def _copied_weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def _zeros(self, names: Iterable[str]) -> int:
        """The number of pruned weights of these parameters."""
        return sum(self.masks[name].numel() - int(self.masks[name].sum()) for name in names)


class WeightsAlive:
    """The weights of some parameters that are alive by masks, as one vector (d,) on a device."""

    def __init__(self, masks: Mapping[str, Tensor], device: torch.device):
        self.shapes = {name: mask.shape for name, mask in masks.items()}
        flat = torch.cat([mask.to(device).flatten() for mask in masks.values()])
        self.index, self.total = flat.nonzero()[:, 0], len(flat)  # of those alive, among all

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The entries (d,) of the weights alive."""
        flat = [tensors[name].to(self.index.device).flatten() for name in self.shapes]
        return torch.cat(flat).index_select(0, self.index)

    def scatter(self, values: Tensor) -> dict[str, Tensor]:
        """A vector (d,) in the shapes of the parameters, with 0 for weights that are not alive."""
        flat = values.new_zeros(self.total).index_copy_(0, self.index, values)
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        shaped = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in shaped}


def check_model(model: nn.Module) -> None:
    """Raises ValueError for a model that cannot be pruned as it is."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("FSDP has sharded the model; prune it before it is wrapped")
    for name, p in model.named_parameters():
        if hasattr(p, "to_local"):
            raise ValueError(f"{name} is a DTensor, as in FSDP2; prune the model before sharding")
        if p.is_meta or nn.parameter.is_lazy(p):
            raise ValueError(f"{name} has no storage yet; load or initialise the weights first")
        if p.is_inference():
            raise ValueError(f"{name} was made in torch.inference_mode, which allows no gradients")
