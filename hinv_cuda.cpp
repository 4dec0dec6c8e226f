// The Python module hinv_cuda: checks arguments, then runs the kernels of hinv_cuda_kernel.cu on
// the device of the tensors and the current stream. Nothing here waits for the device.
//
// m gradients; all tensors contiguous and on one CUDA device. N is strictly lower triangular,
// N_ik = D_ki / q_k, with q = diag(D) + m.
//
//   hinv_setup(tmp, coef) -> coef                                          float32 or float64
//       tmp   (m, m)  N in its strict lower triangle; the rest is not read
//       coef  (m, m)  on entry c on its diagonal, usually 1/damp, nowhere 0; the strict lower
//                     triangle is not read. On return B = (I + N)^-1 diag(c), row by row
//                     B_i = coef_i - sum_{k<i} N_ik B_k. What is above the diagonal stays.
//   hinv_mul(rows, D, t) -> t                                              float32 or float64
//       rows          gradients in use, 0 <= rows <= m: entries of t from there on stay
//       D     (m, m)  its upper triangle; the rest is not read
//       t     (m,) or (n, m), a right-hand side a row; in place
//                     t_i <- t_i - sum_{k<i} D_ki t_k / q_k
//   hinv_update(P, K, k, count, damp, tolerance, z, error, accepted) -> None    float64
//       P     (m, m)  A^-1, A = K + m damp I, symmetric; in place, the inverse of the new A
//       K     (m, m)  symmetric; in place: row and column j = count % m become k
//       k     (m,)    products of the new gradient with all m, itself included
//       count ()      int64: gradients seen before
//       damp  ()      lambda > 0
//       tolerance     the largest error with which the gradient is accepted
//       z     (m,)    output: column j of the new P
//       error (1,)    output: by how much m G^T z may be off, relatively; NaN where k_j is not finite,
//                     infinite where A is not positive definite
//       accepted ()   int64, output: 1, or 0 where the error is not within tolerance: P and K then
//                     stay as they are, and z is 0
//
// A window G (m, d) is of float32, bfloat16, float16, float64 or float8_e4m3fn, each row contiguous
// and on 16 bytes. Numbers of d columns ("vectors") are float32, or float64 for float64. A number is
// scales[row, column / 4096] times what is stored; no scales: 1. The rows in use are the first
// min(count + 1, m). Products are exact, sums float64, the same on every device.
//
//   hinv_times(G, x, count, scales=None) -> k (m,)                          float64
//       Gx over the rows in use, 0 elsewhere; but k_j = x^T x
//   hinv_transposed_times(G, z, scales=None, row=None, row_scales=None, count=None, accepted=None)
//       -> u (d,)
//       G^T z over the rows in use, or over all without a count; with a row (d,) of G's type, that
//       and its scales first become row j, where accepted is not 0. A vector, rounded once
//   hinv_round(g, G) -> row, scales, values
//       a vector g as a row of G, float16 or float8_e4m3fn, with the power of two for each block
//       with which it is most exact, and the vector row * scales
//
// Of a compressed window, columns (m, k), int32 and increasing, and values (m, k), as many of them
// in each whole block of 4,096.
//
//   hinv_largest(error, g, values, kept) -> columns, row, new_error, X
//       the largest entries of error + g, `kept` in each whole block of columns, with their values
//       in the type of `values` (k,); X (2, d), float64: the vector that has them, and g less it
//   hinv_sparse_times(columns, values, X, count, row_columns, row) -> (n, m)          float64
//       X G^T over the rows in use, 0 elsewhere, for vectors X (n, d), float64, n <= 2, with the new
//       row as row j of G
//   hinv_sparse_replace(columns, values, y, error, row_columns, row, new_error, rest, damp, count,
//       accepted) -> u (d,)
//       the new row becomes row j, and new_error the error; u is G^T y + rest / damp, for a rest in
//       float64. Where accepted is 0, nothing changes and u is 0
//
// All are registered as torch.ops.hinv_cuda, those with outputs among the arguments without return
// values, so that fake tensors and torch.compile know them.

// torch/extension.h would be enough, and four times as long to compile.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <climits>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

