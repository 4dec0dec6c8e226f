// The (m, m) side of M-FAC on a GPU, for any m >= 1. Matrices are contiguous, row by row.
//
//   hinv_setup   B = (I + N)^-1 diag(c), the coefficients of the paper's recursion
//   hinv_mul     t <- (I + N)^-1 t, the same recursion applied to right-hand sides
//   hinv_update  P = A^-1 when row and column j of A change
//
// where N is strictly lower triangular, N_ik = D_ki / q_k, q = diag(D) + m.
//
// No float is ever added atomically and no sum depends on the number of blocks: the same input
// gives the same bits. No torch headers, launchers with raw pointers: this file compiles in seconds
// and, with stand-ins for the two headers below, also for the CPU, where the tests execute it.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

namespace {

constexpr int WARP = 32;
constexpr int TILE = 32;  // one row or column of a tile a lane

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, bool cooperative,
                   cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// How many blocks the current device holds at once: the most that a cooperative launch may have.
template <class... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), int threads, int* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, 0);
  *blocks *= multiprocessors;
  return error;
}

// Replaces a tile that holds N in its strict lower triangle by (I + N)^-1. Each lane of the calling
// warp keeps a column in registers and leaves it in the tile; to read others', synchronise first.
template <class T>
__device__ void invert_unit_lower(T (*tile)[TILE + 1], int lane) {
  T x[TILE];
#pragma unroll
  for (int i = 0; i < TILE; i++) {
    x[i] = i == lane;
#pragma unroll
    for (int k = 0; k < i; k++) x[i] -= tile[i][k] * x[k];
  }
  __syncwarp();  // N has been read
#pragma unroll
  for (int i = 0; i < TILE; i++) tile[i][lane] = x[i];
}

// --- hinv_setup: recursive doubling -----------------------------------------------------------
//
// With the diagonal blocks X_11 and X_22 of X = (I + N)^-1 diag(c) at hand, s rows each, the block
// below the diagonal is X_21 = -X_22 diag(c_2)^-1 N_21 X_11. So blocks of 32 are inverted on their
// own, and each doubling of the block size is two products, for all pairs of blocks at once.

// X, of which only the diagonal c is read, gets its diagonal tiles.
template <class T>
__global__ __launch_bounds__(WARP) void invert_tiles(const T* N, T* X, int m) {
  __shared__ T tile[TILE][TILE + 1];
  const int first = blockIdx.x * TILE, lane = threadIdx.x, column = first + lane;
  for (int i = 0; i < TILE; i++) {
    const int row = first + i;
    tile[i][lane] = row < m && column < row ? N[size_t(row) * m + column] : T(0);
  }
  __syncwarp();
  invert_unit_lower(tile, lane);
  if (column >= m) return;
  const T c = X[size_t(column) * m + column];
  for (int i = lane + 1; i < TILE && first + i < m; i++)
    X[size_t(first + i) * m + column] = tile[i][lane] * c;
}

// A block of an (m, m) matrix, addressed by rows and columns of the whole, which is read as zero
// above the diagonal and beyond row m.
template <class T>
struct Block {
  const T* data;
  int row, column, stride, m;
  __device__ T operator()(int i, int j) const {
    return i < m && j <= i ? data[size_t(i - row) * stride + (j - column)] : T(0);
  }
};

constexpr int SIDE = 8;                    // threads along a side of an output tile
constexpr int PER_THREAD = TILE / SIDE;    // entries a thread computes along a side
constexpr int PRODUCT_THREADS = SIDE * SIDE;

// The output tile at (i0, j0) of left * right, summed over k0 <= k < k1. Thread (y, x) gets the
// entries (y + 8a, x + 8b): neighbours read neighbouring words of shared memory.
template <class T>
__device__ void multiply(Block<T> left, Block<T> right, int i0, int j0, int k0, int k1,
                         T (&sum)[PER_THREAD][PER_THREAD]) {
  __shared__ T l[TILE][TILE + 1], r[TILE][TILE + 1];
  const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
  for (int k = k0; k < k1; k += TILE) {
    __syncthreads();  // the tiles before have been read
#pragma unroll 4
    for (int e = threadIdx.x; e < TILE * TILE; e += PRODUCT_THREADS) {
      const int row = e / TILE, column = e % TILE;
      l[row][column] = left(i0 + row, k + column);
      r[row][column] = right(k + row, j0 + column);
    }
    __syncthreads();
#pragma unroll 8
    for (int n = 0; n < TILE; n++) {
#pragma unroll
      for (int a = 0; a < PER_THREAD; a++) {
#pragma unroll
        for (int b = 0; b < PER_THREAD; b++)
          sum[a][b] += l[y + SIDE * a][n] * r[n][x + SIDE * b];
      }
    }
  }
}

