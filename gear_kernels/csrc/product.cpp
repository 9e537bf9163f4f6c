// bfloat16 x bfloat16 -> float32 by AVX512-BF16, whose instruction adds two neighbouring products to each of 16 float32 lanes; or
// by AMX (tiles.cpp), with the same panels: on two Xeon cores 200 GFLOP/s and 1150 for 128 rows (oneDNN, rounded results: 840).
//
// A panel of B, 64 columns of up to kDepth rows, is packed in pairs of rows into 32 KiB of the L1; then 6 rows of A at a time run
// through it with 24 accumulators. One Zen 5 core reaches 410 GFLOP/s for 256 rows (oneDNN with bfloat16 results: 450, float32
// GEMMs: 95) and reads B at memory's speed for a few rows. No memory beside the stack.
// Rounded results leave by way of float32 sums in the cache: a GEMM and a copy would write and read twice the bytes through memory.
// An element's sum runs over blocks of kDepth from the first row of B on, in each by pairs in order: the result depends neither
// on threads nor on the other rows and columns. The instruction reads subnormal inputs as 0 and flushes subnormal sums.
#include "product.h"
#include "tiles.h"

#include <immintrin.h>

#include <cstring>
#include <utility>

namespace gear {
namespace {

constexpr int kRows = 6;
constexpr int64_t kDirectRows = 384;  // of one job: B is packed once for them
constexpr int64_t kPackedRows = 96;   // of one job where A is packed too, into 48 KiB, or sums are kept, in 24 KiB
// Of one job with few rows, which reads rows of B at memory's speed: [16, 151936] @ [151936, 4096] takes 140 ms by 64 columns, 89
// by 256; or of one that keeps sums, in 96 KiB.
constexpr int64_t kWideColumns = 256;

inline int64_t at_most(int64_t a, int64_t most) { return a < most ? a : most; }
inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// f(0), f(1) to f(N - 1), with constants: in a loop GCC 12 keeps an array in memory, beside its registers.
template <class F, int... I>
[[gnu::always_inline]] inline void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, N>());
}

// ---- packing: a pair (k, k + 1) of one column is a 32-bit word; beyond the matrix, zeros -----------------------------

// [depth, n <= 32] with unit stride between columns -> words [depth / 2, 32], rows of which are `width` words apart.
[[gnu::noinline]] void interleave(const uint16_t* from, int64_t step, int64_t depth, int64_t n, uint32_t* to, int width) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  for (int64_t k = 0; k < depth; k += 2, to += width) {
    const __m512i even = _mm512_maskz_loadu_epi16(first(n), from + k * step);
    const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < depth ? first(n) : 0, from + (k + 1) * step);
    _mm512_store_si512(to, _mm512_permutex2var_epi16(even, order, odd));
    _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(even, upper, odd));
  }
}

