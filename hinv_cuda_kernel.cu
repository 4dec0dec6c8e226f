// M-FAC on a GPU, for any m >= 1: the (m, m) side, and the products with the window of gradients.
// Matrices are contiguous, row by row.
//
//   hinv_setup   B = (I + N)^-1 diag(c), the coefficients of the paper's recursion
//   hinv_mul     t <- (I + N)^-1 t, the same recursion applied to right-hand sides
//   hinv_update  P = A^-1 when row and column j of A change
//   hinv_times, hinv_transposed_times                  Gx and G^T z for a window G (m, d)
//   hinv_sparse_times, hinv_sparse_replace             the same for a compressed window
//   hinv_round, hinv_largest                           a gradient as a row of 8 or 16 bits with
//                                                      scales, or of a compressed window
//
// where N is strictly lower triangular, N_ik = D_ki / q_k, q = diag(D) + m.
//
// No float is ever added atomically and no sum depends on the number of blocks: the same input
// gives the same bits. No torch headers, launchers with raw pointers: this file compiles in seconds,
// by NVRTC at run time too and, with stand-ins for the headers below, also for the CPU, where the
// tests execute it.

#ifdef __CUDACC_RTC__
#define NAN __longlong_as_double(0x7ff8000000000000)
#define INFINITY __longlong_as_double(0x7ff0000000000000)

// cooperative_groups.h needs <nv/target>, which torch's wheels lack. What is needed of it: blocks of
// a cooperative launch meet at a word that the driver keeps for each launch. Block 0 adds 2^31 less
// what the others add, one each, so that the highest bit flips when all are there.
namespace cooperative_groups {
struct grid_group {
  __device__ void sync() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned high, low;
      asm("mov.u32 %0, %%envreg1;" : "=r"(high));
      asm("mov.u32 %0, %%envreg2;" : "=r"(low));
      const auto workspace = (unsigned long long)(high) << 32 | low;
      volatile unsigned* const barrier = reinterpret_cast<unsigned*>(workspace) + 1;
      __threadfence();
      const unsigned mine = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
      const unsigned before = atomicAdd(const_cast<unsigned*>(barrier), mine);
      while (!((before ^ *barrier) & 0x80000000u)) {
      }
      __threadfence();
    }
    __syncthreads();
  }
};
__device__ grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#endif

namespace {

constexpr int WARP = 32;
constexpr int TILE = 32;  // one row or column of a tile a lane

#ifndef __CUDACC_RTC__

int ceil_div(long long a, int b) { return int((a + b - 1) / b); }

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

#endif

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

#ifndef __CUDACC_RTC__
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
#endif

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

#ifndef __CUDACC_RTC__
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
#endif

// --- shared by what follows -------------------------------------------------------------------

constexpr int THREADS = 256;  // of every block below
constexpr int WARPS = THREADS / WARP;

__device__ double sum_over_warp(double value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;  // the same bits in every lane
}

// store(i, sum over c < n of row(i)[c] x(c)) for each i < m: a warp a row.
template <class Row, class X, class Store>
__device__ void times(Row row_of, int m, int n, X x, Store store) {
  const int lane = threadIdx.x % WARP;
  for (int i = blockIdx.x * WARPS + threadIdx.x / WARP; i < m; i += gridDim.x * WARPS) {
    const double* const row = row_of(i);
    double sum = 0;
#pragma unroll 8
    for (int c = lane; c < n; c += WARP) sum += row[c] * x(c);
    sum = sum_over_warp(sum);
    if (lane == 0) store(i, sum);
  }
}

template <int COUNT>
struct Numbers {
  double at[COUNT];
};

// The sums or, with LARGEST, the largest of the numbers of f(i) over i < m, by each block on its own.
template <int COUNT, bool LARGEST = false, class F>
__device__ Numbers<COUNT> reduce(int m, F f) {
  __shared__ double part[COUNT][WARPS];
  Numbers<COUNT> result{};
  const auto take = [](double a, double b) { return LARGEST ? fmax(a, b) : a + b; };
  for (int i = threadIdx.x; i < m; i += THREADS) {
    const Numbers<COUNT> numbers = f(i);
#pragma unroll
    for (int n = 0; n < COUNT; n++) result.at[n] = take(result.at[n], numbers.at[n]);
  }
#pragma unroll
  for (int n = 0; n < COUNT; n++) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, result.at[n], distance);
      result.at[n] = take(result.at[n], other);
    }
    if (threadIdx.x % WARP == 0) part[n][threadIdx.x / WARP] = result.at[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < COUNT; n++) {
    result.at[n] = part[n][0];
    for (int w = 1; w < WARPS; w++) result.at[n] = take(result.at[n], part[n][w]);
  }
  return result;
}

// `count` gradients have been seen, and one more is on its way: to row j, one of the `rows` in use.
struct Place {
  int j, rows;
  __device__ Place(const long long* count, int m)
      : j(int(*count % m)), rows(*count < m ? int(*count) + 1 : m) {}
};

// --- hinv_update ------------------------------------------------------------------------------

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
//
// How far F^-1 g = m G^T z may be off, relatively, for products and sums in float64:
//
//   (2^-52 c (sum_i u~_i^2 K_ii)^1/2 + c (sum_i r_i^2 / A_ii)^1/2) / (u~^T K u~)^1/2
//
// with c = (sum_i P_ii A_ii)^1/2 and the residual r = s e_j + A u~. All of it, and whether it is
// below the tolerance, is known before anything is written.
constexpr double ROUNDING = 1e-13;  // of A u, relative: what refinement would not make smaller
constexpr double UNIT = 0x1p-52;
constexpr int AHEAD = 4;

