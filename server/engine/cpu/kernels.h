// The two products of a LoRA, for rows that share an adapter, at one instruction set.
//
// bf16 and fp16 weights and activations are widened to fp32; sums are fp32 throughout. The order in
// which a row's terms are added does not depend on the rows beside it, so a row's result is the
// same, bit for bit, whatever batch it is in.
#pragma once
#include <cstdint>

namespace loraplex {

enum Element { BF16, FP16, FP32, ELEMENTS };

struct Kernels {
  const char* name;

  // h[i·ldh + k] = Σ_d x[rows[i]·ldx + d] · a[k·width + d]   for i in [0, n), k in [0, rank)
  void (*shrink[ELEMENTS])(const void* x, int64_t ldx, const int32_t* rows, int64_t n,
                           const void* a, int64_t width, int64_t rank, float* h, int64_t ldh);

  // y[rows[i]·ldy + o] += Σ_k h[i·ldh + k] · b[k·ldb + o]    for i in [0, n), o in [0, width)
  void (*expand[ELEMENTS])(void* y, int64_t ldy, const int32_t* rows, int64_t n, const float* h,
                           int64_t ldh, const void* b, int64_t ldb, int64_t rank, int64_t width);
};

// One per instruction set; null where this machine has it not.
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_generic();

}  // namespace loraplex
