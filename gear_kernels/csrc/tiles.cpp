// A thread has 8 tiles of 16 rows of 64 bytes: four sums, 16 rows by 64 columns of out; one of A; three that take turns for B.
// The sums of an element run over even and odd places of the depth apart, and in blocks: other roundings than AVX512-BF16's, the
// same for all rows and columns of a matrix.
#include "tiles.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace gear {
namespace {

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool ask() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: a thread's 8 KiB of tiles are saved for it from then on
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// The last rows of A, or all where the depth is no multiple of 32, with zeros beyond: tiles one after another.
void pad(const char* from, int64_t row, int64_t rows, int64_t depth, uint16_t* to) {
  memset(to, 0, sizeof(uint16_t) * kTile * kDepth);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      const int64_t n = depth - k < kTileDepth ? depth - k : kTileDepth;
      memcpy(to + k * kTile + i * kTileDepth, from + i * row + 2 * k, 2 * n);
    }
}

// Between out [rows, columns] and a whole block of sums [16, 64].
void copy(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) memcpy(to + i * to_row, from + i * from_row, sizeof(float) * columns);
}

// Sixteen rows: A's tiles are `step` bytes apart, rows of a tile `row`.
void multiply_block(const char* a, int64_t row, int64_t step, const uint32_t* panel, int64_t depth, float* out, int64_t out_bytes,
                    bool add) {
  __asm__ volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  if (add) {
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + 16, out_bytes);
    _tile_loadd(2, out + 32, out_bytes);
    _tile_loadd(3, out + 48, out_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int64_t panel_bytes = kColumns * sizeof(uint32_t);
  for (int64_t k = 0; k < depth; k += kTileDepth, a += step, panel += kTileDepth / 2 * kColumns) {
    _tile_loadd(4, a, row);
    _tile_loadd(5, panel, panel_bytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, panel + 16, panel_bytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, panel + 32, panel_bytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, panel + 48, panel_bytes);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, out, out_bytes);
  _tile_stored(1, out + 16, out_bytes);
  _tile_stored(2, out + 32, out_bytes);
  _tile_stored(3, out + 48, out_bytes);
}

}  // namespace

bool has_tiles() {
  static const bool found = ask();
  return found;
}

void begin_tiles() {
  static const Configuration all;
  _tile_loadconfig(&all);
}

void end_tiles() { _tile_release(); }

void multiply_tiles(const TileRows& a, const uint32_t* panel, int64_t depth, int64_t rows, float* out, int64_t out_row,
                    int64_t columns, bool add) {
  alignas(64) uint16_t padded[kTile * kDepth];
  alignas(64) float block[kTile * kColumns];
  for (int64_t i = 0; i < rows; i += kTile, out += kTile * out_row) {
    const int64_t count = rows - i < kTile ? rows - i : kTile;
    const char* from = a.data + i / kTile * a.block;
    int64_t row = a.row, step = a.step;
    if (a.ends && (count < kTile || depth % kTileDepth)) {
      pad(from, row, count, depth, padded);
      from = (const char*)padded, row = 2 * kTileDepth, step = 2 * kTile * kTileDepth;
    }
    if (count == kTile && columns == kColumns) {
      multiply_block(from, row, step, panel, depth, out, out_row * (int64_t)sizeof(float), add);
      continue;
    }
    if (add) copy(out, out_row, block, kColumns, count, columns);
    multiply_block(from, row, step, panel, depth, block, sizeof(float) * kColumns, add);
    copy(block, kColumns, out, out_row, count, columns);
  }
}

}  // namespace gear