__global__ __launch_bounds__(THREADS, 2) void exchange(
    double* __restrict__ P, double* __restrict__ K, const double* __restrict__ k,
    const long long* __restrict__ count, const double* __restrict__ damp, int m, double tolerance,
    double* __restrict__ z, double* __restrict__ error, long long* __restrict__ accepted,
    double* __restrict__ scratch) {
  const auto grid = cooperative_groups::this_grid();
  const int thread = blockIdx.x * THREADS + threadIdx.x;
  const int threads = gridDim.x * THREADS;
  double* const p = scratch;
  double* const diagonal = p + m;        // of the old P
  double* const product = diagonal + m;  // P k', then P (A_ u - k')
  double* const u = product + m;         // u~ before its refinement
  double* const image = u + m;           // K u~, for the new K
  const int j = Place(count, m).j;
  const double shift = m * *damp, a = k[j] + shift;
  const auto k_diagonal = [=](int i) { return i == j ? k[j] : K[size_t(i) * m + i]; };
  const auto a_diagonal = [=](int i) { return k_diagonal(i) + shift; };
  const auto row_of_P = [=](int i) { return P + size_t(i) * m; };
  const auto row_of_K = [=](int i) { return i == j ? k : K + size_t(i) * m; };
  const auto store_product = [=](int i, double y) { product[i] = y; };
  // u~_j = -1, column j of the new K is k
  const auto store_image = [=](int i, double y) { image[i] = y - k[i]; };

  for (int i = thread; i < m; i += threads) {
    p[i] = P[size_t(j) * m + i];
    diagonal[i] = P[size_t(i) * m + i];
  }
  times(row_of_P, m, m, [=](int c) { return c == j ? 0 : k[c]; }, store_product);
  grid.sync();

  // p^T k' is entry j of P k': P is symmetric.
  const double along = product[j] / p[j];
  const auto rough = [=](int i) { return i == j ? 0 : product[i] - p[i] * along; };
  for (int i = thread; i < m; i += threads) u[i] = i == j ? -1 : rough(i);
  times(row_of_K, m, m, rough, store_image);
  grid.sync();

  // Every block finds the same, so that all of them go the same way.
  const auto residual = [=](int i) { return i == j ? 0 : image[i] + shift * u[i]; };
  const auto relative = [=](int i) {
    return Numbers<1>{{fabs(residual(i)) / sqrt(a_diagonal(i) * a)}};
  };
  const bool refine = !(reduce<1, true>(m, relative).at[0] < ROUNDING);
  if (refine) {
    times(row_of_P, m, m, residual, store_product);
    grid.sync();
  }
  const double correction = product[j] / p[j];
  const auto refined = [=](int i) {
    return i == j ? -1 : refine ? u[i] - (product[i] - p[i] * correction) : u[i];
  };
  if (refine) {
    times(row_of_K, m, m, [=](int i) { return i == j ? 0 : refined(i); }, store_image);
    grid.sync();
  }

  const auto projected = [=](int i) { return Numbers<1>{{i == j ? 0 : k[i] * refined(i)}}; };
  const double s = a - reduce<1>(m, projected).at[0], inverse_s = 1 / s, inverse_p = 1 / p[j];
  const auto new_diagonal = [=](int i) {
    const double without_j = i == j ? 0 : diagonal[i] - (p[i] * p[i]) * inverse_p;
    return without_j + (refined(i) * refined(i)) * inverse_s;
  };
  const Numbers<4> sums = reduce<4>(m, [=](int i) {
    const double x = refined(i), r = image[i] + shift * x + (i == j ? s : 0);
    const double k_i = k_diagonal(i), a_i = k_i + shift;
    return Numbers<4>{{new_diagonal(i) * a_i, x * x * k_i, r * r / a_i, x * image[i]}};
  });
  // z^T K z may cancel to its own rounding. Then nothing is known, and the error is infinite.
  const double left = fmax(sums.at[3] - m * (UNIT / 2) * sums.at[1], 0.0);
  double off = (UNIT * sqrt(sums.at[1]) + sqrt(sums.at[2])) * sqrt(sums.at[0] / left);
  if (!(off < INFINITY && s > 0 && s < INFINITY && sums.at[0] > 0)) off = INFINITY;
  if (k[j] == 0) off = 0;
  if (!(fabs(k[j]) < INFINITY)) off = NAN;
  const bool good = off <= tolerance;
  for (int i = thread; i < m; i += threads) {
    z[i] = good ? -refined(i) * inverse_s : 0;
    if (good) K[size_t(i) * m + j] = K[size_t(j) * m + i] = k[i];
  }
  if (thread == 0) {
    *error = off;
    *accepted = good;
  }
  if (!good) return;

  const int lane = threadIdx.x % WARP;
  for (int i = blockIdx.x * WARPS + threadIdx.x / WARP; i < m; i += gridDim.x * WARPS) {
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
}

// --- numbers of the window ----------------------------------------------------------------------

constexpr int BLOCK = 4096;  // columns that have a scale, or their share of a compressed row

// 16 bytes of a row.
struct Pack {
  unsigned word[4];
};

__device__ Pack load(const void* address) {
  const uint4 v = __ldcs(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
}

__device__ void store(void* address, const Pack& pack) {
  *static_cast<uint4*>(address) = {pack.word[0], pack.word[1], pack.word[2], pack.word[3]};
}

// The first `bytes` of a pack, and zeros.
__device__ Pack first_bytes(Pack pack, int bytes) {
#pragma unroll
  for (int w = 0; w < 4; w++) {
    const int bits = 8 * (bytes - 4 * w);
    pack.word[w] &= bits >= 32 ? ~0u : bits <= 0 ? 0 : (1u << bits) - 1;
  }
  return pack;
}

// A floating-point type of C bits with EXPONENT of them for the exponent. Its bits, moved to where
// a double has them, are the number times 2^(bias - 1023), subnormal ones included: so decoding
// takes two or three operations on integers, on every architecture, where conversions to double are
// slow. What they are multiplied with is lifted by 2^800 in advance, so that nothing underflows,
// and the sum brought back by DROP. Infinities and NaN are not decoded; `finite` finds them.
template <class C, int EXPONENT>
struct Small {
  using Code = C;
  using Real = float;  // of vectors
  static constexpr int N = 16 / sizeof(C);  // numbers in a pack
  static constexpr int BITS = 8 * sizeof(C), PER_WORD = 32 / BITS, MANTISSA = BITS - 1 - EXPONENT;
  static constexpr int HIGH = MANTISSA < 20 ? MANTISSA : 20;  // its bits in a double's high word
  static constexpr int ROWS = sizeof(C) == 1 ? 16 : 8;        // of a product's item, in flight
  static constexpr double BIAS = EXPONENT == 4 ? 0x1p1016 : EXPONENT == 5 ? 0x1p1008 : 0x1p896;
  static constexpr double LIFT = 0x1p800, DROP = BIAS / LIFT;
  // The magnitudes from 2^(BITS - 1) - STEP on are no numbers; e4m3fn has but one of them.
  static constexpr unsigned STEP = EXPONENT == 4 ? 1 : 1u << MANTISSA;
  static constexpr unsigned SIGN = 1u << (BITS - 1), EVERY = ~0u / (2 * (SIGN - 1) + 1);

  // Number n of a pack, over BIAS.
  static __device__ double at(const Pack& pack, int n) {
    const unsigned top = pack.word[n / PER_WORD] << (32 - BITS - BITS * (n % PER_WORD));
    constexpr unsigned MASK = 1u << 31 | ((1u << (EXPONENT + HIGH)) - 1) << (20 - HIGH);
    unsigned low = 0;
    if constexpr (MANTISSA > HIGH) low = top << (32 - MANTISSA + HIGH);
    return __hiloint2double((int(top) >> (11 - EXPONENT)) & MASK, low);
  }
  static __device__ C code(const Pack& pack, int n) {
    return C(pack.word[n / PER_WORD] >> (BITS * (n % PER_WORD)));
  }
  static __device__ void put(Pack& pack, int n, C code) {
    pack.word[n / PER_WORD] |= unsigned(code) << (BITS * (n % PER_WORD));
  }
  static __device__ bool finite(const Pack& pack) {
    unsigned carried = 0;
#pragma unroll
    for (int w = 0; w < 4; w++)
      carried |= (pack.word[w] & (SIGN - 1) * EVERY) + STEP * EVERY;
    return !(carried & SIGN * EVERY);
  }
  static __device__ double decode(C code) {
    const Pack pack{{code}};
    return finite(pack) ? at(pack, 0) * BIAS : NAN;
  }
  // Rounds to nearest, ties to even; beyond the largest number lies infinity, or NaN.
  static __device__ C encode(double value) {
    const unsigned long long bits = __double_as_longlong(value / BIAS), one = 1;
    const unsigned long long magnitude = bits & ~(one << 63);
    constexpr int LOST = 52 - MANTISSA;
    unsigned long long code = magnitude + (one << (LOST - 1)) - 1 + (magnitude >> LOST & 1);
    code >>= LOST;
    if (!(code < SIGN - STEP)) code = SIGN - STEP;
    return C(code | (bits >> 63) << (BITS - 1));
  }
};

struct Float64 {
  using Code = unsigned long long;
  using Real = double;
  static constexpr int N = 2, ROWS = 8;
  static constexpr double LIFT = 1, DROP = 1;
  static __device__ double at(const Pack& pack, int n) {
    return __hiloint2double(pack.word[2 * n + 1], pack.word[2 * n]);
  }
  static __device__ Code code(const Pack& pack, int n) {
    return Code(pack.word[2 * n + 1]) << 32 | pack.word[2 * n];
  }
  static __device__ void put(Pack& pack, int n, Code code) {
    pack.word[2 * n] = unsigned(code);
    pack.word[2 * n + 1] = unsigned(code >> 32);
  }
  static __device__ bool finite(const Pack&) { return true; }  // `at` decodes the others too
  static __device__ double decode(Code code) { return __longlong_as_double(code); }
  static __device__ Code encode(double value) { return __double_as_longlong(value); }
};

using Float32 = Small<unsigned, 8>;
using BFloat16 = Small<unsigned short, 8>;
using Float16 = Small<unsigned short, 5>;
using Float8 = Small<unsigned char, 4>;

// --- hinv_times ---------------------------------------------------------------------------------

constexpr int ITEMS = 4096;  // into which a product is divided, about

// Columns of an item: whole blocks.
__device__ long long columns_of_item(int groups, long long d) {
  const long long blocks = d > 0 ? (d + BLOCK - 1) / BLOCK : 1, most = ITEMS / groups;
  const long long parts = most < 1 ? 1 : most < blocks ? most : blocks;
  return (blocks + parts - 1) / parts * BLOCK;
}

// k = Gx over the rows in use, but k_j = x^T x. An item is a few rows times a part of the columns;
// its sums go to `partial`, whose rows are then added up. No sum depends on the grid.
template <class F>
__global__ __launch_bounds__(THREADS) void window_times(
    const typename F::Code* __restrict__ G, const typename F::Real* __restrict__ x,
    const long long* __restrict__ count, const float* __restrict__ scales, int m, long long d,
    long long stride, double* __restrict__ partial, double* __restrict__ k) {
  constexpr int N = F::N, ROWS = F::ROWS;
  __shared__ double of_warp[WARPS][ROWS];
  const auto grid = cooperative_groups::this_grid();
  const Place place(count, m);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const long long span = columns_of_item((m + ROWS - 1) / ROWS, d);
  const long long blocks = (d + BLOCK - 1) / BLOCK;
  const int parts = int((d + span - 1) / span), groups = (place.rows + ROWS - 1) / ROWS;

  for (int item = blockIdx.x; item < groups * parts; item += gridDim.x) {
    const int part = item / groups, first = item % groups * ROWS;
    const long long begin = part * span, end = begin + span < d ? begin + span : d;
    const bool has_j = first <= place.j && place.j < first + ROWS;
    double sum[ROWS] = {}, own = 0;
    for (long long c = begin + threadIdx.x * N; c < end; c += THREADS * N) {
      const int left = end - c < N ? int(end - c) : N;
      Pack row[ROWS];  // all on their way before the first is used
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        row[r] = first + r < place.rows ? load(G + (first + r) * stride + c) : Pack{};
      double lifted[N];
#pragma unroll
      for (int n = 0; n < N; n++) lifted[n] = n < left ? double(x[c + n]) : 0;
      if (has_j) {
#pragma unroll
        for (int n = 0; n < N; n++) own += lifted[n] * lifted[n];
      }
#pragma unroll
      for (int n = 0; n < N; n++) lifted[n] *= F::LIFT;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (left < N) row[r] = first_bytes(row[r], left * int(sizeof(typename F::Code)));
        double of_pack = 0;
#pragma unroll
        for (int n = 0; n < N; n++) of_pack += F::at(row[r], n) * lifted[n];
        if (scales && first + r < place.rows)
          of_pack *= scales[(first + r) * blocks + c / BLOCK];
        sum[r] += F::finite(row[r]) ? of_pack : NAN;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const double total = sum_over_warp(first + r == place.j ? own : sum[r] * F::DROP);
      if (lane == 0) of_warp[warp][r] = total;
    }
    __syncthreads();
    if (threadIdx.x < ROWS && first + int(threadIdx.x) < place.rows) {
      double total = 0;
      for (int w = 0; w < WARPS; w++) total += of_warp[w][threadIdx.x];
      partial[(first + threadIdx.x) * size_t(parts) + part] = total;
    }
    __syncthreads();  // of_warp has been read
  }
  grid.sync();
  const auto row_of_partial = [=](int i) { return partial + i * size_t(parts); };
  const auto store_k = [=](int i, double y) { k[i] = y; };
  times(row_of_partial, place.rows, parts, [](int) { return 1.0; }, store_k);
  for (int i = place.rows + blockIdx.x * THREADS + threadIdx.x; i < m; i += gridDim.x * THREADS)
    k[i] = 0;
}

// --- hinv_transposed_times ----------------------------------------------------------------------

constexpr int LANES = 32;                // threads side by side in a row, a pack each
constexpr int RANKS = THREADS / LANES;   // threads that share a column: every so many rows are one's
constexpr int FLIGHT = 8;                // rows of a thread in flight

// u = G^T z over the rows in use, where row j first becomes `new_row` with `new_scales`, if they are
// given and accepted. A block has LANES packs of columns.
template <class F>
__global__ __launch_bounds__(THREADS, 2) void window_transposed_times(
    typename F::Code* G, const double* __restrict__ z, float* scales,
    const typename F::Code* __restrict__ new_row, const float* __restrict__ new_scales,
    const long long* __restrict__ count, const long long* __restrict__ accepted, int m,
    long long d, long long stride, typename F::Real* __restrict__ u) {
  constexpr int N = F::N;
  __shared__ double of_rank[N][THREADS + 1];
  const int lane = threadIdx.x % LANES, rank = threadIdx.x / LANES;
  const long long first = blockIdx.x * (long long)(LANES * N), c = first + lane * N;
  const long long blocks = (d + BLOCK - 1) / BLOCK;
  const int rows = count ? Place(count, m).rows : m;
  const int j = new_row && *accepted ? Place(count, m).j : -1;  // the row that is written
  if (j >= 0 && rank == j % RANKS && c < d) {
    Pack pack{};
#pragma unroll
    for (int n = 0; n < N; n++)
      if (c + n < d) F::put(pack, n, new_row[c + n]);
    store(G + j * stride + c, pack);
    if (scales && c % BLOCK == 0) scales[j * blocks + c / BLOCK] = new_scales[c / BLOCK];
  }
  double sum[N] = {};
  for (int i0 = rank; i0 < rows && c < d; i0 += FLIGHT * RANKS) {
    Pack row[FLIGHT];
    double weight[FLIGHT];
#pragma unroll
    for (int r = 0; r < FLIGHT; r++) {
      const int i = i0 + r * RANKS;
      row[r] = i < rows ? load(G + i * stride + c) : Pack{};
    }
#pragma unroll
    for (int r = 0; r < FLIGHT; r++) {
      const int i = i0 + r * RANKS;
      weight[r] = i < rows ? z[i] * F::LIFT : 0;
      if (scales && i < rows)
        weight[r] *= i == j ? new_scales[c / BLOCK] : scales[i * blocks + c / BLOCK];
    }
#pragma unroll
    for (int r = 0; r < FLIGHT; r++) {
#pragma unroll
      for (int n = 0; n < N; n++) sum[n] += F::at(row[r], n) * weight[r];
      if (!F::finite(row[r])) {
#pragma unroll
        for (int n = 0; n < N; n++)
          sum[n] += fabs(F::decode(F::code(row[r], n))) < INFINITY ? 0 : NAN;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; n++) of_rank[n][threadIdx.x] = sum[n];
  __syncthreads();
  for (int o = threadIdx.x; o < LANES * N && first + o < d; o += THREADS) {
    double total = 0;
    for (int r = 0; r < RANKS; r++) total += of_rank[o % N][r * LANES + o / N];
    u[first + o] = typename F::Real(total * F::DROP);
  }
}

// --- hinv_round -----------------------------------------------------------------------------------

// g (d,) as a row with a scale, a power of two, for every block of columns: `values` = row * scale.
// Where a block is not finite, neither are its scale and its values.
template <class F>
__global__ __launch_bounds__(THREADS) void round_row(const float* __restrict__ g, long long d,
                                                     typename F::Code* __restrict__ row,
                                                     float* __restrict__ scales,
                                                     float* __restrict__ values) {
  constexpr int TOP = sizeof(typename F::Code) == 1 ? 8 : 15;  // numbers of a row are at most 2^TOP
  const long long begin = blockIdx.x * (long long)(BLOCK);
  if (begin >= d) return;  // there are no columns
  const int columns = d - begin < BLOCK ? int(d - begin) : BLOCK;
  const double largest = reduce<1, true>(columns, [=](int c) {
    const double size = fabs(double(g[begin + c]));
    return Numbers<1>{{size < INFINITY ? size : INFINITY}};
  }).at[0];
  // largest < 2^exponent
  const int exponent = largest > 0 ? int(__double_as_longlong(largest) >> 52) - 1022 : 0;
  const int clamped = exponent - TOP < -120 ? -120 : exponent - TOP;
  const double power = __longlong_as_double((1023ll + (clamped > 120 ? 120 : clamped)) << 52);
  const double scale = largest < INFINITY ? power : NAN;
  for (int c = threadIdx.x; c < columns; c += THREADS) {
    const typename F::Code code = F::encode(g[begin + c] / scale);
    row[begin + c] = code;
    values[begin + c] = float(F::decode(code) * scale);
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = float(scale);
}

// --- compressed windows -------------------------------------------------------------------------
//
// columns, values (m, k): the columns of a row in order, the same number of them in each whole block
// of columns, so that a row's entries in a block lie in the same place in every row.

// How many entries a row has in each whole block: found in the first row.
__device__ int kept_in_block(const int* columns, long long k) {
  const auto in_first = [=](int e) { return Numbers<1>{{columns[e] < BLOCK ? 1.0 : 0.0}}; };
  return int(reduce<1>(k < BLOCK ? int(k) : BLOCK, in_first).at[0]);
}

constexpr int SHARE = 8;                              // threads that share a row
constexpr int ROUNDS = 4;                             // rows of a thread
constexpr int ABREAST = THREADS / SHARE;              // rows at once
constexpr int SPARSE_ROWS = ROUNDS * ABREAST;         // of an item
constexpr int SPARSE_PARTS = 128;                     // of the columns, at most
constexpr int VECTORS = 2;

// y (n, m) = G X^T over the rows in use, n <= VECTORS, for G with `new_columns` and `new_values` as
// row j. An item is a few rows times a part of the blocks of columns, whose part of X is gathered
// from shared memory.
template <class F>
__global__ __launch_bounds__(THREADS, 3) void sparse_times(
    const int* __restrict__ columns, const typename F::Code* __restrict__ values,
    const double* __restrict__ X, const int* __restrict__ new_columns,
    const typename F::Code* __restrict__ new_values, const long long* __restrict__ count, int n,
    int m, long long k, long long d, double* __restrict__ partial, double* __restrict__ y) {
  __shared__ double x[BLOCK];
  const auto grid = cooperative_groups::this_grid();
  const int j = Place(count, m).j, rows = Place(count, m).rows;
  const int kept = kept_in_block(new_columns, k);
  const int blocks = int((d + BLOCK - 1) / BLOCK);
  const int per_part = blocks > 0 ? (blocks + SPARSE_PARTS - 1) / SPARSE_PARTS : 1;
  const int parts = (blocks + per_part - 1) / per_part;
  const int groups = (rows + SPARSE_ROWS - 1) / SPARSE_ROWS;
  for (int item = blockIdx.x; item < groups * parts; item += gridDim.x) {
    const int part = item / groups;
    const int first = item % groups * SPARSE_ROWS + threadIdx.x / SHARE;
    double sum[VECTORS][ROUNDS] = {};
    for (int b = part * per_part; b < blocks && b < (part + 1) * per_part; b++) {
      const long long column = (long long)(b) * BLOCK, entry = (long long)(b) * kept;
      const int entries = k - entry < kept ? int(k - entry) : kept;
#pragma unroll
      for (int v = 0; v < VECTORS; v++) {
        if (v >= n) break;
        __syncthreads();  // x has been read
        for (int c = threadIdx.x; c < BLOCK && column + c < d; c += THREADS)
          x[c] = X[v * d + column + c];
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
          const int i = first + r * ABREAST;
          if (i >= rows) break;
          const int* const at = (i == j ? new_columns : columns + i * k) + entry;
          const typename F::Code* const code = (i == j ? new_values : values + i * k) + entry;
          for (int e = threadIdx.x % SHARE; e < entries; e += SHARE)
            sum[v][r] += F::decode(code[e]) * x[at[e] - column];
        }
      }
    }
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
#pragma unroll
      for (int r = 0; r < ROUNDS; r++) {
        double total = sum[v][r];
        for (int distance = SHARE / 2; distance > 0; distance /= 2)
          total += __shfl_xor_sync(0xffffffffu, total, distance);
        const int i = first + r * ABREAST;
        if (threadIdx.x % SHARE == 0 && v < n && i < rows)
          partial[(size_t(v) * rows + i) * parts + part] = total;
      }
    }
  }
  grid.sync();
  const auto row_of_partial = [=](int i) { return partial + i * size_t(parts); };
  const auto store_y = [=](int i, double sum) { y[i / rows * size_t(m) + i % rows] = sum; };
  times(row_of_partial, n * rows, parts, [](int) { return 1.0; }, store_y);
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < n * m; i += gridDim.x * THREADS)
    if (i % m >= rows) y[i] = 0;
}

constexpr int SPARSE_COLUMNS = 512;  // of a thread block: a part of a block of columns
constexpr int SPARSE_AHEAD = 8;      // rows of a warp in flight

// Where accepted, row j becomes `new_columns` and `new_values`, `error` becomes `new_error`, and
// u = G^T y + rest / damp. Where not, nothing changes and u is 0. Each warp adds up some of the rows
// in its own part of shared memory, one row after the other: within a row no two entries meet.
template <class F>
__global__ __launch_bounds__(THREADS, 2) void sparse_replace(
    int* columns, typename F::Code* values, const double* __restrict__ y,
    const int* __restrict__ new_columns, const typename F::Code* __restrict__ new_values,
    typename F::Real* __restrict__ error, const typename F::Real* __restrict__ new_error,
    const double* __restrict__ rest, const double* __restrict__ damp,
    const long long* __restrict__ count, const long long* __restrict__ accepted, int m,
    long long k, long long d, typename F::Real* __restrict__ u) {
  __shared__ double sums[WARPS][SPARSE_COLUMNS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int kept = kept_in_block(new_columns, k), j = Place(count, m).j;
  const long long first = blockIdx.x * (long long)(SPARSE_COLUMNS), entry = first / BLOCK * kept;
  const int entries = k - entry < kept ? int(k - entry) : kept;
  double* const sum = sums[warp];
  for (int c = lane; c < SPARSE_COLUMNS; c += WARP) sum[c] = 0;
  __syncwarp();

  // The first entry of a row, from that of this block of columns on, whose column is not below.
  const auto entry_at = [=](const int* row, long long column) {
    int low = 0, high = entries;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (row[middle] < column) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  for (int row0 = warp * WARP; row0 < m; row0 += THREADS) {
    // A lane a row: from which entry to which are its columns? Row j comes last.
    const bool has = row0 + lane < m && row0 + lane != j;
    const int* const row = columns + (row0 + lane) * k + entry;
    const int from = has ? entry_at(row, first) : 0;
    const int to = has ? entry_at(row, first + SPARSE_COLUMNS) : 0;
    for (int r0 = 0; r0 < WARP && row0 + r0 < m; r0 += SPARSE_AHEAD) {
      long long at[SPARSE_AHEAD];  // a lane's first entry
      int rest_of[SPARSE_AHEAD], column[SPARSE_AHEAD];
      double product[SPARSE_AHEAD];
#pragma unroll
      for (int r = 0; r < SPARSE_AHEAD; r++) {  // all on their way before the first is used
        const int i = row0 + r0 + r, e = __shfl_sync(0xffffffffu, from, r0 + r) + lane;
        rest_of[r] = __shfl_sync(0xffffffffu, to, r0 + r) - e;
        at[r] = i * k + entry + e;
        column[r] = rest_of[r] > 0 ? int(columns[at[r]] - first) : 0;
        product[r] = rest_of[r] > 0 ? F::decode(values[at[r]]) * y[i] : 0;
      }
#pragma unroll
      for (int r = 0; r < SPARSE_AHEAD; r++) {
        if (rest_of[r] > 0) sum[column[r]] += product[r];
        for (int e = WARP; e < rest_of[r]; e += WARP)
          sum[columns[at[r] + e] - first] += F::decode(values[at[r] + e]) * y[row0 + r0 + r];
        __syncwarp();  // the next row may have the same columns
      }
    }
  }
  if (*accepted && warp == 0) {
    const long long at = j * k + entry;
    const int to = entry_at(new_columns + entry, first + SPARSE_COLUMNS);
    for (int e = entry_at(new_columns + entry, first) + lane; e < to; e += WARP) {
      const int column = columns[at + e] = new_columns[entry + e];
      const typename F::Code code = values[at + e] = new_values[entry + e];
      sum[column - first] += F::decode(code) * y[j];
    }
  }
  __syncthreads();
  for (long long c = threadIdx.x; c < SPARSE_COLUMNS && first + c < d; c += THREADS) {
    double total = 0;
    for (int w = 0; w < WARPS; w++) total += sums[w][c];
    if (*accepted) error[first + c] = new_error[first + c];
    u[first + c] = *accepted ? typename F::Real(total + rest[first + c] / *damp) : 0;
  }
}

// --- hinv_largest ---------------------------------------------------------------------------------

// The sum of x over the threads of this block before this one.
__device__ int sum_before(int x) {
  __shared__ int of_warp[WARPS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int sum = x;
  for (int distance = 1; distance < WARP; distance *= 2) {
    const int other = __shfl_sync(0xffffffffu, sum, (lane - distance) & (WARP - 1));
    if (lane >= distance) sum += other;
  }
  if (lane == WARP - 1) of_warp[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; w++) sum += of_warp[w];
  return sum - x;
}

// What a compressed window keeps of a = error + g (d,): in each block of columns as many entries as
// are `kept`, fewer in the last, those of the largest magnitude, of equal ones the first. They are
// `columns` and `values` (k,), X (2, d) has them and g less them, which may be far larger than g, and
// `new_error` is a less them.
template <class F>
__global__ __launch_bounds__(THREADS) void largest_entries(
    const typename F::Real* __restrict__ error, const typename F::Real* __restrict__ g, int kept,
    long long k, long long d, int* __restrict__ columns, typename F::Code* __restrict__ values,
    typename F::Real* __restrict__ new_error, double* __restrict__ X) {
  using Real = typename F::Real;
  constexpr int EACH = BLOCK / THREADS, LOWEST = sizeof(Real) == 4 ? 29 : 0;  // bit that floats use
  const long long begin = blockIdx.x * (long long)(BLOCK) + threadIdx.x * EACH;
  const long long entry = blockIdx.x * (long long)(kept);
  const int entries = k - entry < kept ? int(k - entry) : kept;
  long long size[EACH];  // bits of the magnitude, which are in its order, NaN above all
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const double a = begin + n < d ? double(Real(error[begin + n] + g[begin + n])) : 0;
    size[n] = begin + n < d ? __double_as_longlong(fabs(a)) : -1;
  }
  const auto larger_than = [&](long long bound) {
    int found = 0;
#pragma unroll
    for (int n = 0; n < EACH; n++) found += size[n] > bound;
    return found;
  };
  long long threshold = 0;  // becomes the size of the last entry that is kept
  for (int bit = 62; bit >= LOWEST; bit--) {
    const long long candidate = threshold | 1ll << bit;
    const int own = larger_than(candidate - 1);
    if (reduce<1>(THREADS, [=](int) { return Numbers<1>{{double(own)}}; }).at[0] >= entries)
      threshold = candidate;
    __syncthreads();  // the sum has been read
  }
  const int above = larger_than(threshold), equal = larger_than(threshold - 1) - above;
  const auto of_thread = [=](int) { return Numbers<1>{{double(above)}}; };
  const int spare = entries - int(reduce<1>(THREADS, of_thread).at[0]);  // places of equal ones
  int above_before = sum_before(above);
  __syncthreads();  // the sums of warps have been read
  int equal_before = sum_before(equal);
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const long long c = begin + n;
    if (c >= d) break;
    const Real a = error[c] + g[c];
    const bool larger = size[n] > threshold, same = size[n] == threshold;
    Real value = 0;
    if (larger || (same && equal_before < spare)) {
      const long long place = entry + above_before + (equal_before < spare ? equal_before : spare);
      const typename F::Code code = F::encode(a);
      columns[place] = int(c);
      values[place] = code;
      value = Real(F::decode(code));
    }
    above_before += larger;
    equal_before += same;
    new_error[c] = a - value;
    X[c] = value;
    X[d + c] = double(g[c]) - value;
  }
}

#ifndef __CUDACC_RTC__

// call(F()) for number `format` of the types that have no scales.
template <class Call>
cudaError_t with_plain_format(int format, Call call) {
  switch (format) {
    case 0: return call(Float32());
    case 1: return call(BFloat16());
    case 3: return call(Float64());
    default: return cudaErrorInvalidValue;
  }
}

// The same for all types of windows.
template <class Call>
cudaError_t with_format(int format, Call call) {
  switch (format) {
    case 2: return call(Float16());
    case 4: return call(Float8());
    default: return with_plain_format(format, call);
  }
}

// A cooperative launch of at most `blocks` blocks.
template <class... Parameters, class... Arguments>
cudaError_t launch_together(void (*kernel)(Parameters...), int blocks, cudaStream_t stream,
                            Arguments... arguments) {
  int resident = 0;
  const cudaError_t error = resident_blocks(kernel, THREADS, &resident);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(std::min(blocks, resident)), THREADS, true, stream, arguments...);
}

#endif

}  // namespace

#ifndef __CUDACC_RTC__

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

// P, K (m, m), k, z (m,), count, damp (), error (1,), accepted (). scratch: 5 m numbers.
cudaError_t hinv_update(double* P, double* K, const double* k, const long long* count,
                        const double* damp, int m, double tolerance, double* z, double* error,
                        long long* accepted, double* scratch, cudaStream_t stream) {
  return launch_together(exchange, ceil_div(m, WARPS), stream, P, K, k, count, damp, m, tolerance,
                         z, error, accepted, scratch);
}

// format: 0 float32, 1 bfloat16, 2 float16, 3 float64, 4 float8_e4m3fn. G (m, d), rows `stride`
// apart, each on 16 bytes. x (d,) and u (d,): float, or double for float64. scales (m, blocks of
// 4,096 columns) or null.

// k (m,). scratch: max(65536, m) numbers.
cudaError_t hinv_times(int format, const void* G, const void* x, const long long* count,
                       const float* scales, int m, long long d, long long stride, double* scratch,
                       double* k, cudaStream_t stream) {
  return with_format(format, [=](auto f) {
    using F = decltype(f);
    const int blocks = std::max(ITEMS, ceil_div(m, F::ROWS));
    return launch_together(window_times<F>, blocks, stream,
                           static_cast<const typename F::Code*>(G),
                           static_cast<const typename F::Real*>(x), count, scales, m, d, stride,
                           scratch, k);
  });
}

// z (m,). new_row (d,) of G's type and new_scales, if G has scales, with accepted (), or null.
// count () or null: all rows are in use.
cudaError_t hinv_transposed_times(int format, void* G, const double* z, float* scales,
                                  const void* new_row, const float* new_scales,
                                  const long long* count, const long long* accepted, int m,
                                  long long d, long long stride, void* u, cudaStream_t stream) {
  return with_format(format, [=](auto f) {
    using F = decltype(f);
    const dim3 grid(std::max(1, ceil_div(d, LANES * F::N)));
    return launch(window_transposed_times<F>, grid, THREADS, false, stream,
                  static_cast<typename F::Code*>(G), z, scales,
                  static_cast<const typename F::Code*>(new_row), new_scales, count, accepted, m, d,
                  stride, static_cast<typename F::Real*>(u));
  });
}

// format: 2 float16 or 4 float8_e4m3fn. g, row, values (d,), scales a block of columns each.
cudaError_t hinv_round(int format, const float* g, long long d, void* row, float* scales,
                       float* values, cudaStream_t stream) {
  const dim3 grid(std::max(1, ceil_div(d, BLOCK)));
  const auto start = [=](auto f) {
    using F = decltype(f);
    return launch(round_row<F>, grid, THREADS, false, stream, g, d,
                  static_cast<typename F::Code*>(row), scales, values);
  };
  return format == 2 ? start(Float16()) : format == 4 ? start(Float8()) : cudaErrorInvalidValue;
}

// error, g, new_error (d,), X (2, d), columns, values (k,). `kept` entries of a whole block.
cudaError_t hinv_largest(int format, const void* error, const void* g, int kept, long long k,
                         long long d, int* columns, void* values, void* new_error, double* X,
                         cudaStream_t stream) {
  return with_plain_format(format, [=](auto f) {
    using F = decltype(f);
    using Real = typename F::Real;
    const dim3 grid(std::max(1, ceil_div(d, BLOCK)));
    return launch(largest_entries<F>, grid, THREADS, false, stream,
                  static_cast<const Real*>(error), static_cast<const Real*>(g), kept, k, d, columns,
                  static_cast<typename F::Code*>(values), static_cast<Real*>(new_error), X);
  });
}

// columns, values (m, k), new_columns, new_values (k,). X (n, d) with n <= 2, y (n, m). scratch:
// 128 n m numbers.
cudaError_t hinv_sparse_times(int format, const int* columns, const void* values, const double* X,
                              const int* new_columns, const void* new_values,
                              const long long* count, int n, int m, long long k, long long d,
                              double* scratch, double* y, cudaStream_t stream) {
  return with_plain_format(format, [=](auto f) {
    using F = decltype(f);
    const int blocks = std::max(SPARSE_PARTS * ceil_div(m, SPARSE_ROWS), 1);
    return launch_together(sparse_times<F>, blocks, stream, columns,
                           static_cast<const typename F::Code*>(values), X, new_columns,
                           static_cast<const typename F::Code*>(new_values), count, n, m, k, d,
                           scratch, y);
  });
}

// y (m,), new_columns, new_values (k,), error, new_error, rest, u (d,), damp, count, accepted ().
cudaError_t hinv_sparse_replace(int format, int* columns, void* values, const double* y,
                                const int* new_columns, const void* new_values,
                                void* error, const void* new_error, const double* rest,
                                const double* damp, const long long* count,
                                const long long* accepted, int m, long long k,
                                long long d, void* u, cudaStream_t stream) {
  return with_plain_format(format, [=](auto f) {
    using F = decltype(f);
    using Real = typename F::Real;
    const dim3 grid(std::max(1, ceil_div(d, SPARSE_COLUMNS)));
    return launch(sparse_replace<F>, grid, THREADS, false, stream, columns,
                  static_cast<typename F::Code*>(values), y, new_columns,
                  static_cast<const typename F::Code*>(new_values), static_cast<Real*>(error),
                  static_cast<const Real*>(new_error), rest, damp, count, accepted, m, k, d,
                  static_cast<Real*>(u));
  });
}

}  // extern "C"

#endif
