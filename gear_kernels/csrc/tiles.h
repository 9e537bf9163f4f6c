// The panels of product.cpp by AMX, whose instruction multiplies [16, 32] by [32, 16] bfloat16 into float32.
#pragma once
#include <cstdint>

namespace gear {

constexpr int kDepth = 256, kColumns = 64;  // of a panel of B, see product.cpp
constexpr int kTile = 16;       // rows of a tile
constexpr int kTileDepth = 32;  // bfloat16 of a tile's row, 64 bytes

// Rows of A: the tile of rows 16 i and depth 32 k on is at data + i * block + k * step bytes, its rows `row` bytes apart. Where
// `ends`, nothing may be read beyond the last row and the depth; else there are zeros.
struct TileRows {
  const char* data;
  int64_t row, block, step;
  bool ends;
};

// Whether this processor has AMX and the system lets this process use it; asked once.
bool has_tiles();

// Between both, this thread may call multiply_tiles.
void begin_tiles();
void end_tiles();

// `rows` rows of out [.., columns <= 64] (+)= `depth` columns of A times a panel, whose rows end in zeros up to a multiple of 16.
void multiply_tiles(const TileRows& a, const uint32_t* panel, int64_t depth, int64_t rows, float* out, int64_t out_row,
                    int64_t columns, bool add);

}  // namespace gear
