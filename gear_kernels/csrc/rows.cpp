// One row of token statistics, forward and backward, in GCC/Clang vector extensions: this file is compiled once per
// instruction set (GEAR_LANES, GEAR_ISA), so it must not use inline functions of the standard library: the linker could
// keep the AVX-512 copy of such a function for all three.
//
// Forward: one online pass over blocks of 2048 columns (8 KiB per head: both heads' blocks stay in a 32 KiB L1). Per block
// first the maxima, then the exponential sums in float lanes; blocks are added, and rescaled when a maximum moves, in double.
// With x = (s - max_s) / T and y = (t - max_t) / T, KL(S||T) = sum e^x (x - y) / Z_s - log Z_s + log Z_t. Both shifts cancel, so
// logits moved by 1e4 lose nothing, and x, y are small where the probability is large.
#include "rows.h"

#include <cmath>
#include <cstring>

namespace gear {
namespace {

constexpr int W = GEAR_LANES;
constexpr int kBlock = 2048;
// x and y end here, as in reference.py: 0 * x must be 0 and a product with a large gradient finite. A mask of -3e38 is beyond it.
constexpr float kLowest = -1e30f;
typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

inline vf splat(float a) { return a - vf{}; }
inline vu splat_u(uint32_t a) { return a + vu{}; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf a) { *reinterpret_cast<vf_unaligned*>(p) = a; }
// NaN compares false: a NaN in `a` is ignored by larger() and kept by at_least(); it reaches the result through the sums.
inline vf larger(vf a, vf best) { return a > best ? a : best; }
inline vf at_least(vf a, float low) { return a < splat(low) ? splat(low) : a; }

// e^x for x <= about 1, 1 ulp with FMA; exactly 0 below -87 (there e^x leaves the normal range), so that 0 * (x - y) is 0.
inline vf exp_lanes(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits
  const vf c = at_least(x, -87.0f);
  const vf t = c * 1.44269504088896341f + magic, n = t - magic;
  const vf r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vf y = (vf)((vu)p + ((vu)t << 23));
  return x < splat(-87.0f) ? vf{} : y;
}

inline double sum_lanes(vf a) {
  double total = 0;
  for (int i = 0; i < W; ++i) total += a[i];
  return total;
}

// ---- conversions, as vectors so that lanes and tails share one text -------------------------------------------------

inline vf from_bf16(vu h) { return (vf)(h << 16); }

inline vf from_f16(vu h) {  // shift into place, then multiply by 2^112: right for subnormals too
  const vu magnitude = (h & 0x7fffu) << 13;
  const vu special = (vu)((h & 0x7c00u) == splat_u(0x7c00u)) & 0x7f800000u;
  return (vf)((vu)((vf)magnitude * 5.192296858534828e33f) | special | ((h & 0x8000u) << 16));
}

inline vu to_bf16(vf a) {  // round to nearest even; a NaN stays one
  const vu u = (vu)a, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return a != a ? splat_u(0x7fc0u) : rounded;
}

inline vu to_f16(vf a) {  // round to nearest even; overflow to infinity; subnormals by the adder's own rounding
  const vu u = (vu)a, sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
  const vu normal = (m - 0x38000000u + 0xfffu + ((m >> 13) & 1u)) >> 13;
  const vu tiny = (vu)((vf)m + splat(0.5f)) - 0x3f000000u;
  vu h = m < splat_u(0x38800000u) ? tiny : normal;
  h = m >= splat_u(0x47800000u) ? splat_u(0x7c00u) : h;
  return (a != a ? splat_u(0x7e00u) : h) | sign;
}

inline vu widen(const uint16_t* p) {
  return __builtin_convertvector((vh)*reinterpret_cast<const vh_unaligned*>(p), vu);
}

inline float element(const Matrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.dtype == Dtype::f32) return static_cast<const float*>(m.data)[at];
  const vu h = splat_u(static_cast<const uint16_t*>(m.data)[at]);
  return (m.dtype == Dtype::bf16 ? from_bf16(h) : from_f16(h))[0];
}

inline void set_element(const Matrix& m, int64_t row, int64_t col, float value) {
  const int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.dtype == Dtype::f32) {
    static_cast<float*>(m.data)[at] = value;
  } else {
    const vf a = splat(value);
    static_cast<uint16_t*>(m.data)[at] = (uint16_t)(m.dtype == Dtype::bf16 ? to_bf16(a) : to_f16(a))[0];
  }
}