// The doubling from s to 2s, first and second product: W = diag(c_2)^-1 N_21 X_11 for each pair of
// blocks, then X_21 = -X_22 W. Pair z has its part of W, (s, s), at W + z s^2.
template <class T, bool SECOND>
__global__ __launch_bounds__(PRODUCT_THREADS) void double_blocks(const T* N, T* X, T* W, int m,
                                                                int s) {
  const int start = 2 * s * blockIdx.z, middle = start + s;
  const int i0 = middle + blockIdx.y * TILE, j0 = start + blockIdx.x * TILE;
  if (i0 >= m) return;
  T* const part = W + size_t(blockIdx.z) * s * s;
  const Block<T> x{X, 0, 0, m, m};
  T sum[PER_THREAD][PER_THREAD] = {};
  if (SECOND) {
    multiply(x, Block<T>{part, middle, start, s, m}, i0, j0, middle, i0 + TILE, sum);
  } else {
    multiply(Block<T>{N, 0, 0, m, m}, x, i0, j0, j0, middle, sum);
  }
#pragma unroll
  for (int a = 0; a < PER_THREAD; a++) {
    const int i = i0 + threadIdx.x / SIDE + SIDE * a;
    if (i >= m) break;
#pragma unroll
    for (int b = 0; b < PER_THREAD; b++) {
      const int j = j0 + threadIdx.x % SIDE + SIDE * b;
      if (SECOND) {
        X[size_t(i) * m + j] = -sum[a][b];
      } else {
        part[size_t(i - middle) * s + (j - start)] = sum[a][b] / X[size_t(i) * m + i];
      }
    }
  }
}

// 1 + 2 ceil(log2(m / 32)) launches. W: m^2 / 4 numbers of scratch.
template <class T>
cudaError_t setup(const T* N, T* X, T* W, int m, cudaStream_t stream) {
  cudaError_t error =
      launch(invert_tiles<T>, dim3(ceil_div(m, TILE)), WARP, false, stream, N, X, m);
  for (int s = TILE; s < m && error == cudaSuccess; s *= 2) {
    const dim3 grid(s / TILE, s / TILE, ceil_div(m - s, 2 * s));
    error = launch(double_blocks<T, false>, grid, PRODUCT_THREADS, false, stream, N, X, W, m, s);
    if (error == cudaSuccess)
      error = launch(double_blocks<T, true>, grid, PRODUCT_THREADS, false, stream, N, X, W, m, s);
  }
  return error;
}

// --- hinv_mul: blocked forward substitution ---------------------------------------------------

constexpr int PANEL = 4 * TILE;  // rows solved by one block between two meetings of the grid
constexpr int GROUPS = 4;        // threads that share a column of D
constexpr int SUBSTITUTE_THREADS = GROUPS * PANEL;

