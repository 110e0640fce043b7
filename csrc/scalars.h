// The four storage types, and the exact conversions between each and the type that its arithmetic is done in.
// Free of torch, so that every backend and every compiler sees the same code; free of branches, so that loops over
// the conversions vectorise. A GPU has an instruction for most of them.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SAM_FN __host__ __device__ __forceinline__
#else
#define SAM_FN inline __attribute__((always_inline))
#endif

namespace sam {

enum class DType : int32_t { kFloat, kDouble, kBFloat16, kHalf };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Arithmetic type of a storage type: double for double, float for the rest.
template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

SAM_FN uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
SAM_FN float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

SAM_FN float load(const float& x) { return x; }
SAM_FN double load(const double& x) { return x; }
SAM_FN float load(const BFloat16& x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

SAM_FN float load(const Half& x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // Half's exponent bias is 15 and float's 127: 112 more, and 112 more again for infinity and NaN.
  const uint32_t top = magnitude >= (31u << 23) ? 224u << 23 : 112u << 23;
  // In [0.5, 1) the last bit of a float weighs 2^-24, as it does in a subnormal half.
  const float subnormal = float_of((x.bits & 0x7fffu) | bits_of(0.5f)) - 0.5f;
  const uint32_t bits = magnitude < (1u << 23) ? bits_of(subnormal) : magnitude + top;
  return float_of(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
#endif
}

// store() rounds to nearest, ties to even, as IEEE 754 and torch do.
SAM_FN void store(float& out, float x) { out = x; }
SAM_FN void store(double& out, double x) { out = x; }

SAM_FN void store(BFloat16& out, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
#endif
}

SAM_FN void store(Half& out, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t u = bits_of(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t bits = magnitude < (113u << 23) ? subnormal : normal;
  bits = magnitude >= (143u << 23) ? special : bits;
  out.bits = static_cast<uint16_t>(bits | (u >> 16 & 0x8000u));
#endif
}

// store_randomly() rounds stochastically, so that the mean over all values of `random` is x. What is finite to nearest
// stays finite.
SAM_FN void store_randomly(BFloat16& out, float x, uint32_t random) {
  const uint32_t u = bits_of(x);
  uint32_t bits = ((u & 0x7fffffffu) + (random >> 16)) >> 16;
  bits = bits < 0x7f7fu ? bits : 0x7f7fu;
  store(out, x);
  if ((out.bits & 0x7f80u) != 0x7f80u) out.bits = static_cast<uint16_t>(bits | (u >> 16 & 0x8000u));
}

SAM_FN void store_randomly(Half& out, float x, uint32_t random) {
  const uint32_t u = bits_of(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 19)) >> 13;
  const float units = magnitude < (113u << 23) ? float_of(magnitude) * 0x1p24f : 0;
  const int32_t low = static_cast<int32_t>(units);
  const float rest = units - static_cast<float>(low) + static_cast<float>(random >> 16) * 0x1p-16f;
  const uint32_t subnormal = static_cast<uint32_t>(low + static_cast<int32_t>(rest));
  uint32_t bits = magnitude < (113u << 23) ? subnormal : normal;
  bits = bits < 0x7bffu ? bits : 0x7bffu;
  store(out, x);
  if ((out.bits & 0x7c00u) != 0x7c00u) out.bits = static_cast<uint16_t>(bits | (u >> 16 & 0x8000u));
}

// Well mixed bits of x: Chris Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/).
SAM_FN uint32_t hashed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// f(T{}) for the storage type T, on the host.
template <class F>
inline __attribute__((always_inline)) void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat: return f(float{});
    case DType::kDouble: return f(double{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kHalf: return f(Half{});
  }
}

}  // namespace sam
