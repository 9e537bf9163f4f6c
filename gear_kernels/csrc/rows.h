// The row kernels' interface. rows.cpp is compiled once per instruction set; module.cpp picks one at run time.
#pragma once
#include <cstdint>

namespace gear {

enum class Dtype : int { f32, bf16, f16 };

// A [rows, cols] matrix of logits with both strides, in elements.
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0, col_stride = 0;
  Dtype dtype = Dtype::f32;
};

// Order of the rows of `values` [6, rows]; the Python side uses the same order (reference.STAT_NAMES).
enum Value { kLogprob, kTeacherLogprob, kEntropy, kTeacherEntropy, kReverseKl, kForwardKl, kValues };
// Order of the columns of `state` [rows, 8], all that the backward needs beside the logits.
enum State { sMax, sLogZ, sTeacherMax, sTeacherLogZ, sEntropy, sReverseKl, sForwardKl, sLogprob, kState };
// Order of the columns of `grads` [rows, 4].
enum Grad { gLogprob, gEntropy, gReverseKl, gForwardKl, kGrads };

struct Problem {
  Matrix student, teacher;          // teacher.data is null where there is no teacher
  int64_t rows = 0, vocab = 0;
  const int64_t* targets = nullptr; // null: no log-probs, no ignored rows
  int64_t ignore_index = 0;
  const float* inv_temperature = nullptr;  // [rows]
  float* values = nullptr;          // [kValues, rows]
  float* state = nullptr;           // [rows, kState]
  const float* grads = nullptr;     // [rows, kGrads], backward only
  Matrix dz;                        // [rows, vocab], backward only; may be the student matrix itself
};

using RowFunction = void (*)(const Problem&, int64_t row);
struct Isa {
  const char* name;
  RowFunction forward, backward;
};

Isa baseline_isa();
Isa avx2_isa();
Isa avx512_isa();

}  // namespace gear