// Block (x, y) owns panels x, x + gridDim.x, ... of the right-hand sides y, y + gridDim.y, ... In
// step p each owner subtracts the solved panel p - 1 from what it owns from p on; the owner of p
// then solves it. The diagonal tiles of p are inverted before the grid meets, while others are
// still at step p - 1, so that what has to be done one after the other is products only.
template <class T>
__global__ __launch_bounds__(SUBSTITUTE_THREADS, 1) void substitute(const T* D, T* t, int m,
                                                                    int rows, int n) {
  __shared__ T inverse[PANEL][TILE + 1];  // of the diagonal tiles of the panel to be solved next
  __shared__ T x[PANEL];                  // a panel of t
  __shared__ T before[PANEL];             // t_k / q_k of the panel solved before
  __shared__ T solved[TILE];              // t_k / q_k of the tile just solved
  __shared__ T partial[GROUPS][PANEL];
  const auto grid = cooperative_groups::this_grid();
  const int column = threadIdx.x % PANEL, group = threadIdx.x / PANEL;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int panels = (rows + PANEL - 1) / PANEL;
  const auto q = [=](int k) { return D[size_t(k) * m + k] + T(m); };

  const auto invert_tiles_of = [&](int panel) {
    if (warp >= PANEL / TILE) return;
    T(*tile)[TILE + 1] = inverse + warp * TILE;
    const int first = panel * PANEL + warp * TILE, i = first + lane;
    for (int k = 0; k < TILE; k++)
      tile[lane][k] = k < lane && i < rows ? D[size_t(first + k) * m + i] / q(first + k) : T(0);
    __syncwarp();
    invert_unit_lower(tile, lane);
  };
  // x_i -= sum_k D_ki scaled_k for `count` rows of D from `first` on, in the columns from `from` on
  const auto subtract = [&](int first, int count, const T* scaled, int panel, int from) {
    const int i = panel * PANEL + column;
    T sum = 0;
    if (column >= from && i < rows) {
#pragma unroll 8
      for (int k = group; k < count; k += GROUPS)
        sum += D[size_t(first + k) * m + i] * scaled[k];
    }
    partial[group][column] = sum;
    __syncthreads();
    if (group == 0) {
      for (int g = 0; g < GROUPS; g++) x[column] -= partial[g][column];
    }
    __syncthreads();
  };
  const auto solve = [&](int panel) {
    for (int a = 0; a < PANEL; a += TILE) {
      const int first = panel * PANEL + a, i = first + lane;
      if (warp == 0) {
        T sum = 0;
        for (int k = 0; k <= lane; k++) sum += inverse[a + lane][k] * x[a + k];
        __syncwarp();  // x has been read
        x[a + lane] = sum;
        solved[lane] = i < rows ? sum / q(i) : T(0);
      }
      __syncthreads();
      if (first + TILE >= rows) break;
      if (a + TILE < PANEL) subtract(first, TILE, solved, panel, a + TILE);
    }
  };

  for (int p = 0; p < panels; p++) {
    if (p % gridDim.x == blockIdx.x) invert_tiles_of(p);
    if (p > 0) grid.sync();
    const int mine = p + int((blockIdx.x + gridDim.x - p % gridDim.x) % gridDim.x);
    for (int rhs = blockIdx.y; rhs < n && mine < panels; rhs += gridDim.y) {
      T* const values = t + size_t(rhs) * m;
      if (p > 0 && group == 0) {
        const int k = (p - 1) * PANEL + column;
        before[column] = values[k] / q(k);
      }
      for (int panel = mine; panel < panels; panel += gridDim.x) {
        const int i = panel * PANEL + column;
        if (group == 0) x[column] = i < rows ? values[i] : T(0);
        __syncthreads();
        if (p > 0) subtract((p - 1) * PANEL, PANEL, before, panel, 0);
        if (panel == p) solve(panel);
        if (group == 0 && i < rows) values[i] = x[column];
      }
    }
  }
}

template <class T>
cudaError_t multiply_inverse(const T* D, T* t, int m, int rows, int n, cudaStream_t stream) {
  if (rows == 0 || n == 0) return cudaSuccess;
  int resident = 0;
  const cudaError_t error = resident_blocks(substitute<T>, SUBSTITUTE_THREADS, &resident);
  if (error != cudaSuccess) return error;
  const int across = std::min(ceil_div(rows, PANEL), resident);
  const dim3 grid(across, std::min(n, std::min(resident / across, 65535)));
  return launch(substitute<T>, grid, SUBSTITUTE_THREADS, true, stream, D, t, m, rows, n);
}

// --- hinv_update ------------------------------------------------------------------------------

constexpr int EXCHANGE_THREADS = 256;
constexpr int AHEAD = 4;

__device__ double sum_over_warp(double value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;  // the same bits in every lane
}

