// The part of <cooperative_groups.h> that the kernels use; see cuda_runtime.h beside this file.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {
struct grid_group {
  void sync(int line = __builtin_LINE()) const {
    if (!cpucuda::self.block->grid) cpucuda::die("grid.sync() in a launch not cooperative", line);
    cpucuda::wait(cpucuda::State::AT_GRID, line);
  }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
