// Compiled once for each instruction set (see build.py), with KERNELS naming the result.
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace loraplex {
namespace {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// --- one number -----------------------------------------------------------------------------

float get(const float* p) { return *p; }
float get(const bf16* p) { return as_float(uint32_t(p->bits) << 16); }
float get(const fp16* p) {
  uint32_t sign = uint32_t(p->bits & 0x8000) << 16, rest = p->bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, nan
  float magnitude = as_float(rest << 13) * 0x1p112f;  // exact, denormals included
  return as_float(sign | as_bits(magnitude));
}

void put(float* p, float value) { *p = value; }
void put(bf16* p, float value) {  // to nearest, ties to even
  uint32_t bits = as_bits(value);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void put(fp16* p, float value) {  // to nearest, ties to even
  uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000;
  float magnitude = as_float(bits & 0x7fffffff);
  uint32_t rest;
  if (std::isnan(value)) rest = 0x7e00;
  else if (magnitude >= 65520.0f) rest = 0x7c00;
  else if (magnitude < 0x1p-14f) rest = as_bits(magnitude + 0.5f) - as_bits(0.5f);  // denormal
  else {
    uint32_t m = as_bits(magnitude);
    rest = (m + 0xfff + (m >> 13 & 1) - (112u << 23)) >> 13;
  }
  p->bits = uint16_t(sign | rest);
}

// --- a vector of LANES numbers ----------------------------------------------------------------

#if defined(__AVX512F__)

constexpr int LANES = 16;
using V = __m512;
V zero() { return _mm512_setzero_ps(); }
V all(float value) { return _mm512_set1_ps(value); }
V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
float sum(V v) { return _mm512_reduce_add_ps(v); }
V load(const float* p) { return _mm512_loadu_ps(p); }
V load(const bf16* p) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
V load(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
void store(float* p, V v) { _mm512_storeu_ps(p, v); }
void store(bf16* p, V v) {
  __m256bh rounded = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &rounded, sizeof rounded);
}
void store(fp16* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

constexpr int LANES = 8;
using V = __m256;
V zero() { return _mm256_setzero_ps(); }
V all(float value) { return _mm256_set1_ps(value); }
V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
float sum(V v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
V load(const float* p) { return _mm256_loadu_ps(p); }
V load(const bf16* p) {
  __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
V load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
void store(float* p, V v) { _mm256_storeu_ps(p, v); }
void store(bf16* p, V v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
void store(fp16* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#else

// Four lanes in the compiler's own vectors: SSE2 on x86, NEON on ARM.
constexpr int LANES = 4;
typedef float V __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));
V zero() { return V{}; }
V all(float value) { return V{} + value; }
V fma(V a, V b, V c) { return a * b + c; }
float sum(V v) { return (v[0] + v[1]) + (v[2] + v[3]); }
V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
V load(const bf16* p) {
  Halves raw;
  std::memcpy(&raw, p, sizeof raw);
  return V(__builtin_convertvector(raw, Bits) << 16);
}
V load(const fp16* p) { return V{get(p), get(p + 1), get(p + 2), get(p + 3)}; }
template <class T> void store(T* p, V v) {
  for (int i = 0; i < LANES; i++) put(p + i, v[i]);
}

#endif

// --- dot products of one step of x with one step of a --------------------------------------------
// Two bf16 vectors at a time where the machine multiplies pairs itself, else one widened vector.

template <class T> struct Dot {
  static constexpr int STEP = LANES;
  using In = V;
  static In read(const T* p) { return load(p); }
  static V add(V sum, In x, In a) { return fma(x, a, sum); }
};

#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {
  static constexpr int STEP = 32;
  using In = __m512bh;
  static In read(const bf16* p) {
    In value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static V add(V sum, In x, In a) { return _mm512_dpbf16_ps(sum, x, a); }
};
#endif

// --- tiles -------------------------------------------------------------------------------------
// A pass keeps ROWS × RANKS sums of the first product in registers, ROWS × VECTORS of the second.

#if defined(__AVX512F__)
constexpr int ROWS = 4, RANKS = 4, VECTORS = 4;
#else
constexpr int ROWS = 4, RANKS = 2, VECTORS = 2;
#endif

// Calls f with each run of at most ROWS rows out of n, its length as a compile-time number; the
// last two runs are of about equal length.
template <int M = ROWS, class F> void with_length(int64_t m, F&& f) {
  if (m == M) f(std::integral_constant<int, M>{});
  else if constexpr (M > 1) with_length<M - 1>(m, f);
}
template <class F> void for_runs(int64_t n, F&& f) {
  for (int64_t i = 0, m; i < n; i += m) {
    int64_t left = n - i;
    m = left >= 2 * ROWS || left == ROWS ? ROWS : left > ROWS ? (left + 1) / 2 : left;
    with_length(m, [&](auto length) { f(i, length); });
  }
}

template <class T, int M, int K>
void shrink_tile(const T* const* x, const T* a, int64_t width, float* h, int64_t ldh) {
  V sums[M][K];
  for (int i = 0; i < M; i++)
    for (int k = 0; k < K; k++) sums[i][k] = zero();
  int64_t d = 0;
  for (; d + Dot<T>::STEP <= width; d += Dot<T>::STEP) {
    typename Dot<T>::In left[M];
    for (int i = 0; i < M; i++) left[i] = Dot<T>::read(x[i] + d);
    for (int k = 0; k < K; k++) {
      auto right = Dot<T>::read(a + k * width + d);
      for (int i = 0; i < M; i++) sums[i][k] = Dot<T>::add(sums[i][k], left[i], right);
    }
  }
  for (int i = 0; i < M; i++)
    for (int k = 0; k < K; k++) {
      float tail = 0.0f;
      for (int64_t t = d; t < width; t++)
        tail = std::fma(get(x[i] + t), get(a + k * width + t), tail);
      h[i * ldh + k] = sum(sums[i][k]) + tail;
    }
}

// Weights outside, rows inside: a tile of weights stays in L1 while all rows pass it.
template <class T>
void shrink(const void* x_, int64_t ldx, const int32_t* rows, int64_t n, const void* a_,
            int64_t width, int64_t rank, float* h, int64_t ldh) {
  auto x = static_cast<const T*>(x_);
  auto a = static_cast<const T*>(a_);
  auto some = [&](int64_t k, auto ranks) {
    for_runs(n, [&](int64_t i, auto length) {
      const T* in[length];
      for (int j = 0; j < length; j++) in[j] = x + rows[i + j] * ldx;
      shrink_tile<T, length, ranks>(in, a + k * width, width, h + i * ldh + k, ldh);
    });
  };
  int64_t k = 0;
  for (; k + RANKS <= rank; k += RANKS) some(k, std::integral_constant<int, RANKS>{});
  for (; k < rank; k++) some(k, std::integral_constant<int, 1>{});
}

template <class T, int M, int N>
void expand_tile(T* const* y, const float* h, int64_t ldh, const T* b, int64_t ldb, int64_t rank) {
  V sums[M][N];
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) sums[i][n] = zero();
  for (int64_t k = 0; k < rank; k++) {
    V right[N];
    for (int n = 0; n < N; n++) right[n] = load(b + k * ldb + n * LANES);
    for (int i = 0; i < M; i++) {
      V left = all(h[i * ldh + k]);
      for (int n = 0; n < N; n++) sums[i][n] = fma(left, right[n], sums[i][n]);
    }
  }
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) {
      T* out = y[i] + n * LANES;
      store(out, load(out) + sums[i][n]);
    }
}

template <class T>
void expand(void* y_, int64_t ldy, const int32_t* rows, int64_t n, const float* h, int64_t ldh,
            const void* b_, int64_t ldb, int64_t rank, int64_t width) {
  auto y = static_cast<T*>(y_);
  auto b = static_cast<const T*>(b_);
  auto some = [&](int64_t o, auto vectors) {
    for_runs(n, [&](int64_t i, auto length) {
      T* out[length];
      for (int j = 0; j < length; j++) out[j] = y + rows[i + j] * ldy + o;
      expand_tile<T, length, vectors>(out, h + i * ldh, ldh, b + o, ldb, rank);
    });
  };
  int64_t o = 0;
  for (; o + VECTORS * LANES <= width; o += VECTORS * LANES)
    some(o, std::integral_constant<int, VECTORS>{});
  for (; o + LANES <= width; o += LANES) some(o, std::integral_constant<int, 1>{});
  for (; o < width; o++)
    for (int64_t i = 0; i < n; i++) {
      float total = 0.0f;
      for (int64_t k = 0; k < rank; k++)
        total = std::fma(h[i * ldh + k], get(b + k * ldb + o), total);
      T* out = y + rows[i] * ldy + o;
      put(out, get(out) + total);
    }
}

const Kernels TABLE = {
    NAME,
    {shrink<bf16>, shrink<fp16>, shrink<float>},
    {expand<bf16>, expand<fp16>, expand<float>},
};

}  // namespace

const Kernels* KERNELS() { return AVAILABLE ? &TABLE : nullptr; }

}  // namespace loraplex