// store(i, sum over c of M_ic x(c)) for each row i, a warp a row.
template <class X, class Store>
__device__ void times(const double* M, int m, X x, Store store) {
  const int lane = threadIdx.x % WARP, warps = EXCHANGE_THREADS / WARP;
  for (int i = blockIdx.x * warps + threadIdx.x / WARP; i < m; i += gridDim.x * warps) {
    const double* const row = M + size_t(i) * m;
    double sum = 0;
#pragma unroll 8
    for (int c = lane; c < m; c += WARP) sum += row[c] * x(c);
    sum = sum_over_warp(sum);
    if (lane == 0) store(i, sum);
  }
}

// The sum or, with LARGEST, the largest of f(i) over i < m, by each block on its own.
template <bool LARGEST, class F>
__device__ double reduce(int m, F f) {
  __shared__ double part[EXCHANGE_THREADS];
  double value = 0;
  for (int i = threadIdx.x; i < m; i += EXCHANGE_THREADS)
    value = LARGEST ? fmax(value, f(i)) : value + f(i);
  part[threadIdx.x] = value;
  for (int half = EXCHANGE_THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      const double other = part[threadIdx.x + half];
      part[threadIdx.x] = LARGEST ? fmax(part[threadIdx.x], other) : part[threadIdx.x] + other;
    }
  }
  __syncthreads();
  return part[0];
}

// k is the new row and column j of K, k' is k with entry j set to 0, p the old column j of P, and
// A = K + m damp I. With A_ and P_ for the matrices without row and column j,
//
//   P_ = P - p p^T / p_j
//   u  = P_ k',  u~ = u with entry j set to -1          A_^-1 k'
//   u <- u - P_ (A_ u - k')                             one step of iterative refinement, if needed
//   s  = k_j + m damp - k'^T u                          Schur complement, s >= m damp
//   P <- P_ + u~ u~^T / s,  z = -u~ / s                 z is the new column j
//
// The refinement comes before the update, as only that keeps P itself accurate: for nearly parallel
// gradients k_j / s is 1e6 and more, P k' cancels accordingly, and what is lost stays in P. For
// others A_ u - k' is rounding error, and P is read twice, not three times.
// A_ u - k' are the entries of A u~ but for j. Residuals are in units of row and column,
// sqrt(A_ii A_jj): small gradients count as much as large ones.
constexpr double ROUNDING = 1e-13;  // of A u, relative: what refinement would not make smaller