// Words [16, 16] -> transposed.
[[gnu::always_inline]] inline void transpose(__m512i (&r)[16]) {
  unrolled<4>([&](auto j) {
    constexpr int i = 4 * j;
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    r[i] = _mm512_unpacklo_epi64(a, c), r[i + 1] = _mm512_unpackhi_epi64(a, c);
    r[i + 2] = _mm512_unpacklo_epi64(b, d), r[i + 3] = _mm512_unpackhi_epi64(b, d);
  });
  unrolled<4>([&](auto j) {  // r[4 i + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4 i to 4 i + 3
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(a, c, 0x88), r[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd), r[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  });
}

// [depth, n <= 16] with unit stride within a column -> words [depth / 2, 16], rows of which are `width` words apart. The columns'
// next block is fetched meanwhile: the processor does not foresee so many short runs.
void gather(const uint16_t* from, int64_t column, int64_t depth, int64_t n, uint32_t* to, int width) {
  for (int64_t k = 0; k < depth; k += 32) {
    __m512i r[16];
    unrolled<16>([&](auto i) {
      r[i] = _mm512_maskz_loadu_epi16(i < n ? first(depth - k) : 0, from + i * column + k);
      __builtin_prefetch(from + i * column + k + kDepth);
    });
    transpose(r);
    unrolled<16>([&](auto i) {
      if (k + 2 * i < depth) _mm512_store_si512(to + i * width, r[i]);
    });
    to += 16 * width;
  }
}

void pack_panel(const Product& p, int64_t k, int64_t depth, int64_t column, int64_t n, uint32_t* to) {
  const uint16_t* from = p.b + k * p.b_step + column * p.b_column;
  if (p.b_column == 1)
    for (int i = 0; i < kColumns; i += 32) interleave(from + i, p.b_step, depth, n - i, to + i, kColumns);
  else
    for (int i = 0; i < kColumns; i += 16) gather(from + i * p.b_column, p.b_column, depth, n - i, to + i, kColumns);
  const int64_t pairs = blocks(depth, 2), whole = blocks(depth, kTileDepth) * kTileDepth / 2;  // tiles read whole ones
  if (p.tiles) memset(to + pairs * kColumns, 0, (whole - pairs) * kColumns * sizeof(uint32_t));
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

struct Words {  // of A: the word of row i and pair k is at data + i * row + k * step bytes
  const char* data;
  int64_t row, step;
};

inline __m512i word(const char* p, int size) {
  uint32_t w = 0;
  memcpy(&w, p, size);
  return _mm512_set1_epi32((int)w);
}

template <int R>
struct Sums {
  __m512 at[4 * R];

  // Adds R words of A, the last columns' of `size` 2, times a row of a panel.
  [[gnu::always_inline]] void add(const Words& a, const uint32_t* panel, int size) {
    const __m512i* b = (const __m512i*)panel;
    unrolled<R>([&](auto i) {
      const __m512i w = word(a.data + i * a.row, size);
      unrolled<4>([&](auto j) { at[4 * i + j] = _mm512_dpbf16_ps(at[4 * i + j], (__m512bh)w, (__m512bh)b[j]); });
    });
  }
};

// R rows of out (+)= `depth` columns of A times a panel.
template <int R>
void multiply(Words a, const uint32_t* panel, int64_t depth, float* out, int64_t out_row, int64_t columns, bool add) {
  Sums<R> sums;
  unrolled<4 * R>([&](auto i) {  // out is fetched meanwhile: [4096, 128] @ [128, 1024] takes 5.2 ms without that, 3.0 with
    sums.at[i] = _mm512_setzero_ps();
    __builtin_prefetch(out + i / 4 * out_row + i % 4 * 16, 1);
  });
  for (int64_t k = 0; k + 2 <= depth; k += 2, a.data += a.step, panel += kColumns) sums.add(a, panel, 4);
  if (depth % 2) sums.add(a, panel, 2);  // the panel has a zero there, A may end
  unrolled<4 * R>([&](auto i) {
    const __mmask16 mask = (__mmask16)first(columns - i % 4 * 16);
    float* to = out + i / 4 * out_row + i % 4 * 16;
    const __m512 before = _mm512_maskz_loadu_ps(add ? mask : 0, to);
    _mm512_mask_storeu_ps(to, mask, add ? _mm512_add_ps(before, sums.at[i]) : sums.at[i]);
  });
}

using Multiply = void (*)(Words, const uint32_t*, int64_t, float*, int64_t, int64_t, bool);
constexpr Multiply kMultiply[kRows] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

void multiply_rows(Words a, const uint32_t* panel, int64_t depth, int64_t rows, float* out, int64_t out_row, int64_t n,
                   bool add) {
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t count = at_most(rows - i, kRows);
    kMultiply[count - 1]({a.data + i * a.row, a.row, a.step}, panel, depth, out + i * out_row, out_row, n, add);
  }
}

#ifdef GEAR_AMX
// A's [depth, rows] with unit stride between rows -> tiles one after another, those of 16 rows after those of the 16 before, with
// zeros beyond the matrix.
void pack_tiles(const uint16_t* from, int64_t step, int64_t depth, int64_t rows, uint32_t* to) {
  constexpr int kPairs = kTileDepth / 2, kWords = kTile * kPairs, kBlock = kDepth / kTileDepth * kWords;
  for (int64_t i = 0; i < rows; i += 2 * kTile)
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      alignas(64) uint32_t words[kPairs * 32] = {};
      interleave(from + i + k * step, step, at_most(depth - k, kTileDepth), rows - i, words, 32);
      for (int half = 0; half < 2; ++half) {
        __m512i r[16];
        unrolled<16>([&](auto j) { r[j] = _mm512_load_si512(words + 32 * j + 16 * half); });
        transpose(r);
        uint32_t* tile = to + (i / kTile + half) * kBlock + k / kTileDepth * kWords;
        unrolled<16>([&](auto j) { _mm512_store_si512(tile + 16 * j, r[j]); });
      }
    }
}
#endif

// A block of A's rows and depth, as the kernel in use reads it.
struct Block {
  Words words;
  TileRows tiles;
};

