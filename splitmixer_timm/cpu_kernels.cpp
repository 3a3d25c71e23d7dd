// What lies between the products of a SplitMixer, for inference on a CPU. compiled_cpu.py has it compiled, and says in
// torch's operations what is computed here.
//
// Features are (N, H, W, C) in fp32 or bf16, arithmetic is in fp32. Spatial mixing goes through an image row by row, a
// few channels at a time: what it needs of the rows before stays in the cache, so that features are read once and
// written once.
#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/vec.h>  // for a processor whose vectors torch does not know, which the other leaves out

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C"
#endif

namespace {

using at::BFloat16;
using at::vec::fmadd;
using Vec = at::vec::Vectorized<float>;
using Index = int64_t;

constexpr Index LANES = Vec::size();
constexpr Index CHUNK = 32;  // channels at a time
constexpr Index VECS = CHUNK / LANES;
constexpr Index COLUMNS = 8;  // outputs of a row at a time, which share a load of weights
static_assert(CHUNK % (2 * LANES) == 0);

inline Index partial(Index count, Index v, Index lanes) {
  return std::min(std::max<Index>(count - v * LANES, 0), lanes);
}

inline void load(const float* source, Vec* x, Index count) {
  for (Index v = 0; v < VECS; ++v) {
    x[v] = count == CHUNK ? Vec::loadu(source + v * LANES)
                          : Vec::loadu(source + v * LANES, partial(count, v, LANES));
  }
}

inline void load(const BFloat16* source, Vec* x, Index count) {
  using Half = at::vec::Vectorized<BFloat16>;
  for (Index v = 0; v < VECS; v += 2) {
    const auto pair = at::vec::convert<float, 2, BFloat16, 1>(
        count == CHUNK ? Half::loadu(source + v * LANES)
                       : Half::loadu(source + v * LANES, partial(count, v, 2 * LANES)));
    x[v] = pair[0];
    x[v + 1] = pair[1];
  }
}

inline void store(float* target, const Vec* x, Index count) {
  for (Index v = 0; v < VECS; ++v) {
    if (count == CHUNK) {
      x[v].store(target + v * LANES);
    } else {
      x[v].store(target + v * LANES, partial(count, v, LANES));
    }
  }
}

inline void store(BFloat16* target, const Vec* x, Index count) {
  for (Index v = 0; v < VECS; v += 2) {
    at::vec::VectorizedN<float, 2> pair;
    pair[0] = x[v];
    pair[1] = x[v + 1];
    const auto half = at::vec::convert<BFloat16, 1, float, 2>(pair);
    if (count == CHUNK) {
      half.store(target + v * LANES);
    } else {
      half.store(target + v * LANES, partial(count, v, 2 * LANES));
    }
  }
}

// GELU as x * (0.5 + b P(b * b)), where b is x within bounds: for features in bf16 with a polynomial within 1.4e-5 of
// half of erf(b / sqrt(2)), for those in fp32 with a ratio of two within 1.6e-8. Both are minimax fits, which take less
// arithmetic than torch's. At the bounds they are 0.5 in this order of operations, in bf16 within 1e-9: that much is left
// of a large negative x.
template <typename T>
Vec gelu(Vec x);

template <>
inline Vec gelu<float>(Vec x) {
  constexpr float BOUND = 5.5437171645025325f;
  constexpr float P[] = {
      0.398942229f, 0.03407632095f, 0.004689937055f, 0.0001709590045f, 6.35248335e-06f, 2.248085295e-08f};
  constexpr float Q[] = {1.f, 0.252082503f, 0.0287712306f, 0.00189654506f, 7.42577586e-05f, 1.18970938e-06f};
  const Vec bounded = at::vec::clamp(x, Vec(-BOUND), Vec(BOUND)), square = bounded * bounded;
  Vec p(P[5]), q(Q[5]);
  for (int i = 4; i >= 0; --i) {
    p = fmadd(p, square, Vec(P[i]));
    q = fmadd(q, square, Vec(Q[i]));
  }
  return x * (bounded * p / q + Vec(0.5f));
}

template <>
inline Vec gelu<BFloat16>(Vec x) {
  constexpr float BOUND = 4.29999161f;
  constexpr float P[] = {
      0.398896217f, -0.0663264468f, 0.00980025064f, -0.00110250071f, 9.21941391e-05f, -5.48738581e-06f,
      2.16622027e-07f, -5.02607778e-09f, 5.14714903e-11f};
  const Vec bounded = at::vec::clamp(x, Vec(-BOUND), Vec(BOUND)), square = bounded * bounded;
  Vec p(P[8]);
  for (int i = 7; i >= 0; --i) {
    p = fmadd(p, square, Vec(P[i]));
  }
  return x * fmadd(bounded, p, Vec(0.5f));
}

// GELU or ReLU, then a norm.
template <typename T>
inline Vec act_affine(Vec x, bool is_gelu, const float* scale, const float* shift) {
  const Vec active = is_gelu ? gelu<T>(x) : at::vec::clamp_min(x, Vec(0.f));
  return fmadd(active, Vec::loadu(scale), Vec::loadu(shift));
}

// An array of zeros that begins where a line of the cache does.
class Memory {
 public:
  explicit Memory(Index size) : floats_(size + 16, 0.f) {}
  float* data() {
    const auto address = reinterpret_cast<uintptr_t>(floats_.data());
    return floats_.data() + (63 - (address + 63) % 64) / sizeof(float);
  }

