"""Five minutes with M-FAC on the handwritten digits: the inverse, the optimizer, the pruner.

    python -m examples.quickstart

examples/quickstart.ipynb has the same cells as a notebook. tests/make_notebook.py writes it from
this file. All of it takes seconds on one core, and no network.
"""

# %% [markdown]
# The data are 1,797 images of 8 x 8 pixels, which come with scikit-learn. The network has two
# layers.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from mfac import MFAC, DynamicInverseFisher, MagnitudePruner, MFACPruner

torch.manual_seed(0)
images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = (images / 16).float()
order = torch.randperm(len(images))
training, test = order[:1440], order[1440:]
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def accuracy() -> float:
    """Share of the test images that the model classifies correctly, in %."""
    with torch.no_grad():
        return 100 * float((model(images[test]).argmax(1) == labels[test]).float().mean())


# %% [markdown]
# ## The inverse
# With m gradients gᵢ of the d weights, F = λI + (1/m) Σ gᵢgᵢᵀ stands in for the Hessian. M-FAC
# multiplies by F⁻¹ without forming F. This model is small enough to form and invert F for
# comparison. The results agree to the precision of float32.

# %%
m, damp = 32, 1e-3
gradients = []
for batch in training[: 32 * m].split(32):
    loss = cross_entropy(model(images[batch]), labels[batch])
    gradients.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, model.parameters())))
G = torch.stack(gradients)  # (m, d)
d = G.shape[1]

fisher = DynamicInverseFisher(num_grads=m, dim=d, damp=damp)
for g in G:
    fisher.update(g)

F = damp * torch.eye(d, dtype=torch.float64) + G.T.double() @ G.double() / m
expected = torch.linalg.solve(F, g.double())
inverse_error = float((fisher.matvec(g) - expected).norm() / expected.norm())
print(f"F is {d} x {d}, the window {m} x {d}; F⁻¹g is off by {inverse_error:.0e}")

# %% [markdown]
# ## The optimizer
# `MFAC` keeps the last m gradients of training in such a window, and steps along F⁻¹g. It takes the
# place of SGD or Adam.

# %%
optimizer = MFAC(model.parameters(), lr=0.01, momentum=0.9, ngrads=64, damp=1e-3)
before = accuracy()
for epoch in range(10):
    for batch in training[torch.randperm(len(training))].split(32):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}  loss {loss.item():.3f}  test {accuracy():.1f} %")
trained = accuracy()

# %% [markdown]
# ## The pruner
# Removing weight i raises the loss by about wᵢ² / 2[F⁻¹]ᵢᵢ, so the weights with the lowest values
# go first. F⁻¹ also tells how to adjust the others. The baseline removes the smallest weights.

# %%
dense = {name: value.clone() for name, value in model.state_dict().items()}
MagnitudePruner(model).prune(0.9)  # of the weights of both layers
by_magnitude = accuracy()

model.load_state_dict(dense)
batches = [(images[batch], labels[batch]) for batch in training.split(8)]  # a gradient each
pruner = MFACPruner(model, batches, ngrads=128, damp=1e-3)
pruner.prune(0.9)
pruned = accuracy()
print(f"90 % pruned: by magnitude {by_magnitude:.1f} %, with M-FAC {pruned:.1f} %")

# %% [markdown]
# Pruned weights stay zero in whatever training follows, with any optimizer.

# %%
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
pruner.attach(optimizer)
for _ in range(3):
    for batch in training[torch.randperm(len(training))].split(32):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
tuned = accuracy()
print(f"fine-tuned: {tuned:.1f} % at sparsity {pruner.sparsity:.2f}")

# %%
figures = {"inverse_error": inverse_error, "before": before, "trained": trained}
figures |= {"by_magnitude": by_magnitude, "pruned": pruned, "tuned": tuned}
print({name: float(f"{value:.3g}") for name, value in figures.items()})
