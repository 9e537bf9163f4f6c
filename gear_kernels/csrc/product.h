// out = A B, or out += A B, of bfloat16 matrices in float32: what a CPU GEMM library behind torch does not offer. Or A B rounded
// to bfloat16 at the end.
#pragma once
#include <cstdint>

namespace gear {

// A [rows, depth], B [depth, columns] as raw bfloat16, out or (not with add) rounded [rows, columns]; strides in elements, one of
// each operand's is 1.
struct Product {
  const uint16_t *a = nullptr, *b = nullptr;
  float* out = nullptr;
  uint16_t* rounded = nullptr;
  int64_t rows = 0, depth = 0, columns = 0;
  int64_t a_row = 0, a_step = 0, b_step = 0, b_column = 0, out_row = 0;
  bool add = false;
  int threads = 1;  // jobs are cut for them
  bool tiles = false;  // by AMX, where has_tiles() says that it may be
};

// The work is cut into jobs, which write disjoint parts of out and may run in any order.
int64_t product_jobs(const Product&);
void product_job(const Product&, int64_t job);

}  // namespace gear