 private:
  std::vector<float> floats_;
};

// out[n] += in[n] * weight, for COLUMNS outputs
inline void multiply_add(Vec* out, const float* in, Vec weight) {
  for (Index n = 0; n < COLUMNS; ++n) {
    out[n] = fmadd(Vec::loadu(in + n * CHUNK), weight, out[n]);
  }
}

// act_affine of all features.
template <typename T>
void act_affine(
    const T* x, T* out, Index N, Index H, Index W, Index C, const float* parts, bool is_gelu, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index pixel = 0; pixel < N * H * W; ++pixel) {
    for (Index c = 0; c < C; c += CHUNK) {
      const float* const scale = parts + 2 * c;
      const Index count = std::min(CHUNK, C - c);
      Vec values[VECS];
      load(x + pixel * C + c, values, count);
      for (Index v = 0; v < VECS; ++v) {
        values[v] = act_affine<T>(values[v], is_gelu, scale + v * LANES, scale + CHUNK + v * LANES);
      }
      store(out + pixel * C + c, values, count);
    }
  }
}

template <typename T>
void act_affine_mean(
    const T* x, float* out, Index N, Index H, Index W, Index C, const float* parts, bool is_gelu, int threads) {
  const Index chunks = (C + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (Index task = 0; task < N * chunks; ++task) {
    const Index c = task % chunks * CHUNK, image = task / chunks, count = std::min(CHUNK, C - c);
    const float* const scale = parts + 2 * c;
    const Vec area(static_cast<float>(H * W));
    Vec sums[VECS];
    std::fill_n(sums, VECS, Vec(0.f));
    for (Index h = 0; h < H; ++h) {
      Vec row[VECS];  // of its own: fewer roundings
      std::fill_n(row, VECS, Vec(0.f));
      for (Index w = 0; w < W; ++w) {
        Vec values[VECS];
        load(x + ((image * H + h) * W + w) * C + c, values, count);
        for (Index v = 0; v < VECS; ++v) {
          row[v] = row[v] + act_affine<T>(values[v], is_gelu, scale + v * LANES, scale + CHUNK + v * LANES);
        }
      }
      for (Index v = 0; v < VECS; ++v) {
        sums[v] = sums[v] + row[v];
      }
    }
    for (Index v = 0; v < VECS; ++v) {
      sums[v] = sums[v] / area;
    }
    store(out + image * C + c, sums, count);
  }
}

template <typename T>
void spatial_mixing(
    const T* x, T* out, Index N, Index H, Index W, Index C, const float* parts, Index k1, Index k2, bool is_gelu,
    bool is_gelu1, bool is_gelu2, bool is_residual, int threads) {
  const Index before1 = (k1 - 1) / 2, before2 = (k2 - 1) / 2, after2 = k2 - 1 - before2;
  if (N == 0) {
    return;
  }
  const Index chunks = (C + CHUNK - 1) / CHUNK;
  const Index bands = std::min((threads + N * chunks - 1) / (N * chunks), (H + k2 - 1) / k2);
  const Index columns = (W + COLUMNS - 1) / COLUMNS * COLUMNS;
  const Index y_row = columns * CHUNK, x_row = (columns + k1 - 1) * CHUNK, x_rows = after2 + 1;
#pragma omp parallel num_threads(threads)
  {
    Memory memory(x_rows * x_row + k2 * y_row);
    float* const xs = memory.data();  // rows before the first convolution, between zeros
    float* const ys = xs + x_rows * x_row;  // rows before the second
#pragma omp for schedule(static)
    for (Index task = 0; task < N * chunks * bands; ++task) {
      const Index band = task % bands, chunk = task / bands % chunks, image = task / bands / chunks;
      const Index start = H * band / bands, stop = H * (band + 1) / bands;
      const Index count = std::min(CHUNK, C - chunk * CHUNK);
      const T* const source = x + image * H * W * C + chunk * CHUNK;
      T* const target = out + image * H * W * C + chunk * CHUNK;
      const float* const part = parts + chunk * (8 + k1 + k2) * CHUNK;
      const float *const scale = part, *const shift = part + CHUNK, *const bias1 = part + 2 * CHUNK,
                  *const scale1 = part + 3 * CHUNK, *const shift1 = part + 4 * CHUNK, *const bias2 = part + 5 * CHUNK,
                  *const scale2 = part + 6 * CHUNK, *const shift2 = part + 7 * CHUNK, *const weight1 = part + 8 * CHUNK,
                  *const weight2 = weight1 + k1 * CHUNK;
      for (Index row = std::max<Index>(0, start - before2); row < stop + after2; ++row) {
        if (row < H) {
          float* const in = xs + row % x_rows * x_row;
          for (Index w = 0; w < W; ++w) {
            Vec values[VECS];
            load(source + (row * W + w) * C, values, count);
            for (Index v = 0; v < VECS; ++v) {
              act_affine<T>(values[v], is_gelu, scale + v * LANES, shift + v * LANES)
                  .store(in + (before1 + w) * CHUNK + v * LANES);
            }
          }
          float* const y = ys + row % k2 * y_row;
          for (Index o = 0; o < CHUNK; o += LANES) {
            for (Index w = 0; w < columns; w += COLUMNS) {
              Vec values[COLUMNS];
              std::fill_n(values, COLUMNS, Vec::loadu(bias1 + o));
              for (Index t = 0; t < k1; ++t) {
                multiply_add(values, in + (w + t) * CHUNK + o, Vec::loadu(weight1 + t * CHUNK + o));
              }
              for (Index n = 0; n < COLUMNS; ++n) {
                act_affine<T>(values[n], is_gelu1, scale1 + o, shift1 + o).store(y + (w + n) * CHUNK + o);
              }
            }
          }
        }
        const Index h = row - after2;
        if (h < start) {
          continue;
        }
        const Index first = std::max<Index>(0, before2 - h), last = std::min(k2, H + before2 - h);
        const float* const shortcut = xs + h % x_rows * x_row + before1 * CHUNK;
        for (Index w = 0; w < columns; w += COLUMNS) {
          Vec results[COLUMNS][VECS];
          for (Index v = 0; v < VECS; ++v) {
            const Index o = v * LANES;
            Vec values[COLUMNS];
            std::fill_n(values, COLUMNS, Vec::loadu(bias2 + o));
            for (Index t = first; t < last; ++t) {
              multiply_add(
                  values, ys + (h - before2 + t) % k2 * y_row + w * CHUNK + o, Vec::loadu(weight2 + t * CHUNK + o));
            }
            for (Index n = 0; n < COLUMNS; ++n) {
              Vec y = act_affine<T>(values[n], is_gelu2, scale2 + o, shift2 + o);
              if (is_residual) {
                y = y + Vec::loadu(shortcut + (w + n) * CHUNK + o);
              }
              results[n][v] = y;
            }
          }
          for (Index n = 0; n < std::min(COLUMNS, W - w); ++n) {
            store(target + (h * W + w + n) * C, results[n], count);
          }
        }
      }
    }
  }
}

}  // namespace

