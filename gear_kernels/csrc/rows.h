// The row kernels' interface. rows.cpp is compiled once per instruction set; module.cpp picks one at run time.
#pragma once
#include <cstdint>

#include "tables.h"

namespace gear {

enum class Dtype : int { f32, bf16, f16 };

// A [rows, cols] matrix of logits with both strides, in elements.
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
  Dtype dtype = Dtype::f32;
};

enum Sum { GEAR_SUMS(GEAR_ENUMERATOR) kSums };
enum Value { GEAR_VALUES(GEAR_ENUMERATOR) kValues };
enum State { GEAR_STATE(GEAR_ENUMERATOR) kState };

// What the sparse backward notes of a tile: sums over blocks of kNoteRows rows of p (1 + |log p/q|) + q, one a column.
constexpr int kNoteRows = 128;  // reference.sparse.ROWS
struct Notes {
  float* sums = nullptr;             // [blocks, columns] of the blocks that the tile lies in; blocks are `stride` apart
  int64_t stride = 0;
  int64_t first_row = 0;             // the tile's first row within its first block
  const float *norm = nullptr, *teacher_norm = nullptr;  // [rows]: log sum e^(z / T), or less
  bool divergence = false;  // whether the middle term counts
};

// A tile of logits (or, for finish, only its rows) and the tables that the function called reads or writes.
struct Problem {
  Matrix student, teacher;
  bool has_teacher = false;          // without one, what reads it is 0
  int64_t rows = 0, columns = 0;
  int64_t first = 0;                 // the tile's first column in the whole vocabulary
  bool teacher_moments = false;      // sweep: its entropy or the forward KL is wanted
  int splits = 1;                    // column ranges that are summed apart
  const int64_t* targets = nullptr;  // null: no log-probs, no ignored rows
  int64_t ignore_index = 0;
  const float* inv_temperature = nullptr;  // [rows]
  double* sums = nullptr;            // [splits, rows, kSums]; a split's rows are split_stride apart
  double* shares = nullptr;          // [splits, rows, 2]: KL(student || mixture), KL(teacher || mixture)
  int64_t split_stride = 0;          // of sums or shares, in elements
  float* values = nullptr;           // [kValues, rows]
  float* state = nullptr;            // [rows, kState]
  const float* grads = nullptr;      // [rows, kValues]
  float beta = 0.5f;                 // the teacher's part of the mixture
  Matrix dz;                         // [rows, columns]
  // gradient: dz goes into products. A p below 2^-90 is then 0: it adds nothing to a float32 sum, and subnormal numbers, it or its
  // products, made the two GEMMs take twice their time at 0.4 nats (4096 rows, V = 49152, D = 576: 4.9 s in all, now 3.0).
  bool multiplied = false;
  Notes notes;
};

using RowFunction = void (*)(const Problem&, int64_t row, int split);
struct Isa {
  const char* name;
  RowFunction sweep, finish, mixture, gradient;
  void (*note)(const Problem&, int64_t block, int64_t column);  // note_columns of them, from this one on
  int64_t note_columns;
};

Isa baseline_isa();
Isa avx2_isa();
Isa avx512_isa();

}  // namespace gear