extern "C" {
cudaError_t hinv_setup_float(const float*, float*, float*, int, cudaStream_t);
cudaError_t hinv_setup_double(const double*, double*, double*, int, cudaStream_t);
cudaError_t hinv_mul_float(const float*, float*, int, int, int, cudaStream_t);
cudaError_t hinv_mul_double(const double*, double*, int, int, int, cudaStream_t);
cudaError_t hinv_update(double*, double*, const double*, const long long*, const double*, int,
                        double, double*, double*, long long*, double*, cudaStream_t);
cudaError_t hinv_times(int, const void*, const void*, const long long*, const float*, int, long long,
                       long long, double*, double*, cudaStream_t);
cudaError_t hinv_transposed_times(int, void*, const double*, float*, const void*, const float*,
                                  const long long*, const long long*, int, long long, long long,
                                  void*, cudaStream_t);
cudaError_t hinv_round(int, const float*, long long, void*, float*, float*, cudaStream_t);
cudaError_t hinv_largest(int, const void*, const void*, int, long long, long long, int*, void*,
                         void*, double*, cudaStream_t);
cudaError_t hinv_sparse_times(int, const int*, const void*, const double*, const int*, const void*,
                              const long long*, int, int, long long, long long, double*, double*,
                              cudaStream_t);
cudaError_t hinv_sparse_replace(int, int*, void*, const double*, const int*, const void*, void*,
                                const void*, const double*, const double*, const long long*,
                                const long long*, int, long long, long long, void*, cudaStream_t);
}

namespace {

using at::ScalarType;
using at::Tensor;
using Optional = std::optional<Tensor>;

// Messages are made of strings: a stream that prints a number may crash where the compiler links a
// libstdc++ of its own into the extension.
std::string text(const std::string& string) { return string; }
std::string text(int64_t number) { return std::to_string(number); }
std::string text(at::Device device) { return device.str(); }
std::string text(ScalarType type) { return c10::toString(type); }
std::string text(at::IntArrayRef shape) {
  std::string list;
  for (const int64_t size : shape) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "(" + list + (shape.size() == 1 ? ",)" : ")");
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) TORCH_CHECK(false, (text(parts) + ...));
}

void check(const Tensor& tensor, const char* name, at::IntArrayRef shape, const Tensor& like,
           ScalarType type) {
  require(tensor.is_cuda(), name, " is on ", tensor.device(),
          "; hinv_cuda works on CUDA tensors, use torch operations for others");
  require(tensor.device() == like.device(), name, " is on ", tensor.device(), " and others on ",
          like.device(), "; they must be on one device");
  require(tensor.scalar_type() == type, name, " is ", tensor.scalar_type(), "; it must be ", type);
  require(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), "; it must be ", shape);
  require(tensor.is_contiguous(), name, " is not contiguous; call .contiguous() first");
}

// m of an (m, m) matrix of float32, where that is allowed, or float64.
int64_t check_square(const Tensor& tensor, const char* name, bool float32) {
  require(tensor.dim() == 2 && tensor.size(0) >= 1 && tensor.size(0) <= INT_MAX / 2, name,
          " has shape ", tensor.sizes(), "; it must be (m, m) with m of at least 1");
  const auto type = tensor.scalar_type();
  require(type == at::kDouble || (float32 && type == at::kFloat), name, " is ", type,
          "; it must be ", float32 ? "float32 or float64" : "float64");
  const int64_t m = tensor.size(0);
  check(tensor, name, {m, m}, tensor, type);
  return m;
}