// Many rows of A that can be read in place, and few columns; or few rows that are packed, and all columns, unless their sums over
// several blocks of the depth must be kept.
inline bool direct(const Product& p) { return p.a_step == 1; }
inline bool keeps(const Product& p) { return p.rounded && p.depth > kDepth; }
inline int64_t job_rows(const Product& p) { return direct(p) && !p.rounded ? kDirectRows : kPackedRows; }
inline int64_t job_columns(const Product& p) {
  if (keeps(p)) return kWideColumns;
  if (!direct(p)) return p.columns;
  if (p.rows > kPackedRows || p.b_column != 1) return kColumns;
  const int64_t share = p.columns / p.threads / kColumns * kColumns;  // of a thread
  return share < kColumns ? kColumns : at_most(share, kWideColumns);
}

void zero(const Product& p) {
  for (int64_t i = 0; i < p.rows && !p.add; ++i) {
    if (p.rounded) memset(p.rounded + i * p.out_row, 0, p.columns * sizeof(uint16_t));
    else memset(p.out + i * p.out_row, 0, p.columns * sizeof(float));
  }
}

void round_panel(const float* sums, int64_t rows, int64_t n, uint16_t* to, int64_t step) {
  for (int64_t i = 0; i < rows; ++i, sums += kColumns, to += step)
    for (int j = 0; j < kColumns; j += 32)
      _mm512_mask_storeu_epi16(to + j, first(n - j),
                               (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + j + 16), _mm512_load_ps(sums + j)));
}

Block pack_block(const Product& p, const uint16_t* from, int64_t depth, int64_t rows, uint32_t* packed) {
  Block a{{(const char*)from, 2 * p.a_row, 4}, {(const char*)from, 2 * p.a_row, 2 * kTile * p.a_row, 2 * kTileDepth, true}};
  if (direct(p)) return a;
#ifdef GEAR_AMX
  if (p.tiles) {
    pack_tiles(from, p.a_step, depth, rows, packed);
    a.tiles = {(const char*)packed, 2 * kTileDepth, 2 * kTile * kDepth, 2 * kTile * kTileDepth, false};
    return a;
  }
#endif
  for (int64_t i = 0; i < rows; i += 32) interleave(from + i, p.a_step, depth, rows - i, packed + i, kPackedRows);
  a.words = {(const char*)packed, 4, 4 * kPackedRows};
  return a;
}

void multiply_panel(const Product& p, const Block& a, const uint32_t* panel, int64_t depth, int64_t rows, float* out,
                    int64_t out_row, int64_t n, bool add) {
#ifdef GEAR_AMX
  if (p.tiles) return multiply_tiles(a.tiles, panel, depth, rows, out, out_row, n, add);
#endif
  multiply_rows(a.words, panel, depth, rows, out, out_row, n, add);
}

}  // namespace

// A job's use of the tiles.
struct Tiles {
  explicit Tiles(const Product& p) : used(p.tiles) {
#ifdef GEAR_AMX
    if (used) begin_tiles();
#endif
  }
  ~Tiles() {
#ifdef GEAR_AMX
    if (used) end_tiles();
#endif
  }
  const bool used;
};

int64_t product_jobs(const Product& p) {
  if (p.rows == 0 || p.columns == 0) return 0;
  return p.depth == 0 ? 1 : blocks(p.rows, job_rows(p)) * blocks(p.columns, job_columns(p));
}

void product_job(const Product& p, int64_t job) {
  if (p.depth == 0) return zero(p);
  const Tiles tiles(p);
  alignas(64) uint32_t panel[kDepth / 2 * kColumns], packed[kDepth / 2 * kPackedRows];
  alignas(64) float kept[kPackedRows * kWideColumns];
  const int64_t tall = blocks(p.rows, job_rows(p)), row = job % tall * job_rows(p), rows = at_most(p.rows - row, job_rows(p));
  const int64_t begin = job / tall * job_columns(p), end = at_most(p.columns, begin + job_columns(p));
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t depth = at_most(p.depth - k, kDepth);
    const Block a = pack_block(p, p.a + row * p.a_row + k * p.a_step, depth, rows, packed);
    for (int64_t column = begin; column < end; column += kColumns) {
      const int64_t n = at_most(end - column, kColumns);
      pack_panel(p, k, depth, column, n, panel);
      if (!p.rounded) {
        multiply_panel(p, a, panel, depth, rows, p.out + row * p.out_row + column, p.out_row, n, p.add || k > 0);
        continue;
      }
      float* sums = kept + (keeps(p) ? (column - begin) * kPackedRows : 0);
      multiply_panel(p, a, panel, depth, rows, sums, kColumns, kColumns, k > 0);
      if (k + depth == p.depth) round_panel(sums, rows, n, p.rounded + row * p.out_row + column, p.out_row);
    }
  }
}

}  // namespace gear
