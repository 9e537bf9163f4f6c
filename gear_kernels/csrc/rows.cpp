// One row of token statistics, forward and backward, in GCC/Clang vector extensions: this file is compiled once per
// instruction set (GEAR_LANES, GEAR_ISA), so it must not use inline functions of the standard library: the linker could
// keep the AVX-512 copy of such a function for all three.
//
// Forward: one online pass over a tile, in blocks of 2048 columns (8 KiB per head: both heads' blocks stay in a 32 KiB L1). Per block
// first the maxima, then the exponential sums in float lanes; blocks are added, and rescaled when a maximum moves, in double.
// With x = (s - max_s) / T and y = (t - max_t) / T, KL(S||T) = sum e^x (x - y) / Z_s - log Z_s + log Z_t. Both shifts cancel, so
// logits moved by 1e4 lose nothing, and x, y are small where the probability is large.
#include "rows.h"

#if GEAR_LANES > 4
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>

namespace gear {
namespace {

constexpr int W = GEAR_LANES;
constexpr int kBlock = 2048;
// x and y end here, as in reference/stats.py: 0 * x must be 0 and a product with a large gradient finite. A mask of -3e38 is beyond it.
constexpr float kLowest = -1e30f;
constexpr float kLeast = -90.0f;  // log2 of the least p that products read
constexpr float kFarthest = 80.0f;  // |log p - log q| is cut there inside the mixture, as in reference/stats.py
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;
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

// a > b ? a : b and a < b ? a : b, so b where either is NaN, in the one instruction that GCC 12 does not find for vectors.
#if GEAR_LANES == 16
inline vf pick_larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf pick_smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif GEAR_LANES == 8
inline vf pick_larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf pick_smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline vf pick_larger(vf a, vf b) { return a > b ? a : b; }
inline vf pick_smaller(vf a, vf b) { return a < b ? a : b; }
#endif
// A NaN in `a` is ignored by larger() and smaller() and kept by at_least() and at_most(); it reaches the result through the sums.
inline vf larger(vf a, vf best) { return pick_larger(a, best); }
inline vf smaller(vf a, vf best) { return pick_smaller(a, best); }
inline vf at_least(vf a, float low) { return pick_larger(splat(low), a); }
inline vf at_most(vf a, float high) { return pick_smaller(splat(high), a); }

// 2^x for x <= 127, 1 ulp; exactly 0 far below (so that 0 * (x - y) is 0), NaN for NaN. A minimax polynomial of degree 6 on
// [-1/2, 1/2] with relative error 2e-9: one degree less is 7e-8, but then 2^0 is not 1.
inline vf exp2_lanes(vf x) {
#if GEAR_LANES == 16
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - n;
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits
  const vf c = at_least(x, -125.0f), t = c + magic, n = t - magic, f = c - n;
#endif
  vf p = f * 1.5345812010e-4f + 1.3399931219e-3f;
  p = p * f + 9.6184889571e-3f;
  p = p * f + 5.5503287770e-2f;
  p = p * f + 2.4022646891e-1f;
  p = p * f + 6.9314720574e-1f;
  p = p * f + 1.0f;
#if GEAR_LANES == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vf y = (vf)((vu)p + ((vu)t << 23));
  return x < splat(-125.0f) ? vf{} : y;
#endif
}

// log of positive normal numbers (Cephes' polynomial, 1 ulp); a NaN stays one.
inline vf log_lanes(vf a) {
  const vi exponent = (vi)((vu)a - 0x3f3504f3u) >> 23;  // so that the mantissa lies in [sqrt(1/2), sqrt(2))
  const vf x = (vf)((vu)a - ((vu)exponent << 23)) - 1.0f, e = __builtin_convertvector(exponent, vf), z = x * x;
  vf p = x * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const vf y = p * x * z + e * -2.12194440e-4f - 0.5f * z;
  return a != a ? a : x + y + e * 0.693359375f;
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

struct Lanes {  // in units of log 2
  vf z{}, first{}, cross{};
  void add_to(Head& h) const {
    h.z += sum_lanes(z), h.first += 0.69314718055994531 * sum_lanes(first), h.cross += 0.69314718055994531 * sum_lanes(cross);
  }
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

// Sets the outside flags; only blocks that hold a -inf come here.
void scan_nulls(const float* s, const float* t, int n, Scan& scan) {
  for (int i = 0; i < n; ++i) {
    const bool null_s = s[i] == -INFINITY, null_t = t[i] == -INFINITY;
    scan.s_outside_t |= null_t && !null_s;
    scan.t_outside_s |= null_s && !null_t;
  }
}

template <bool kTeacher>
void scan_block(const float* s, const float* t, int n, Scan& scan) {
  vf s_max = splat(scan.s_max), t_max = splat(scan.t_max), least = splat(INFINITY);
  for (int i = 0; i < n; i += W) {
    const vf a = load(s + i);
    s_max = larger(a, s_max);
    if (kTeacher) {
      const vf b = load(t + i);
      t_max = larger(b, t_max);
      least = smaller(a, smaller(b, least));
    }
  }
  bool null = false;
  for (int i = 0; i < W; ++i) {
    if (s_max[i] > scan.s_max) scan.s_max = s_max[i];
    if (t_max[i] > scan.t_max) scan.t_max = t_max[i];
    null |= least[i] == -INFINITY;
  }
  if (kTeacher && null) scan_nulls(s, t, n, scan);
}

// Where the next block of a head lies, so that it is fetched while this one is summed: the scan of a block waits for memory, the
// sums do not touch it (AVX-512, one thread, 256 x 151936 float32: 20 ms without, 13 with).
struct Ahead {
  const char* at = nullptr;  // null at a row's end and for strided rows
  int64_t item = 0;

  Ahead(const Matrix& m, int64_t row, int64_t col, int64_t end) {
    if (m.col_stride != 1 || col >= end) return;
    item = m.dtype == Dtype::f32 ? 4 : 2;
    at = static_cast<const char*>(m.data) + (row * m.row_stride + col) * item;
  }
  void fetch(int i) const { __builtin_prefetch(at + i * item); }  // a prefetch past the end, or of null, does nothing
};

// x, y in units of log 2. kBoth: the teacher's own moments as well (for its entropy and for the forward KL).
template <bool kTeacher, bool kBoth>
void sum_block(const float* s, const float* t, int n, Head& student, Head& teacher, float inv_t, Ahead s_next, Ahead t_next) {
  const vf s_max = splat((float)student.max), t_max = splat((float)teacher.max);
  const float factor = inv_t * kLog2e;
  Lanes a, b;
  for (int i = 0; i < n; i += W) {
    s_next.fetch(i);
    const vf x = at_least((load(s + i) - s_max) * factor, kLowest), ex = exp2_lanes(x);
    a.z += ex;
    a.first += ex * x;
    if (kTeacher) {
      t_next.fetch(i);
      const vf y = at_least((load(t + i) - t_max) * factor, kLowest), ey = exp2_lanes(y), d = x - y;
      a.cross += ex * d;
      b.z += ey;
      if (kBoth) b.first += ey * y, b.cross -= ey * d;
    }
  }
  a.add_to(student);
  b.add_to(teacher);
}

inline double reference_max(float m) { return m == -INFINITY ? 0.0 : (double)m; }

struct Columns {
  int64_t begin, end;
};

// The columns of one split: whole blocks, so that a split's sums do not depend on how many there are.
inline Columns columns_of(const Problem& p, int split) {
  const int64_t blocks = (p.columns + kBlock - 1) / kBlock, each = (blocks + p.splits - 1) / p.splits * kBlock;
  const int64_t begin = split * each < p.columns ? split * each : p.columns;
  return {begin, begin + each < p.columns ? begin + each : p.columns};
}

template <bool kTeacher, bool kBoth>
Scan sweep(const Problem& p, int64_t row, Columns range, Head& student, Head& teacher) {
  alignas(64) float s_buffer[kBlock], t_buffer[kBlock];
  const float inv_t = p.inv_temperature[row];
  Scan scan;
  if (student.z != 0) scan.s_max = (float)student.max;
  if (teacher.z != 0) scan.t_max = (float)teacher.max;
  for (int64_t col = range.begin; col < range.end; col += kBlock) {
    const int n = (int)(range.end - col < kBlock ? range.end - col : kBlock);
    const float* s = load_block(p.student, row, col, n, s_buffer);
    const float* t = kTeacher ? load_block(p.teacher, row, col, n, t_buffer) : nullptr;
    scan_block<kTeacher>(s, t, n, scan);
    const double by_s = reference_max(scan.s_max) - student.max, by_t = reference_max(scan.t_max) - teacher.max;
    if (by_s != 0 || by_t != 0) rescale(student, by_s, by_t, inv_t), rescale(teacher, by_t, by_s, inv_t);
    const Ahead s_next(p.student, row, col + kBlock, range.end), t_next(p.teacher, row, col + kBlock, range.end);
    sum_block<kTeacher, kBoth>(s, t, n, student, teacher, inv_t, s_next, t_next);
  }
  return scan;
}

inline Head read_head(const double* m) { return {m[mMax], m[mZ], m[mFirst], m[mCross]}; }
inline void write_head(double* m, const Head& h) { m[mMax] = h.max, m[mZ] = h.z, m[mFirst] = h.first, m[mCross] = h.cross; }
inline bool ignored(const Problem& p, int64_t row) { return p.targets && p.targets[row] == p.ignore_index; }

void sweep_row(const Problem& p, int64_t row, int split) {
  if (ignored(p, row)) return;
  double* m = p.sums + split * p.split_stride + row * kSums;
  const Columns range = columns_of(p, split);
  Head student = read_head(m), teacher = read_head(m + mTeacher);
  const auto f = !p.has_teacher ? sweep<false, false> : p.teacher_moments ? sweep<true, true> : sweep<true, false>;
  const Scan scan = f(p, row, range, student, teacher);
  write_head(m, student), write_head(m + mTeacher, teacher);
  m[mOutside] += scan.s_outside_t, m[mTeacherOutside] += scan.t_outside_s;
  const int64_t at = p.targets ? p.targets[row] - p.first : -1;
  if (at < range.begin || at >= range.end) return;
  m[mTarget] += element(p.student, row, at);
  if (p.has_teacher) m[mTeacherTarget] += element(p.teacher, row, at);
}

// ---- statistics from sums -------------------------------------------------------------------------------------------

struct Heads {
  Head s, t;
};

inline double joint_max(const Head& a, const Head& b) {
  return a.z == 0 ? b.max : b.z == 0 ? a.max : (b.max > a.max ? b.max : a.max);
}

inline void move_to(Heads& h, double s_max, double t_max, double inv_t) {
  const double by_s = s_max - h.s.max, by_t = t_max - h.t.max;
  if (by_s != 0 || by_t != 0) rescale(h.s, by_s, by_t, inv_t), rescale(h.t, by_t, by_s, inv_t);
}

inline void add(Head& a, const Head& b) { a.z += b.z, a.first += b.first, a.cross += b.cross; }

inline void merge(Heads& a, Heads b, double inv_t) {
  const double s_max = joint_max(a.s, b.s), t_max = joint_max(a.t, b.t);
  move_to(a, s_max, t_max, inv_t), move_to(b, s_max, t_max, inv_t);
  add(a.s, b.s), add(a.t, b.t);
}

inline double log_z(const Head& h) { return h.z == 0 ? NAN : std::log(h.z); }  // every logit -inf: no distribution
inline double not_negative(double a) { return a < 0 ? 0.0 : a; }              // rounding only; keeps NaN

inline double divergence(const Head& h, double log_z, double other_log_z, bool infinite) {
  if (log_z != log_z || other_log_z != other_log_z) return NAN;
  return infinite ? INFINITY : not_negative(h.cross / h.z - log_z + other_log_z);
}

inline double logprob(double target, const Head& h, double log_z, double inv_t) { return (target - h.max) * inv_t - log_z; }

void finish_row(const Problem& p, int64_t row, int) {
  float v[kValues] = {};
  float* state = p.state + row * kState;
  memset(state, 0, kState * sizeof(float));
  if (!ignored(p, row)) {
    const double inv_t = p.inv_temperature[row];
    Heads h;
    double rest[kSums] = {};  // targets' logits and outside counts: plain sums
    for (int k = 0; k < p.splits; ++k) {
      const double* m = p.sums + k * p.split_stride + row * kSums;
      merge(h, {read_head(m), read_head(m + mTeacher)}, inv_t);
      for (int i = mTarget; i < kSums; ++i) rest[i] += m[i];
    }
    const double lz = log_z(h.s), lz_t = p.has_teacher ? log_z(h.t) : 0;
    v[kLogprob] = (float)logprob(rest[mTarget], h.s, lz, inv_t);
    v[kEntropy] = (float)not_negative(lz - h.s.first / h.s.z);
    v[kLogSumExp] = (float)(h.s.max * inv_t + lz);
    if (p.has_teacher) {
      v[kTeacherLogprob] = (float)logprob(rest[mTeacherTarget], h.t, lz_t, inv_t);
      v[kTeacherEntropy] = (float)not_negative(lz_t - h.t.first / h.t.z);
      v[kReverseKl] = (float)divergence(h.s, lz, lz_t, rest[mOutside] > 0);
      v[kForwardKl] = (float)divergence(h.t, lz_t, lz, rest[mTeacherOutside] > 0);
    }
    state[sMax] = (float)h.s.max, state[sLogZ] = (float)lz;
    state[sTeacherMax] = (float)h.t.max, state[sTeacherLogZ] = (float)lz_t;
    state[sEntropy] = v[kEntropy], state[sReverseKl] = v[kReverseKl];
    state[sForwardKl] = v[kForwardKl], state[sLogprob] = v[kLogprob];
  }
  for (int k = 0; k < kValues; ++k) p.values[k * p.rows + row] = v[k];
}

// ---- divergence to the mixture m = beta q + (1 - beta) p --------------------------------------------------------------

// log p/m from d = log2 q/p; log q/m is the same with -d and the parts of both exchanged.
inline vf log_ratio(vf d, float own, float other) { return -log_lanes(own + other * exp2_lanes(d)); }
inline vf bounded(vf d) { return at_most(at_least(d, -kFarthest * kLog2e), kFarthest * kLog2e); }

struct Normal {  // log2 p_v = (z - max) * factor - log_z
  vf max;
  float factor, log_z;
  Normal(float max, float inv_t, float log_z) : max(splat(max)), factor(inv_t * kLog2e), log_z(log_z * kLog2e) {}
  vf log2_prob(const float* z) const { return at_least((load(z) - max) * factor - log_z, kLowest); }
};

void mixture_row(const Problem& p, int64_t row, int split) {
  if (ignored(p, row)) return;
  alignas(64) float s_buffer[kBlock], t_buffer[kBlock];
  const float* state = p.state + row * kState;
  const float inv_t = p.inv_temperature[row], beta = p.beta;
  const Normal student(state[sMax], inv_t, state[sLogZ]), teacher(state[sTeacherMax], inv_t, state[sTeacherLogZ]);
  const Columns range = columns_of(p, split);
  double* out = p.shares + split * p.split_stride + row * 2;
  for (int64_t col = range.begin; col < range.end; col += kBlock) {
    const int n = (int)(range.end - col < kBlock ? range.end - col : kBlock);
    const float* s = load_block(p.student, row, col, n, s_buffer);
    const float* t = load_block(p.teacher, row, col, n, t_buffer);
    vf from_s{}, from_t{};
    for (int i = 0; i < n; i += W) {
      const vf x = student.log2_prob(s + i), y = teacher.log2_prob(t + i), d = bounded(y - x);
      from_s += exp2_lanes(x) * log_ratio(d, 1 - beta, beta);
      from_t += exp2_lanes(y) * log_ratio(-d, beta, 1 - beta);
    }
    out[0] += sum_lanes(from_s), out[1] += sum_lanes(from_t);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

struct RowGrads {
  float logprob, entropy, reverse_kl, forward_kl, jsd, logsumexp;
};

// A probability, or 0 where its logarithm of base 2 is below `least`; see Problem::multiplied.
inline vf mass_lanes(vf x, float least) { return x < splat(least) ? vf{} : exp2_lanes(x); }

// dz_v = gl (1[v = y] - p_v) - gH p_v (log p_v + H) + gK p_v (log p_v - log q_v - KL) + gF (p_v - q_v)
//        + gJ (1 - beta) p_v (log p_v/m_v - KL(S||M)) + gZ p_v, over temperature; the 1[v = y] term is added by the caller.
template <bool kTeacher, bool kForward, bool kMixture>
void gradient_block(const float* s, const float* t, int n, const float* state, RowGrads g, float inv_t, const Problem& p, Ahead s_next,
                    Ahead t_next, float* out) {
  const float beta = p.beta, least = p.multiplied ? kLeast : kLowest;
  const Normal student(state[sMax], inv_t, state[sLogZ]), teacher(state[sTeacherMax], inv_t, state[sTeacherLogZ]);
  const float reverse_kl = g.reverse_kl == 0 ? 0 : state[sReverseKl];  // unused it may be infinite
  const float jsd = g.jsd * (1 - beta), entropy = g.entropy * kLn2, divergence = g.reverse_kl * kLn2;
  const float constant = g.forward_kl + g.logsumexp - g.logprob - g.entropy * state[sEntropy] - g.reverse_kl * reverse_kl;
  for (int i = 0; i < n; i += W) {
    s_next.fetch(i);
    const vf x = student.log2_prob(s + i), own = mass_lanes(x, least);
    vf factor = constant - entropy * x, other{};
    if (kTeacher) {
      t_next.fetch(i);
      const vf y = teacher.log2_prob(t + i);
      factor += divergence * (x - y);
      if (kForward) other = g.forward_kl * mass_lanes(y, least);
      if (kMixture) factor += jsd * (log_ratio(bounded(y - x), 1 - beta, beta) - state[sMixtureKl]);
    }
    store(out + i, inv_t * (own * factor - other));
  }
}

// An output that is infinite (or an ignored row) passes no gradient.
RowGrads usable_grads(const Problem& p, int64_t row) {
  const float* g = p.grads + row * kValues;
  const float* state = p.state + row * kState;
  if (ignored(p, row)) return {0, 0, 0, 0, 0, 0};
  const bool teacher = p.has_teacher;
  return {p.targets && state[sLogprob] != -INFINITY ? g[kLogprob] : 0, g[kEntropy],
          teacher && state[sReverseKl] != INFINITY ? g[kReverseKl] : 0,
          teacher && state[sForwardKl] != INFINITY ? g[kForwardKl] : 0, teacher ? g[kJsd] : 0, g[kLogSumExp]};
}

template <bool kTeacher, bool kForward, bool kMixture>
void gradient_row(const Problem& p, int64_t row, RowGrads g) {
  alignas(64) float s_buffer[kBlock], t_buffer[kBlock], out[kBlock];
  const float inv_t = p.inv_temperature[row];
  for (int64_t col = 0; col < p.columns; col += kBlock) {
    const int n = (int)(p.columns - col < kBlock ? p.columns - col : kBlock);
    const float* s = load_block(p.student, row, col, n, s_buffer);
    const float* t = kTeacher ? load_block(p.teacher, row, col, n, t_buffer) : nullptr;
    const Ahead s_next(p.student, row, col + kBlock, p.columns), t_next(p.teacher, row, col + kBlock, p.columns);
    gradient_block<kTeacher, kForward, kMixture>(s, t, n, p.state + row * kState, g, inv_t, p, s_next, t_next, out);
    const int64_t hit = g.logprob != 0 ? p.targets[row] - p.first - col : -1;
    if (hit >= 0 && hit < n) out[hit] += inv_t * g.logprob;  // before rounding to the output's dtype
    store_block(p.dz, row, col, n, out);
  }
}

void zero_row(const Problem& p, int64_t row) {
  alignas(64) static const float zeros[kBlock] = {};
  for (int64_t col = 0; col < p.columns; col += kBlock)
    store_block(p.dz, row, col, (int)(p.columns - col < kBlock ? p.columns - col : kBlock), zeros);
}

void backward_row(const Problem& p, int64_t row, int) {
  const RowGrads g = usable_grads(p, row);
  if (g.jsd != 0)
    gradient_row<true, true, true>(p, row, g);
  else if (g.forward_kl != 0)
    gradient_row<true, true, false>(p, row, g);
  else if (g.reverse_kl != 0)
    gradient_row<true, false, false>(p, row, g);
  else if (g.logprob != 0 || g.entropy != 0 || g.logsumexp != 0)
    gradient_row<false, false, false>(p, row, g);
  else
    zero_row(p, row);  // nothing to pass: the logits are not read
}

// ---- notes for the sparse backward ----------------------------------------------------------------------------------

constexpr float kFarthestNoted = 1e6f;  // nats of |log p - log q|, as in reference/sparse.py

inline vf magnitude(vf a) { return pick_larger(a, -a); }

// The norms are at least the sums over this tile, so p and q are 1 at most.
template <bool kTeacher>
void note_row(const Problem& p, int64_t row, int64_t col, int n, float* sums) {
  alignas(64) float s_buffer[kBlock], t_buffer[kBlock];
  const float* s = load_block(p.student, row, col, n, s_buffer);
  const float* t = kTeacher ? load_block(p.teacher, row, col, n, t_buffer) : nullptr;
  const float factor = p.inv_temperature[row] * kLog2e, s_norm = p.notes.norm[row] * kLog2e;
  const float t_norm = kTeacher ? p.notes.teacher_norm[row] * kLog2e : 0;
  const float divergence = p.notes.divergence ? 1.0f : 0;
  for (int i = 0; i < n; i += W) {
    const vf x = at_least(load(s + i) * factor - s_norm, kLowest);
    vf u = exp2_lanes(x);
    if (kTeacher) {
      const vf y = at_least(load(t + i) * factor - t_norm, kLowest);
      u += u * divergence * at_most(kLn2 * magnitude(x - y), kFarthestNoted) + exp2_lanes(y);
    }
    store(sums + i, load(sums + i) + u);
  }
}

void note_block(const Problem& p, int64_t block, int64_t col) {
  alignas(64) float sums[kBlock] = {};
  const int n = (int)(p.columns - col < kBlock ? p.columns - col : kBlock);
  const int64_t from = block * kNoteRows - p.notes.first_row, begin = from > 0 ? from : 0;
  const int64_t end = from + kNoteRows < p.rows ? from + kNoteRows : p.rows;
  for (int64_t row = begin; row < end; ++row)
    if (!ignored(p, row)) p.has_teacher ? note_row<true>(p, row, col, n, sums) : note_row<false>(p, row, col, n, sums);
  float* to = p.notes.sums + block * p.notes.stride + col;
  for (int i = 0; i < n; ++i) to[i] += sums[i];
}

}  // namespace

#define GEAR_JOIN_(a, b) a##b
#define GEAR_JOIN(a, b) GEAR_JOIN_(a, b)
#define GEAR_TEXT_(a) #a
#define GEAR_TEXT(a) GEAR_TEXT_(a)
Isa GEAR_JOIN(GEAR_ISA, _isa)() { return {GEAR_TEXT(GEAR_ISA), sweep_row, finish_row, mixture_row, backward_row, note_block, kBlock}; }

}  // namespace gear