// How many channels parts has at a time.
EXPORT Index channels() {
  return CHUNK;
}

// parts: for each CHUNK channels scale and shift of the norm that x lacks after its activation.
EXPORT void act_affine_float(
    const float* x, float* out, Index N, Index H, Index W, Index C, const float* parts, bool is_gelu, int threads) {
  act_affine(x, out, N, H, W, C, parts, is_gelu, threads);
}

EXPORT void act_affine_bfloat16(
    const BFloat16* x, BFloat16* out, Index N, Index H, Index W, Index C, const float* parts, bool is_gelu,
    int threads) {
  act_affine(x, out, N, H, W, C, parts, is_gelu, threads);
}

// The same, then the mean of each image.
EXPORT void act_affine_mean_float(
    const float* x, float* out, Index N, Index H, Index W, Index C, const float* parts, bool is_gelu, int threads) {
  act_affine_mean(x, out, N, H, W, C, parts, is_gelu, threads);
}

EXPORT void act_affine_mean_bfloat16(
    const BFloat16* x, float* out, Index N, Index H, Index W, Index C, const float* parts, bool is_gelu, int threads) {
  act_affine_mean(x, out, N, H, W, C, parts, is_gelu, threads);
}

// parts: for each CHUNK channels that scale and shift, then bias, scale and shift of each convolution, then the weights
// of each.
EXPORT void spatial_mixing_float(
    const float* x, float* out, Index N, Index H, Index W, Index C, const float* parts, Index k1, Index k2,
    bool is_gelu, bool is_gelu1, bool is_gelu2, bool is_residual, int threads) {
  spatial_mixing(x, out, N, H, W, C, parts, k1, k2, is_gelu, is_gelu1, is_gelu2, is_residual, threads);
}

EXPORT void spatial_mixing_bfloat16(
    const BFloat16* x, BFloat16* out, Index N, Index H, Index W, Index C, const float* parts, Index k1, Index k2,
    bool is_gelu, bool is_gelu1, bool is_gelu2, bool is_residual, int threads) {
  spatial_mixing(x, out, N, H, W, C, parts, k1, k2, is_gelu, is_gelu1, is_gelu2, is_residual, threads);
}
