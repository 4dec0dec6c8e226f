"""M-FAC: the matrix-free inverse empirical Fisher, as an optimizer and as a pruner.

    from mfac import MFAC, MFACPruner

In a clone, this file lies beside the other modules. `pip install .` turns all of them into one
package: `optim` becomes `mfac.optim`, and this file is the package itself. `mfac` has the names
below in both.

Example:
    >>> import torch, mfac
    >>> layer = torch.nn.Linear(4, 2)
    >>> optimizer = mfac.MFAC(layer.parameters(), lr=1e-3, ngrads=8)
"""

import models
from fallback import mfac_groups
from optim import (
    MFAC,
    DampTooSmallError,
    DynamicInverseFisher,
    NonFiniteGradientError,
    window_bytes,
)
from prun import (
    BlockedInverseFisher,
    MagnitudePruner,
    MFACPruner,
    PagedInverseFisher,
    inverse_bytes,
)
from rows import MFACRowPruner

__version__ = "0.2.0"
__all__ = [
    "MFAC",
    "BlockedInverseFisher",
    "DampTooSmallError",
    "DynamicInverseFisher",
    "MFACPruner",
    "MFACRowPruner",
    "MagnitudePruner",
    "NonFiniteGradientError",
    "PagedInverseFisher",
    "inverse_bytes",
    "mfac_groups",
    "models",
    "window_bytes",
]
