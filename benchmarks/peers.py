"""What M-FAC is compared with: Wanda and SparseGPT, layer by layer, from their papers' definitions.

    python benchmarks/peers.py --pruner sparsegpt --sparsity 0.7

prunes the model of examples/prune_any_model.py and measures it in the same way. For a linear
layer with weight W (outputs, inputs) and inputs X (inputs, words), without padding:

- Wanda (Sun et al., arXiv 2306.11695): of each output the lowest |Wᵢⱼ|·‖Xⱼ‖₂ go. The others stay as
  they are.
- SparseGPT (Frantar, Alistarh, arXiv 2301.00774, algorithm 1): H = XXᵀ + λI, λ a hundredth of the
  mean of the diagonal, and H⁻¹ = UᵀU, U upper triangular. Columns go from left to right. Of each
  128 the lowest W²/U²ⱼⱼ are set to 0, and the columns after them make up for the error.

Layers are pruned one after the other, each with the inputs that the pruned layers before give it.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 128  # a block of SparseGPT, for the choice and for the updates

# --- one weight -----------------------------------------------------------------------------------


def lowest(scores: Tensor, sparsity: float, pattern: str, each_row: bool) -> Tensor:
    """Which scores (outputs, inputs) are the lowest, bool: so many of each row or of all of them,
    or those that a pattern N:M takes of each M in a row."""
    if pattern != "unstructured":
        kept, group = map(int, pattern.split(":"))
        groups = scores.unflatten(1, (-1, group))
        gone = groups.topk(group - kept, largest=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, gone, True).flatten(1)
    rows = scores if each_row else scores.reshape(1, -1)
    gone = rows.topk(round(sparsity * rows.shape[1]), largest=False).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, gone, True).view_as(scores)


def wanda(W: Tensor, XXt: Tensor, sparsity: float, pattern: str) -> Tensor:
    """The pruned weight, from W (outputs, inputs) and XXᵀ (inputs, inputs)."""
    scores = W.abs() * XXt.diagonal().sqrt()
    return W.masked_fill(lowest(scores, sparsity, pattern, each_row=True), 0)


def sparsegpt(W: Tensor, XXt: Tensor, sparsity: float, pattern: str) -> Tensor:
    """The pruned and updated weight, from W (outputs, inputs) and XXᵀ (inputs, inputs)."""
    W, H = W.clone(), XXt.clone()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    group = COLUMNS if pattern == "unstructured" else int(pattern.split(":")[1])
    for start in range(0, W.shape[1], COLUMNS):
        block = slice(start, min(start + COLUMNS, W.shape[1]))
        errors = torch.zeros_like(W[:, block])
        for j in range(start, block.stop):
            if (j - start) % group == 0:
                columns = slice(j, min(j + group, block.stop))
                scores = W[:, columns].square() / U.diagonal()[columns].square()
                gone = lowest(scores, sparsity, pattern, each_row=False)
            error = W[:, j] / U[j, j] * gone[:, j - columns.start]
            W[:, j : block.stop] -= error[:, None] * U[j, j : block.stop]
            W[:, j].masked_fill_(gone[:, j - columns.start], 0)
            errors[:, j - start] = error
        W[:, block.stop :] -= errors @ U[block, block.stop :]
    return W


# --- a model --------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a forward pass that has come to the first layer."""


def calls_of(layer: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any]) -> list[Any]:
    """(arguments, named arguments) with which `run` of each batch calls a layer."""
    calls: list[Any] = []

    def keep(layer: nn.Module, args: Any, named: Any) -> None:
        calls.append((args, named))
        raise Stop

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        with contextlib.suppress(Stop):
            run(batch)
    handle.remove()
    return calls


@torch.no_grad()
def prune_layers(
    layers: Sequence[nn.Module],
    calls: list[Any],
    words: Sequence[Tensor],
    method: Callable[[Tensor, Tensor, float, str], Tensor],
    sparsity: float,
    pattern: str = "unstructured",
) -> None:
    """Prunes the linear layers in each of `layers`, which are called one after the other, the first
    with `calls`. `words` (sentences, length) bool for each call are no padding."""
    for layer in layers:
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        sums = {m: m.weight.new_zeros(m.in_features, m.in_features) for m in linear}
        counted: list[Tensor] = []

        def add(module: nn.Module, inputs: tuple[Tensor], sums=sums, counted=counted) -> None:
            X = inputs[0][counted[-1]]
            sums[module].addmm_(X.T, X)

        handles = [module.register_forward_pre_hook(add) for module in linear]
        for (args, named), inside in zip(calls, words, strict=True):
            counted.append(inside)
            layer(*args, **named)
        for handle in handles:
            handle.remove()
        for module in linear:
            module.weight.copy_(method(module.weight, sums[module], sparsity, pattern))
        calls = [((layer(*args, **named), *args[1:]), named) for args, named in calls]


def main() -> dict[str, float]:
    from examples.prune_any_model import Setting

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruner", choices=["wanda", "sparsegpt"], required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured", help="or N:M such as 2:4")
    args = parser.parse_args()
    setting = Setting()
    batches = setting.batches
    model = setting.model
    layers = model.encoder.layer
    calls = calls_of(layers[0], lambda batch: model(**batch), batches)
    words = [batch["attention_mask"].bool() for batch in batches]
    method = {"wanda": wanda, "sparsegpt": sparsegpt}[args.pruner]
    prune_layers(layers, calls, words, method, args.sparsity, args.pattern)
    return setting.agreement()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(main())
