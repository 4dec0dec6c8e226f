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
//   hinv_update(P, K, k, j, damp, z, health) -> None                       float64
//       P     (m, m)  A^-1, A = K + m damp I, symmetric; in place, the inverse of the new A
//       K     (m, m)  symmetric; in place: row and column j become k
//       k     (m,)    products of the new gradient with all m, itself included
//       j             the row that changes, 0 <= j < m
//       damp          lambda
//       z     (m,)    output: column j of the new P
//       health (3,)   output: the Schur complement s; the residual, the largest
//                     |e_j - A z|_i (A_jj / A_ii)^1/2; and the condition, the largest P_ii A_ii
//     Where s is no positive number, P becomes NaN, and with it the s of every later exchange until
//     P is computed anew; z becomes 0, residual and condition NaN.
//
// The same three are registered as torch.ops.hinv_cuda, without return values, so that fake tensors
// and torch.compile know them.

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
#include <vector>

extern "C" {
cudaError_t hinv_setup_float(const float*, float*, float*, int, cudaStream_t);
cudaError_t hinv_setup_double(const double*, double*, double*, int, cudaStream_t);
cudaError_t hinv_mul_float(const float*, float*, int, int, int, cudaStream_t);
cudaError_t hinv_mul_double(const double*, double*, int, int, int, cudaStream_t);
cudaError_t hinv_update_double(double*, double*, const double*, int, int, double, double*, double*,
                               double*, cudaStream_t);
}

namespace {

using at::Tensor;

void check(const Tensor& tensor, const char* name, at::IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK(tensor.is_cuda(), name, " is on ", tensor.device(),
              "; hinv_cuda works on CUDA tensors, use torch operations for others");
  TORCH_CHECK(tensor.device() == like.device(), name, " is on ", tensor.device(), " and others on ",
              like.device(), "; they must be on one device");
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " is ", tensor.scalar_type(),
              " and others ", like.scalar_type(), "; they must be of one type");
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), "; it must be ", shape);
  TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous; call .contiguous() first");
}

// m of an (m, m) matrix of float32, where that is allowed, or float64.
int64_t check_square(const Tensor& tensor, const char* name, bool float32) {
  TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) >= 1 && tensor.size(0) <= INT_MAX / 2, name,
              " has shape ", tensor.sizes(), "; it must be (m, m) with m of at least 1");
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kDouble || (float32 && type == at::kFloat), name, " is ", type,
              "; it must be ", float32 ? "float32 or float64" : "float64");
  const int64_t m = tensor.size(0);
  check(tensor, name, {m, m}, tensor);
  return m;
}

void hinv_setup(const Tensor& tmp, const Tensor& coef) {
  const int64_t m = check_square(tmp, "tmp", true);
  check(coef, "coef", {m, m}, tmp);
  TORCH_CHECK(!coef.is_alias_of(tmp), "coef and tmp share memory; they must not");
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
  TORCH_CHECK(0 <= rows && rows <= m, "rows is ", rows, "; it must be from 0 to m = ", m);
  TORCH_CHECK(t.dim() == 1 || t.dim() == 2, "t has shape ", t.sizes(), "; it must be (", m,
              ",) or (n, ", m, ")");
  const int64_t n = t.dim() == 1 ? 1 : t.size(0);
  check(t, "t", t.dim() == 1 ? std::vector<int64_t>{m} : std::vector<int64_t>{n, m}, D);
  TORCH_CHECK(!t.is_alias_of(D), "t and D share memory; they must not");
  TORCH_CHECK(n <= INT_MAX / 2, "t has ", n, " rows; that is too many");
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

void hinv_update(const Tensor& P, const Tensor& K, const Tensor& k, int64_t j, double damp,
                 const Tensor& z, const Tensor& health) {
  const int64_t m = check_square(P, "P", false);
  check(K, "K", {m, m}, P);
  check(k, "k", {m}, P);
  check(z, "z", {m}, P);
  check(health, "health", {3}, P);
  TORCH_CHECK(0 <= j && j < m, "j is ", j, "; it must be from 0 to m - 1 = ", m - 1);
  TORCH_CHECK(damp > 0 && std::isfinite(damp), "damp is ", damp,
              "; it must be positive and finite");
  const Tensor tensors[] = {P, K, k, z, health};
  for (const Tensor& a : tensors) {
    for (const Tensor& b : tensors)
      TORCH_CHECK(&a == &b || !a.is_alias_of(b),
                  "Two of P, K, k, z, health share memory; they must not");
  }
  const c10::cuda::CUDAGuard guard(P.device());
  const Tensor scratch = at::empty({4 * m}, P.options());
  C10_CUDA_CHECK(hinv_update_double(
      P.mutable_data_ptr<double>(), K.mutable_data_ptr<double>(), k.const_data_ptr<double>(), m, j,
      damp, z.mutable_data_ptr<double>(), health.mutable_data_ptr<double>(),
      scratch.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY(hinv_cuda, library) {
  library.def("hinv_setup(Tensor tmp, Tensor(a!) coef) -> ()");
  library.def("hinv_mul(int rows, Tensor D, Tensor(a!) t) -> ()");
  library.def(
      "hinv_update(Tensor(a!) P, Tensor(b!) K, Tensor k, int j, float damp, Tensor(c!) z, "
      "Tensor(d!) health) -> ()");
}
// For every device, so that a tensor elsewhere meets the checks above and their messages.
TORCH_LIBRARY_IMPL(hinv_cuda, CompositeExplicitAutograd, library) {
  library.impl("hinv_setup", hinv_setup);
  library.impl("hinv_mul", hinv_mul);
  library.impl("hinv_update", hinv_update);
}
// Fake tensors: nothing is returned, so nothing has to be made up.
TORCH_LIBRARY_IMPL(hinv_cuda, Meta, library) {
  library.impl("hinv_setup", [](const Tensor&, const Tensor&) {});
  library.impl("hinv_mul", [](int64_t, const Tensor&, const Tensor&) {});
  library.impl("hinv_update", [](const Tensor&, const Tensor&, const Tensor&, int64_t, double,
                                 const Tensor&, const Tensor&) {});
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = R"(The (m, m) side of M-FAC on CUDA. Contiguous tensors on one CUDA device.

hinv_setup(tmp, coef) -> coef: B from tmp (m, m), whose strict lower triangle is D.T / q, and
    coef (m, m) = I / damp; in place. float32 or float64.
hinv_mul(rows, D, t) -> t: t_i -= sum_{k<i} D_ki t_k / q_k for t (m,) or (n, m), i < rows; in place.
    float32 or float64.
hinv_update(P, K, k, j, damp, z, health): P = inverse of K + m damp I (m, m) when row and column j
    of K become k (m,); P and K in place. z (m,) becomes column j of P, health (3,) the Schur
    complement, the residual of z and the condition of A. float64.
)";
  module.def(
      "hinv_setup", [](const Tensor& tmp, Tensor coef) { return hinv_setup(tmp, coef), coef; },
      pybind11::arg("tmp"), pybind11::arg("coef"));
  module.def(
      "hinv_mul",
      [](int64_t rows, const Tensor& D, Tensor t) { return hinv_mul(rows, D, t), t; },
      pybind11::arg("rows"), pybind11::arg("D"), pybind11::arg("t"));
  module.def("hinv_update", &hinv_update, pybind11::arg("P"), pybind11::arg("K"),
             pybind11::arg("k"), pybind11::arg("j"), pybind11::arg("damp"), pybind11::arg("z"),
             pybind11::arg("health"));
}