__global__ __launch_bounds__(EXCHANGE_THREADS) void exchange(
    double* __restrict__ P, double* __restrict__ K, const double* __restrict__ k, int m, int j,
    double damp, double* __restrict__ z, double* __restrict__ health,
    double* __restrict__ scratch) {
  const auto grid = cooperative_groups::this_grid();
  const int thread = blockIdx.x * EXCHANGE_THREADS + threadIdx.x;
  const int threads = gridDim.x * EXCHANGE_THREADS;
  double* const p = scratch;
  double* const product = p + m;  // P k', then P (A_ u - k')
  double* const u = product + m;  // u~ before its refinement
  double* const image = u + m;    // A u~, then e_j - A z
  const double shift = m * damp, a = k[j] + shift;
  const auto a_diagonal = [=](int i) { return K[size_t(i) * m + i] + shift; };

  for (int i = thread; i < m; i += threads) {
    p[i] = P[size_t(j) * m + i];
    K[size_t(i) * m + j] = K[size_t(j) * m + i] = k[i];
  }
  const auto store_product = [=](int i, double y) { product[i] = y; };
  times(P, m, [=](int c) { return c == j ? 0 : k[c]; }, store_product);
  grid.sync();

  // p^T k' is entry j of P k': P is symmetric.
  const double along = product[j] / p[j];
  const auto rough = [=](int i) { return i == j ? -1 : product[i] - p[i] * along; };
  for (int i = thread; i < m; i += threads) u[i] = rough(i);
  times(K, m, rough, [=](int i, double y) { image[i] = y + shift * rough(i); });
  grid.sync();

  // Every block finds the same, so that all of them go the same way.
  const double off = reduce<true>(
      m, [=](int i) { return i == j ? 0 : fabs(image[i]) / sqrt(a_diagonal(i) * a); });
  const bool refine = !(off < ROUNDING);
  if (refine) {
    times(P, m, [=](int c) { return c == j ? 0 : image[c]; }, store_product);
    grid.sync();
  }

  const double correction = product[j] / p[j];
  const auto refined = [=](int i) {
    return i == j ? -1 : refine ? u[i] - (product[i] - p[i] * correction) : u[i];
  };
  const double s = a - reduce<false>(m, [=](int i) { return i == j ? 0 : k[i] * refined(i); });
  // A Schur complement that is no positive number leaves nothing to go on with: P becomes NaN,
  // which every later exchange reports too, and z zero, so that a step made from it moves nothing.
  const bool usable = s > 0 && s < INFINITY;
  const double inverse_s = usable ? 1 / s : NAN, inverse_p = 1 / p[j];
  for (int i = thread; i < m; i += threads) z[i] = usable ? -refined(i) / s : 0;

  if (refine)
    times(K, m, refined, [=](int i, double y) { image[i] = y + shift * refined(i); });

  const int lane = threadIdx.x % WARP, warps = EXCHANGE_THREADS / WARP;
  for (int i = blockIdx.x * warps + threadIdx.x / WARP; i < m; i += gridDim.x * warps) {
    double* const row = P + size_t(i) * m;
    const double p_i = p[i], u_i = refined(i);
    for (int first = lane; first < m; first += AHEAD * WARP) {
      double old[AHEAD];  // all on their way before the first store
#pragma unroll
      for (int n = 0; n < AHEAD; n++) old[n] = first + n * WARP < m ? row[first + n * WARP] : 0;
#pragma unroll
      for (int n = 0; n < AHEAD; n++) {
        const int c = first + n * WARP;
        if (c >= m) break;
        // Products of an entry of the row with one of the column first: P stays exactly symmetric.
        const double without_j = i == j || c == j ? 0 : old[n] - (p_i * p[c]) * inverse_p;
        row[c] = without_j + (u_i * refined(c)) * inverse_s;
      }
    }
  }
  grid.sync();

  if (blockIdx.x != 0) return;
  // e_j - A z = e_j + A u~ / s. Thread 0 alone uses the results, so that no barrier is between them.
  const double residual = reduce<true>(m, [=](int i) {
    return fabs((i == j) + image[i] * inverse_s) * sqrt(a / a_diagonal(i));
  });
  const double condition =
      reduce<true>(m, [=](int i) { return P[size_t(i) * m + i] * a_diagonal(i); });
  if (threadIdx.x == 0) {
    health[0] = s;
    health[1] = usable ? residual : NAN;  // fmax passes over NaN
    health[2] = usable ? condition : NAN;
  }
}

}  // namespace

extern "C" {

// tmp (m, m): N. coef (m, m): c on the diagonal, B on return. scratch: m * m / 4 numbers.
cudaError_t hinv_setup_float(const float* tmp, float* coef, float* scratch, int m,
                             cudaStream_t stream) {
  return setup(tmp, coef, scratch, m, stream);
}
cudaError_t hinv_setup_double(const double* tmp, double* coef, double* scratch, int m,
                              cudaStream_t stream) {
  return setup(tmp, coef, scratch, m, stream);
}

// D (m, m), of which the first `rows` rows and columns count. t (n, m), in place.
cudaError_t hinv_mul_float(const float* D, float* t, int m, int rows, int n, cudaStream_t stream) {
  return multiply_inverse(D, t, m, rows, n, stream);
}
cudaError_t hinv_mul_double(const double* D, double* t, int m, int rows, int n,
                            cudaStream_t stream) {
  return multiply_inverse(D, t, m, rows, n, stream);
}

// P, K (m, m), k, z (m,), health (3,): s, residual, condition. scratch: 4 m numbers.
cudaError_t hinv_update_double(double* P, double* K, const double* k, int m, int j, double damp,
                               double* z, double* health, double* scratch, cudaStream_t stream) {
  int resident = 0;
  const cudaError_t error = resident_blocks(exchange, EXCHANGE_THREADS, &resident);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(ceil_div(m, EXCHANGE_THREADS / WARP), resident);
  return launch(exchange, dim3(blocks), EXCHANGE_THREADS, true, stream, P, K, k, m, j, damp, z,
                health, scratch);
}

}  // extern "C"