void hinv_setup(const Tensor& tmp, const Tensor& coef) {
  const int64_t m = check_square(tmp, "tmp", true);
  check(coef, "coef", {m, m}, tmp, tmp.scalar_type());
  require(!coef.is_alias_of(tmp), "coef and tmp share memory; they must not");
  const c10::cuda::CUDAGuard guard(tmp.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor scratch = at::empty({m * m / 4}, tmp.options());
  if (tmp.scalar_type() == at::kFloat) {
    C10_CUDA_CHECK(hinv_setup_float(tmp.const_data_ptr<float>(), coef.mutable_data_ptr<float>(),
                                    scratch.mutable_data_ptr<float>(), m, stream));
  } else {
    C10_CUDA_CHECK(hinv_setup_double(tmp.const_data_ptr<double>(), coef.mutable_data_ptr<double>(),
                                     scratch.mutable_data_ptr<double>(), m, stream));
  }
}

void hinv_mul(int64_t rows, const Tensor& D, const Tensor& t) {
  const int64_t m = check_square(D, "D", true);
  require(0 <= rows && rows <= m, "rows is ", rows, "; it must be from 0 to m = ", m);
  require(t.dim() == 1 || t.dim() == 2, "t has shape ", t.sizes(), "; it must be (", m,
          ",) or (n, ", m, ")");
  const int64_t n = t.dim() == 1 ? 1 : t.size(0);
  const auto shape = t.dim() == 1 ? std::vector<int64_t>{m} : std::vector<int64_t>{n, m};
  check(t, "t", shape, D, D.scalar_type());
  require(!t.is_alias_of(D), "t and D share memory; they must not");
  require(n <= INT_MAX / 2, "t has ", n, " rows; that is too many");
  const c10::cuda::CUDAGuard guard(D.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (D.scalar_type() == at::kFloat) {
    C10_CUDA_CHECK(hinv_mul_float(D.const_data_ptr<float>(), t.mutable_data_ptr<float>(), m, rows,
                                  n, stream));
  } else {
    C10_CUDA_CHECK(hinv_mul_double(D.const_data_ptr<double>(), t.mutable_data_ptr<double>(), m,
                                   rows, n, stream));
  }
}

using Count = long long;  // int64 of torch may be another type of 64 bits

const Count* number(const Tensor& tensor, const char* name, const Tensor& like) {
  check(tensor, name, {}, like, at::kLong);
  return static_cast<const Count*>(tensor.const_data_ptr());
}

void update(const Tensor& P, const Tensor& K, const Tensor& k, const Tensor& count,
            const Tensor& damp, double tolerance, const Tensor& z, const Tensor& error,
            const Tensor& accepted) {
  const int64_t m = check_square(P, "P", false);
  check(K, "K", {m, m}, P, at::kDouble);
  check(k, "k", {m}, P, at::kDouble);
  check(z, "z", {m}, P, at::kDouble);
  check(error, "error", {1}, P, at::kDouble);
  check(accepted, "accepted", {}, P, at::kLong);
  const Count* const seen = number(count, "count", P);
  check(damp, "damp", {}, P, at::kDouble);
  const Tensor tensors[] = {P, K, k, z, error, count, damp, accepted};
  for (const Tensor& a : tensors) {
    for (const Tensor& b : tensors)
      require(&a == &b || !a.is_alias_of(b),
              "Two of P, K, k, z, error, count, damp, accepted share memory; they must not");
  }
  const c10::cuda::CUDAGuard guard(P.device());
  const Tensor scratch = at::empty({5 * m}, P.options());
  C10_CUDA_CHECK(hinv_update(
      P.mutable_data_ptr<double>(), K.mutable_data_ptr<double>(), k.const_data_ptr<double>(), seen,
      damp.const_data_ptr<double>(), m, tolerance, z.mutable_data_ptr<double>(),
      error.mutable_data_ptr<double>(),
      static_cast<Count*>(accepted.mutable_data_ptr()), scratch.mutable_data_ptr<double>(),
      c10::cuda::getCurrentCUDAStream()));
}

// The number of a window's type for the kernels.
int format(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    case at::kDouble: return 3;
    case at::kFloat8_e4m3fn: return 4;
    default:
      require(false, name, " is ", tensor.scalar_type(),
              "; it must be float32, bfloat16, float16, float64 or float8_e4m3fn");
      return -1;
  }
}

// The same for the values of a compressed window, which have no scales.
int compressed_format(const Tensor& values) {
  const int type = format(values, "values");
  require(type != 2 && type != 4, "values is ", values.scalar_type(),
          "; it must be float32, bfloat16 or float64");
  return type;
}

ScalarType real(const Tensor& window) {
  return window.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A window, with the scales that may come with it.
struct Window {
  int type;
  int64_t m, d, stride;
  float* scales;

  Window(const Tensor& G, const Optional& scale) : type(format(G, "G")), scales(nullptr) {
    require(G.is_cuda(), "G is on ", G.device(),
            "; hinv_cuda works on CUDA tensors, use torch operations for others");
    require(G.dim() == 2 && G.size(0) >= 1 && G.size(0) <= INT_MAX / 2, "G has shape ", G.sizes(),
            "; it must be (m, d) with m of at least 1");
    m = G.size(0), d = G.size(1), stride = G.stride(0);
    const int64_t item = G.element_size(), packed = (d * item + 15) / 16 * 16;
    const auto start = reinterpret_cast<uintptr_t>(G.const_data_ptr());
    const int64_t end = ((m - 1) * stride + G.storage_offset()) * item + packed;
    require(d == 0 || (G.stride(1) == 1 && start % 16 == 0 && stride * item % 16 == 0 &&
                       stride * item >= packed && end <= int64_t(G.storage().nbytes())),
            "G has strides ", G.strides(), " and starts at ", int64_t(start % 16),
            " modulo 16 bytes; each row must be contiguous, and padded to 16 bytes");
    if (!scale) return;
    check(*scale, "scales", {m, (d + 4095) / 4096}, G, at::kFloat);
    scales = scale->mutable_data_ptr<float>();
  }
};

Tensor times(const Tensor& G, const Tensor& x, const Tensor& count, const Optional& scales) {
  const Window w(G, scales);
  check(x, "x", {w.d}, G, real(G));
  const Count* const seen = number(count, "count", G);
  const c10::cuda::CUDAGuard guard(G.device());
  const Tensor k = at::empty({w.m}, G.options().dtype(at::kDouble));
  const Tensor scratch = at::empty({std::max<int64_t>(65536, w.m)}, k.options());
  C10_CUDA_CHECK(hinv_times(w.type, G.const_data_ptr(), x.const_data_ptr(), seen, w.scales, w.m,
                            w.d, w.stride, scratch.mutable_data_ptr<double>(),
                            k.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
  return k;
}

Tensor transposed_times(const Tensor& G, const Tensor& z, const Optional& scales,
                        const Optional& row, const Optional& row_scales, const Optional& count,
                        const Optional& accepted) {
  const Window w(G, scales);
  check(z, "z", {w.m}, G, at::kDouble);
  if (row) check(*row, "row", {w.d}, G, G.scalar_type());
  require(!row || (count && accepted), "row is given without count and accepted; it needs both");
  require(bool(row_scales) == (row && scales), "row_scales must be given where row and scales are");
  if (row_scales) check(*row_scales, "row_scales", {(w.d + 4095) / 4096}, G, at::kFloat);
  const Count* const seen = count ? number(*count, "count", G) : nullptr;
  const Count* const write = accepted ? number(*accepted, "accepted", G) : nullptr;
  const c10::cuda::CUDAGuard guard(G.device());
  const Tensor u = at::empty({w.d}, G.options().dtype(real(G)));
  C10_CUDA_CHECK(hinv_transposed_times(
      w.type, G.mutable_data_ptr(), z.const_data_ptr<double>(), w.scales,
      row ? row->const_data_ptr() : nullptr,
      row_scales ? row_scales->const_data_ptr<float>() : nullptr, seen, write, w.m, w.d, w.stride,
      u.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return u;
}

std::tuple<Tensor, Tensor, Tensor> round_row(const Tensor& g, const Tensor& G) {
  const int type = format(G, "G");
  require(type == 2 || type == 4, "G is ", G.scalar_type(),
          "; it must be float16 or float8_e4m3fn");
  const int64_t d = g.numel();
  require(g.is_cuda() && g.dim() == 1, "g has shape ", g.sizes(), " on ", g.device(),
          "; it must be (d,) on CUDA");
  check(g, "g", {d}, g, at::kFloat);
  const c10::cuda::CUDAGuard guard(g.device());
  const Tensor row = at::empty({d}, g.options().dtype(G.scalar_type()));
  const Tensor scales = at::empty({(d + 4095) / 4096}, g.options());
  const Tensor values = at::empty({d}, g.options());
  C10_CUDA_CHECK(hinv_round(type, g.const_data_ptr<float>(), d, row.mutable_data_ptr(),
                            scales.mutable_data_ptr<float>(), values.mutable_data_ptr<float>(),
                            c10::cuda::getCurrentCUDAStream()));
  return {row, scales, values};
}

void check_compressed(const Tensor& columns, const Tensor& values) {
  require(values.dim() == 2 && values.size(0) >= 1 && values.size(0) <= INT_MAX / 2,
          "values has shape ", values.sizes(), "; it must be (m, k) with m of at least 1");
  check(values, "values", values.sizes(), values, values.scalar_type());
  check(columns, "columns", values.sizes(), values, at::kInt);
}

void check_row(const Tensor& columns, const Tensor& row, const Tensor& values) {
  check(columns, "row_columns", {values.size(1)}, values, at::kInt);
  check(row, "row", {values.size(1)}, values, values.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> largest(const Tensor& error, const Tensor& g,
                                                   const Tensor& values, int64_t kept) {
  const int type = compressed_format(values);
  const int64_t d = error.numel();
  require(values.dim() == 2, "values has shape ", values.sizes(), "; it must be (m, k)");
  const int64_t k = values.size(1), blocks = (d + 4095) / 4096, rest = k - (blocks - 1) * kept;
  check(error, "error", {d}, values, real(values));
  check(g, "g", {d}, values, real(values));
  require(d <= INT_MAX, "error has ", d, " entries; it must have 2^31 - 1 at most");
  const bool divided = kept <= 4096 && rest >= 1 && rest <= kept && rest <= d - (blocks - 1) * 4096;
  require(d == 0 ? k == 0 : divided, "kept is ", kept, " for ", k, " entries of ", d,
          " columns; every block must have some of them");
  const c10::cuda::CUDAGuard guard(values.device());
  const Tensor columns = at::empty({k}, values.options().dtype(at::kInt));
  const Tensor row = at::empty({k}, values.options());
  const Tensor new_error = at::empty({d}, error.options());
  const Tensor X = at::empty({2, d}, error.options().dtype(at::kDouble));
  C10_CUDA_CHECK(hinv_largest(type, error.const_data_ptr(), g.const_data_ptr(), kept, k, d,
                              columns.mutable_data_ptr<int>(), row.mutable_data_ptr(),
                              new_error.mutable_data_ptr(), X.mutable_data_ptr<double>(),
                              c10::cuda::getCurrentCUDAStream()));
  return {columns, row, new_error, X};
}

Tensor sparse_times(const Tensor& columns, const Tensor& values, const Tensor& X,
                    const Tensor& count, const Tensor& row_columns, const Tensor& row) {
  const int type = compressed_format(values);
  check_compressed(columns, values);
  check_row(row_columns, row, values);
  require(X.dim() == 2 && (X.size(0) == 1 || X.size(0) == 2), "X has shape ", X.sizes(),
          "; it must be (1, d) or (2, d)");
  check(X, "X", X.sizes(), values, at::kDouble);
  const Count* const seen = number(count, "count", values);
  const int64_t m = values.size(0), n = X.size(0);
  const c10::cuda::CUDAGuard guard(values.device());
  const Tensor y = at::empty({n, m}, values.options().dtype(at::kDouble));
  const Tensor scratch = at::empty({128 * n * m}, y.options());
  C10_CUDA_CHECK(hinv_sparse_times(
      type, columns.const_data_ptr<int>(), values.const_data_ptr(), X.const_data_ptr<double>(),
      row_columns.const_data_ptr<int>(), row.const_data_ptr(), seen, n, m, values.size(1),
      X.size(1), scratch.mutable_data_ptr<double>(), y.mutable_data_ptr<double>(),
      c10::cuda::getCurrentCUDAStream()));
  return y;
}

Tensor sparse_replace(const Tensor& columns, const Tensor& values, const Tensor& y,
                      const Tensor& error, const Tensor& row_columns, const Tensor& row,
                      const Tensor& new_error, const Tensor& rest, const Tensor& damp,
                      const Tensor& count, const Tensor& accepted) {
  const int type = compressed_format(values);
  const int64_t d = error.numel();
  check_compressed(columns, values);
  check_row(row_columns, row, values);
  check(y, "y", {values.size(0)}, values, at::kDouble);
  check(error, "error", {d}, values, real(values));
  check(new_error, "new_error", {d}, values, real(values));
  check(rest, "rest", {d}, values, at::kDouble);
  check(damp, "damp", {}, values, at::kDouble);
  const Count* const seen = number(count, "count", values);
  const Count* const write = number(accepted, "accepted", values);
  const c10::cuda::CUDAGuard guard(values.device());
  const Tensor u = at::empty({d}, values.options().dtype(real(values)));
  C10_CUDA_CHECK(hinv_sparse_replace(
      type, columns.mutable_data_ptr<int>(), values.mutable_data_ptr(), y.const_data_ptr<double>(),
      row_columns.const_data_ptr<int>(), row.const_data_ptr(), error.mutable_data_ptr(),
      new_error.const_data_ptr(), rest.const_data_ptr<double>(), damp.const_data_ptr<double>(),
      seen, write, values.size(0), values.size(1), d, u.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream()));
  return u;
}

}  // namespace

TORCH_LIBRARY(hinv_cuda, library) {
  library.def("hinv_setup(Tensor tmp, Tensor(a!) coef) -> ()");
  library.def("hinv_mul(int rows, Tensor D, Tensor(a!) t) -> ()");
  library.def(
      "hinv_update(Tensor(a!) P, Tensor(b!) K, Tensor k, Tensor count, Tensor damp, float tolerance, "
      "Tensor(c!) z, Tensor(d!) error, Tensor(e!) accepted) -> ()");
  library.def("hinv_times(Tensor G, Tensor x, Tensor count, Tensor? scales=None) -> Tensor");
  library.def(
      "hinv_transposed_times(Tensor(a!) G, Tensor z, Tensor(b!)? scales=None, Tensor? row=None, "
      "Tensor? row_scales=None, Tensor? count=None, Tensor? accepted=None) -> Tensor");
  library.def("hinv_round(Tensor g, Tensor G) -> (Tensor, Tensor, Tensor)");
  library.def(
      "hinv_largest(Tensor error, Tensor g, Tensor values, int kept) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "hinv_sparse_times(Tensor columns, Tensor values, Tensor X, Tensor count, "
      "Tensor row_columns, Tensor row) -> Tensor");
  library.def(
      "hinv_sparse_replace(Tensor(a!) columns, Tensor(b!) values, Tensor y, Tensor(c!) error, "
      "Tensor row_columns, Tensor row, Tensor new_error, Tensor rest, Tensor damp, Tensor count, "
      "Tensor accepted) -> Tensor");
}
// For every device, so that a tensor elsewhere meets the checks above and their messages.
TORCH_LIBRARY_IMPL(hinv_cuda, CompositeExplicitAutograd, library) {
  library.impl("hinv_setup", hinv_setup);
  library.impl("hinv_mul", hinv_mul);
  library.impl("hinv_update", update);
  library.impl("hinv_times", times);
  library.impl("hinv_transposed_times", transposed_times);
  library.impl("hinv_round", round_row);
  library.impl("hinv_largest", largest);
  library.impl("hinv_sparse_replace", sparse_replace);
  library.impl("hinv_sparse_times", sparse_times);
}
// Fake tensors: what is returned has a shape and a type.
TORCH_LIBRARY_IMPL(hinv_cuda, Meta, library) {
  library.impl("hinv_setup", [](const Tensor&, const Tensor&) {});
  library.impl("hinv_mul", [](int64_t, const Tensor&, const Tensor&) {});
  library.impl("hinv_update",
               [](const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                  const Tensor&, const Tensor&, const Tensor&) {});
  library.impl("hinv_times", [](const Tensor& G, const Tensor&, const Tensor&, const Optional&) {
    return at::empty({G.size(0)}, G.options().dtype(at::kDouble));
  });
  library.impl("hinv_transposed_times",
               [](const Tensor& G, const Tensor&, const Optional&, const Optional&,
                  const Optional&, const Optional&, const Optional&) {
                 return at::empty({G.size(1)}, G.options().dtype(real(G)));
               });
  library.impl("hinv_round", [](const Tensor& g, const Tensor& G) {
    const int64_t blocks = (g.size(0) + 4095) / 4096;
    return std::tuple(at::empty(g.sizes(), g.options().dtype(G.scalar_type())),
                      at::empty({blocks}, g.options()), at::empty(g.sizes(), g.options()));
  });
  library.impl("hinv_largest", [](const Tensor& error, const Tensor&, const Tensor& values,
                                  int64_t) {
    const int64_t k = values.size(1);
    return std::tuple(at::empty({k}, values.options().dtype(at::kInt)),
                      at::empty({k}, values.options()), at::empty(error.sizes(), error.options()),
                      at::empty({2, error.size(0)}, error.options().dtype(at::kDouble)));
  });
  library.impl("hinv_sparse_times", [](const Tensor&, const Tensor& values, const Tensor& X,
                                       const Tensor&, const Tensor&, const Tensor&) {
    return at::empty({X.size(0), values.size(0)}, values.options().dtype(at::kDouble));
  });
  library.impl("hinv_sparse_replace",
               [](const Tensor&, const Tensor&, const Tensor&, const Tensor& error, const Tensor&,
                  const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const Tensor&) { return at::empty(error.sizes(), error.options()); });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = R"(The (m, m) side of M-FAC on CUDA. Contiguous tensors on one CUDA device.

hinv_setup(tmp, coef) -> coef: B from tmp (m, m), whose strict lower triangle is D.T / q, and
    coef (m, m) = I / damp; in place. float32 or float64.
hinv_mul(rows, D, t) -> t: t_i -= sum_{k<i} D_ki t_k / q_k for t (m,) or (n, m), i < rows; in place.
    float32 or float64.
hinv_update(P, K, k, count, damp, tolerance, z, error, accepted): P = inverse of K + m damp I (m, m)
    when row and column j = count % m of K become k (m,); P and K in place. z (m,) becomes column j
    of P, error (1,) the relative error of G^T z, accepted () whether that is within the tolerance;
    where it is not, nothing changes. float64.
hinv_times(G, x, count, scales) -> Gx (m,), hinv_transposed_times(G, z, scales, row, row_scales,
    count, accepted) -> G^T z (d,): products with a window G (m, d); the second writes row j.
hinv_round(g, G) -> row, scales, values: g (d,) as a row of a window of 8 or 16 bits with scales.
hinv_largest(error, g, values, kept) -> a row of a compressed window, columns and values (m, k);
    hinv_sparse_times(columns, values, X, count, row_columns, row) -> X G^T (n, m);
    hinv_sparse_replace(columns, values, y, error, row_columns, row, new_error, rest, damp, count,
    accepted) writes the row and returns G^T y + rest / damp.
)";
  module.def(
      "hinv_setup", [](const Tensor& tmp, Tensor coef) { return hinv_setup(tmp, coef), coef; },
      pybind11::arg("tmp"), pybind11::arg("coef"));
  module.def(
      "hinv_mul",
      [](int64_t rows, const Tensor& D, Tensor t) { return hinv_mul(rows, D, t), t; },
      pybind11::arg("rows"), pybind11::arg("D"), pybind11::arg("t"));
  using pybind11::arg;
  module.def("hinv_update", &update, arg("P"), arg("K"), arg("k"), arg("count"), arg("damp"),
             arg("tolerance"), arg("z"), arg("error"), arg("accepted"));
  module.def("hinv_times", &times, arg("G"), arg("x"), arg("count"),
             arg("scales") = pybind11::none());
  module.def("hinv_transposed_times", &transposed_times, arg("G"), arg("z"),
             arg("scales") = pybind11::none(), arg("row") = pybind11::none(),
             arg("row_scales") = pybind11::none(), arg("count") = pybind11::none(),
             arg("accepted") = pybind11::none());
  module.def("hinv_round", &round_row, arg("g"), arg("G"));
  module.def("hinv_largest", &largest, arg("error"), arg("g"), arg("values"), arg("kept"));
  module.def("hinv_sparse_times", &sparse_times, arg("columns"), arg("values"), arg("X"),
             arg("count"), arg("row_columns"), arg("row"));
  module.def("hinv_sparse_replace", &sparse_replace, arg("columns"), arg("values"), arg("y"),
             arg("error"), arg("row_columns"), arg("row"), arg("new_error"), arg("rest"),
             arg("damp"), arg("count"), arg("accepted"));
}