// Columns [col, col + n) as floats, padded with -inf to whole lanes. Contiguous float32 is used in place.
const float* load_block(const Matrix& m, int64_t row, int64_t col, int n, float* buffer) {
  int i = 0;
  if (m.col_stride == 1) {
    const int64_t at = row * m.row_stride + col;
    if (m.dtype == Dtype::f32) {
      const float* p = static_cast<const float*>(m.data) + at;
      if (n % W == 0) return p;
      i = n - n % W;
      memcpy(buffer, p, i * sizeof(float));
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(m.data) + at;
      if (m.dtype == Dtype::bf16)
        for (; i + W <= n; i += W) store(buffer + i, from_bf16(widen(p + i)));
      else
        for (; i + W <= n; i += W) store(buffer + i, from_f16(widen(p + i)));
    }
  }
  for (; i < n; ++i) buffer[i] = element(m, row, col + i);
  for (; i % W; ++i) buffer[i] = -INFINITY;
  return buffer;
}

// Writes n floats to columns [col, col + n), rounding to nearest even for bfloat16 and float16.
void store_block(const Matrix& m, int64_t row, int64_t col, int n, const float* from) {
  int i = 0;
  if (m.col_stride == 1) {
    const int64_t at = row * m.row_stride + col;
    if (m.dtype == Dtype::f32) {
      memcpy(static_cast<float*>(m.data) + at, from, n * sizeof(float));
      return;
    }
    uint16_t* p = static_cast<uint16_t*>(m.data) + at;
    for (; i + W <= n; i += W) {
      const vu h = m.dtype == Dtype::bf16 ? to_bf16(load(from + i)) : to_f16(load(from + i));
      *reinterpret_cast<vh_unaligned*>(p + i) = __builtin_convertvector(h, vh);
    }
  }
  for (; i < n; ++i) set_element(m, row, col + i, from[i]);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Partial sums of one head over the columns seen, relative to the maximum `max` (raw logits; 0 while all are -inf).
struct Head {
  double max = 0, z = 0, first = 0, cross = 0;  // sum e^x; sum e^x x; sum e^x (x - y) of this head against the other
};

struct Lanes {
  vf z{}, first{}, cross{};
  void add_to(Head& h) const { h.z += sum_lanes(z), h.first += sum_lanes(first), h.cross += sum_lanes(cross); }
};

// Moves the head's reference from max to max + by and the other head's by `other`; both in units of raw logits.
inline void rescale(Head& h, double by, double other, double inv_t) {
  if (h.z == 0) {
    h.max += by;
    return;
  }
  const double r = by == 0 ? 1.0 : std::exp(-by * inv_t);
  h.cross = r * (h.cross - h.z * (by - other) * inv_t);
  h.first = r * (h.first - h.z * by * inv_t);
  h.z *= r;
  h.max += by;
}

struct Scan {
  float s_max = -INFINITY, t_max = -INFINITY;
  bool s_outside_t = false, t_outside_s = false;  // a finite logit where the other head's is -inf: that divergence is infinite
};

template <bool kTeacher>
void scan_block(const float* s, const float* t, int n, Scan& scan) {
  vf s_max = splat(scan.s_max), t_max = splat(scan.t_max);
  vi s_outside{}, t_outside{};
  for (int i = 0; i < n; i += W) {
    const vf a = load(s + i);
    s_max = larger(a, s_max);
    if (kTeacher) {
      const vf b = load(t + i);
      t_max = larger(b, t_max);
      const vi null_a = a == splat(-INFINITY), null_b = b == splat(-INFINITY);
      s_outside |= null_b & ~null_a;
      t_outside |= null_a & ~null_b;
    }
  }
  for (int i = 0; i < W; ++i) {
    if (s_max[i] > scan.s_max) scan.s_max = s_max[i];
    if (t_max[i] > scan.t_max) scan.t_max = t_max[i];
    scan.s_outside_t |= s_outside[i] != 0;
    scan.t_outside_s |= t_outside[i] != 0;
  }
}

template <bool kTeacher>
void sum_block(const float* s, const float* t, int n, Head& student, Head& teacher, float inv_t) {
  const vf s_max = splat((float)student.max), t_max = splat((float)teacher.max);
  Lanes a, b;
  for (int i = 0; i < n; i += W) {
    const vf x = at_least((load(s + i) - s_max) * inv_t, kLowest), ex = exp_lanes(x);
    a.z += ex;
    a.first += ex * x;
    if (kTeacher) {
      const vf y = at_least((load(t + i) - t_max) * inv_t, kLowest), ey = exp_lanes(y), d = x - y;
      b.z += ey;
      b.first += ey * y;
      a.cross += ex * d;
      b.cross -= ey * d;
    }
  }
  a.add_to(student);
  b.add_to(teacher);
}

inline double reference_max(float m) { return m == -INFINITY ? 0.0 : (double)m; }

template <bool kTeacher>
Scan sweep(const Problem& p, int64_t row, Head& student, Head& teacher) {
  alignas(64) float s_buffer[kBlock], t_buffer[kBlock];
  const float inv_t = p.inv_temperature[row];
  Scan scan;
  for (int64_t col = 0; col < p.vocab; col += kBlock) {
    const int n = (int)(p.vocab - col < kBlock ? p.vocab - col : kBlock);
    const float* s = load_block(p.student, row, col, n, s_buffer);
    const float* t = kTeacher ? load_block(p.teacher, row, col, n, t_buffer) : nullptr;
    scan_block<kTeacher>(s, t, n, scan);
    const double by_s = reference_max(scan.s_max) - student.max, by_t = reference_max(scan.t_max) - teacher.max;
    if (by_s != 0 || by_t != 0) rescale(student, by_s, by_t, inv_t), rescale(teacher, by_t, by_s, inv_t);
    sum_block<kTeacher>(s, t, n, student, teacher, inv_t);
  }
  return scan;
}

inline double log_z(const Head& h) { return h.z == 0 ? NAN : std::log(h.z); }  // every logit -inf: no distribution
inline double not_negative(double a) { return a < 0 ? 0.0 : a; }              // rounding only; keeps NaN

inline double divergence(const Head& h, double log_z, double other_log_z, bool infinite) {
  if (log_z != log_z || other_log_z != other_log_z) return NAN;
  return infinite ? INFINITY : not_negative(h.cross / h.z - log_z + other_log_z);
}

inline double logprob(const Matrix& m, int64_t row, int64_t target, const Head& h, double log_z, double inv_t) {
  return ((double)element(m, row, target) - h.max) * inv_t - log_z;
}

inline bool ignored(const Problem& p, int64_t row) { return p.targets && p.targets[row] == p.ignore_index; }

void forward_row(const Problem& p, int64_t row) {
  float v[kValues] = {};
  float* state = p.state + row * kState;
  memset(state, 0, kState * sizeof(float));
  if (!ignored(p, row)) {
    Head student, teacher;
    const bool has_teacher = p.teacher.data != nullptr;
    const Scan scan = has_teacher ? sweep<true>(p, row, student, teacher) : sweep<false>(p, row, student, teacher);
    const double inv_t = p.inv_temperature[row], lz = log_z(student), lz_t = has_teacher ? log_z(teacher) : 0.0;
    if (p.targets) v[kLogprob] = (float)logprob(p.student, row, p.targets[row], student, lz, inv_t);
    v[kEntropy] = (float)not_negative(lz - student.first / student.z);
    if (has_teacher) {
      if (p.targets) v[kTeacherLogprob] = (float)logprob(p.teacher, row, p.targets[row], teacher, lz_t, inv_t);
      v[kTeacherEntropy] = (float)not_negative(lz_t - teacher.first / teacher.z);
      v[kReverseKl] = (float)divergence(student, lz, lz_t, scan.s_outside_t);
      v[kForwardKl] = (float)divergence(teacher, lz_t, lz, scan.t_outside_s);
    }
    state[sMax] = (float)student.max, state[sLogZ] = (float)lz;
    state[sTeacherMax] = (float)teacher.max, state[sTeacherLogZ] = (float)lz_t;
    state[sEntropy] = v[kEntropy], state[sReverseKl] = v[kReverseKl];
    state[sForwardKl] = v[kForwardKl], state[sLogprob] = v[kLogprob];
  }
  for (int k = 0; k < kValues; ++k) p.values[k * p.rows + row] = v[k];
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct RowGrads {
  float logprob, entropy, reverse_kl, forward_kl;
};

// dz_v = gl (1[v = y] - p_v) - gH p_v (log p_v + H) + gK p_v (log p_v - log q_v - KL) + gF (p_v - q_v), over temperature;
// the 1[v = y] term is added by the caller.
template <bool kTeacher>
void gradient_block(const float* s, const float* t, int n, const float* state, RowGrads g, float inv_t, float* out) {
  const vf s_max = splat(state[sMax]), t_max = splat(state[sTeacherMax]);
  const float reverse_kl = g.reverse_kl == 0 ? 0 : state[sReverseKl];  // unused it may be infinite
  for (int i = 0; i < n; i += W) {
    const vf x = at_least((load(s + i) - s_max) * inv_t - state[sLogZ], kLowest), p = exp_lanes(x);
    vf factor = splat(g.forward_kl - g.logprob) - g.entropy * (x + state[sEntropy]);
    if (kTeacher) {
      const vf y = at_least((load(t + i) - t_max) * inv_t - state[sTeacherLogZ], kLowest);
      factor += g.reverse_kl * ((x - y) - reverse_kl);
      store(out + i, inv_t * (p * factor - g.forward_kl * exp_lanes(y)));
    } else {
      store(out + i, inv_t * (p * factor));
    }
  }
}

// An output that is infinite (or an ignored row) passes no gradient.
RowGrads usable_grads(const Problem& p, int64_t row) {
  const float* g = p.grads + row * kGrads;
  const float* state = p.state + row * kState;
  if (ignored(p, row)) return {0, 0, 0, 0};
  return {state[sLogprob] == -INFINITY ? 0 : g[gLogprob], g[gEntropy], state[sReverseKl] == INFINITY ? 0 : g[gReverseKl],
          state[sForwardKl] == INFINITY ? 0 : g[gForwardKl]};
}

template <bool kTeacher>
void gradient_row(const Problem& p, int64_t row, RowGrads g) {
  alignas(64) float s_buffer[kBlock], t_buffer[kBlock], out[kBlock];
  const float inv_t = p.inv_temperature[row];
  for (int64_t col = 0; col < p.vocab; col += kBlock) {
    const int n = (int)(p.vocab - col < kBlock ? p.vocab - col : kBlock);
    const float* s = load_block(p.student, row, col, n, s_buffer);
    const float* t = kTeacher ? load_block(p.teacher, row, col, n, t_buffer) : nullptr;
    gradient_block<kTeacher>(s, t, n, p.state + row * kState, g, inv_t, out);
    const int64_t hit = g.logprob != 0 ? p.targets[row] - col : -1;
    if (hit >= 0 && hit < n) out[hit] += inv_t * g.logprob;  // before rounding to the output's dtype
    store_block(p.dz, row, col, n, out);
  }
}

void zero_row(const Problem& p, int64_t row) {
  alignas(64) static const float zeros[kBlock] = {};
  for (int64_t col = 0; col < p.vocab; col += kBlock)
    store_block(p.dz, row, col, (int)(p.vocab - col < kBlock ? p.vocab - col : kBlock), zeros);
}

void backward_row(const Problem& p, int64_t row) {
  const RowGrads g = usable_grads(p, row);
  const bool through_teacher = g.reverse_kl != 0 || g.forward_kl != 0;
  if (through_teacher)
    gradient_row<true>(p, row, g);
  else if (g.logprob != 0 || g.entropy != 0)
    gradient_row<false>(p, row, g);
  else
    zero_row(p, row);  // nothing to pass: the logits are not read
}

}  // namespace

#define GEAR_JOIN_(a, b) a##b
#define GEAR_JOIN(a, b) GEAR_JOIN_(a, b)
#define GEAR_TEXT_(a) #a
#define GEAR_TEXT(a) GEAR_TEXT_(a)
Isa GEAR_JOIN(GEAR_ISA, _isa)() { return {GEAR_TEXT(GEAR_ISA), forward_row, backward_row}; }

}  // namespace gear
