// Python bindings of the row kernels: DLPack arrays in (no copy, strides kept), OpenMP over rows, instruction set by name.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "product.h"
#include "rows.h"
#include "scan.h"
#include "tiles.h"

namespace nb = nanobind;
using namespace gear;

using Logits = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using LogitsOut = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using Targets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using TableOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<double, nb::ndim<3>, nb::device::cpu>;  // [splits, rows, n], any stride between splits

namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

std::vector<Isa> supported() {  // best last
  std::vector<Isa> found{baseline_isa()};
#ifdef GEAR_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(avx2_isa());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(avx512_isa());
#endif
  return found;
}

Isa named(const std::string& name) {
  for (const Isa& isa : supported())
    if (name == isa.name) return isa;
  throw std::invalid_argument("this processor has no instruction set '" + name + "'");
}

template <class Array>
Matrix matrix(const Array& a) {
  const auto type = a.dtype();
  Matrix m;
  m.data = const_cast<void*>(static_cast<const void*>(a.data()));
  m.row_stride = a.stride(0), m.col_stride = a.stride(1);
  if (type == nb::dtype<float>())
    m.dtype = Dtype::f32;
  else if (type.code == (uint8_t)nb::dlpack::dtype_code::Bfloat && type.bits == 16)
    m.dtype = Dtype::bf16;
  else if (type.code == (uint8_t)nb::dlpack::dtype_code::Float && type.bits == 16)
    m.dtype = Dtype::f16;
  else
    throw std::invalid_argument("logits must be float32, bfloat16 or float16");
  return m;
}

void run(RowFunction f, const Problem& p, int threads) {
  nb::gil_scoped_release nogil;
  const int64_t items = p.rows * p.splits;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < items; ++i) f(p, i % p.rows, (int)(i / p.rows));
}

void set_rows(Problem& p, const std::optional<Targets>& targets, int64_t ignore_index, const Vector& inv_temperature) {
  if (targets) {
    require((int64_t)targets->shape(0) == p.rows, "targets shape");
    p.targets = targets->data();
  }
  p.ignore_index = ignore_index;
  require((int64_t)inv_temperature.shape(0) == p.rows, "inv_temperature shape");
  p.inv_temperature = inv_temperature.data();
}

Problem problem(const Logits& student, const std::optional<Logits>& teacher, const std::optional<Targets>& targets,
                int64_t ignore_index, const Vector& inv_temperature, int64_t first) {
  Problem p;
  p.student = matrix(student);
  p.rows = (int64_t)student.shape(0), p.columns = (int64_t)student.shape(1), p.first = first;
  if (teacher) {
    require(teacher->shape(0) == student.shape(0) && teacher->shape(1) == student.shape(1), "teacher shape");
    p.teacher = matrix(*teacher), p.has_teacher = true;
  }
  set_rows(p, targets, ignore_index, inv_temperature);
  return p;
}

double* set_splits(Problem& p, Sums& table, int64_t width, const char* what) {
  const bool rows_follow = table.shape(1) < 2 || table.stride(1) == width;
  require((int64_t)table.shape(1) == p.rows && (int64_t)table.shape(2) == width && table.stride(2) == 1 && rows_follow, what);
  p.splits = (int)table.shape(0), p.split_stride = table.stride(0);
  return table.data();
}

float* checked_state(const Problem& p, const TableOut& state) {
  require((int64_t)state.shape(0) == p.rows && state.shape(1) == kState, "state shape");
  return state.data();
}

void sweep(const Logits& student, const std::optional<Logits>& teacher, const std::optional<Targets>& targets,
           int64_t ignore_index, const Vector& inv_temperature, int64_t first, bool teacher_moments, Sums sums, int threads,
           const std::string& isa) {
  Problem p = problem(student, teacher, targets, ignore_index, inv_temperature, first);
  p.teacher_moments = teacher_moments;
  p.sums = set_splits(p, sums, kSums, "sums shape");
  run(named(isa).sweep, p, threads);
}

void finish(Sums sums, const std::optional<Targets>& targets, int64_t ignore_index, const Vector& inv_temperature, bool teacher,
            TableOut values, TableOut state, int threads, const std::string& isa) {
  Problem p;
  p.rows = (int64_t)sums.shape(1), p.has_teacher = teacher;
  set_rows(p, targets, ignore_index, inv_temperature);
  p.sums = set_splits(p, sums, kSums, "sums shape");
  require(values.shape(0) == kValues && (int64_t)values.shape(1) == p.rows, "values shape");
  p.values = values.data(), p.state = checked_state(p, state);
  const RowFunction f = named(isa).finish;  // itself walks the splits
  nb::gil_scoped_release nogil;
#pragma omp parallel for num_threads(threads) if (threads > 1 && p.rows > 4096) schedule(static)
  for (int64_t row = 0; row < p.rows; ++row) f(p, row, 0);
}

void mixture(const Logits& student, const Logits& teacher, const std::optional<Targets>& targets, int64_t ignore_index,
             const Vector& inv_temperature, int64_t first, TableOut state, float beta, Sums shares, int threads,
             const std::string& isa) {
  Problem p = problem(student, teacher, targets, ignore_index, inv_temperature, first);
  p.state = checked_state(p, state), p.beta = beta;
  p.shares = set_splits(p, shares, 2, "shares shape");
  run(named(isa).mixture, p, threads);
}

template <bool kMultiplied>
void gradient(const Logits& student, const std::optional<Logits>& teacher, const std::optional<Targets>& targets,
              int64_t ignore_index, const Vector& inv_temperature, int64_t first, TableOut state, float beta, const Table& grads,
              LogitsOut dz, int threads, const std::string& isa) {
  Problem p = problem(student, teacher, targets, ignore_index, inv_temperature, first);
  require((int64_t)grads.shape(0) == p.rows && grads.shape(1) == kValues, "grads shape");
  require(dz.shape(0) == student.shape(0) && dz.shape(1) == student.shape(1), "dz shape");
  p.state = checked_state(p, state), p.beta = beta, p.grads = grads.data(), p.dz = matrix(dz);
  p.multiplied = kMultiplied;
  run(named(isa).gradient, p, threads);
}

// sums [blocks, columns]: of the blocks that the tile's rows lie in, the first of which begins first_row rows before the tile.
void note(const Logits& student, const std::optional<Logits>& teacher, const std::optional<Targets>& targets, int64_t ignore_index,
          const Vector& inv_temperature, int64_t first, const Vector& norm, const std::optional<Vector>& teacher_norm,
          int64_t first_row, bool divergence, nb::ndarray<float, nb::ndim<2>, nb::device::cpu> sums, int threads,
          const std::string& isa) {
  Problem p = problem(student, teacher, targets, ignore_index, inv_temperature, first);
  require((int64_t)norm.shape(0) == p.rows && p.has_teacher == teacher_norm.has_value(), "norm shape");
  require(!teacher_norm || (int64_t)teacher_norm->shape(0) == p.rows, "teacher_norm shape");
  const int64_t blocks = (first_row + p.rows + kNoteRows - 1) / kNoteRows;
  require((int64_t)sums.shape(0) == blocks && (int64_t)sums.shape(1) == p.columns, "sums shape");
  require(p.columns < 2 || sums.stride(1) == 1, "sums must have unit stride within a block");
  p.notes = {sums.data(), sums.stride(0), first_row, norm.data(), teacher_norm ? teacher_norm->data() : nullptr, divergence};
  const Isa f = named(isa);
  const int64_t chunks = (p.columns + f.note_columns - 1) / f.note_columns;
  nb::gil_scoped_release nogil;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < blocks * chunks; ++i) f.note(p, i / chunks, i % chunks * f.note_columns);
}

// ---- product of bfloat16 matrices -------------------------------------------------------------------------------------

bool has_product() {
#ifdef GEAR_BF16
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool may_use_tiles() {
#ifdef GEAR_AMX
  return has_product() && has_tiles();
#else
  return false;
#endif
}

using Half = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;

// out [m, n], float32 or bfloat16, = a [m, k] @ b [k, n], both bfloat16; += where `add`, in float32 alone.
// tiles: by AMX, for who asked may_use_tiles.
void product(const Half& a, const Half& b, LogitsOut out, bool add, bool tiles, int threads) {
  require(has_product(), "this processor has no AVX512-BF16");
  const Matrix x = matrix(a), y = matrix(b), z = matrix(out);
  require(x.dtype == Dtype::bf16 && y.dtype == Dtype::bf16, "operands must be bfloat16");
  Product p;
  p.rows = (int64_t)a.shape(0), p.depth = (int64_t)a.shape(1), p.columns = (int64_t)b.shape(1), p.add = add;
  p.threads = threads > 1 ? threads : 1;
  p.tiles = tiles && may_use_tiles();
  require((int64_t)b.shape(0) == p.depth && (int64_t)out.shape(0) == p.rows && (int64_t)out.shape(1) == p.columns, "shapes");
  require(z.dtype == Dtype::f32 || (z.dtype == Dtype::bf16 && !add), "out must be float32, or bfloat16 and not added to");
  p.a = static_cast<const uint16_t*>(x.data), p.b = static_cast<const uint16_t*>(y.data);
  if (z.dtype == Dtype::f32) p.out = static_cast<float*>(out.data());
  else p.rounded = static_cast<uint16_t*>(out.data());
  // where a dimension has one element, its stride may hold anything
  p.a_row = p.rows == 1 ? 1 : x.row_stride, p.a_step = p.depth == 1 ? 1 : x.col_stride;
  p.b_step = p.depth == 1 ? 1 : y.row_stride, p.b_column = p.columns == 1 ? 1 : y.col_stride;
  p.out_row = out.stride(0);
  require((p.a_row == 1 || p.a_step == 1) && (p.b_step == 1 || p.b_column == 1), "one stride of an operand must be 1");
  require(p.columns == 1 || out.stride(1) == 1, "out must have unit stride within a row");
#ifdef GEAR_BF16
  nb::gil_scoped_release nogil;
  const int64_t jobs = product_jobs(p);
#pragma omp parallel for num_threads(threads) if (threads > 1 && jobs > 1) schedule(static)
  for (int64_t i = 0; i < jobs; ++i) product_job(p, i);
#endif
}

// ---- credit scan ------------------------------------------------------------------------------------------------------

template <class T>
using Column = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
T* tokens(const Column<T>& x, int64_t count, const char* what) {
  require((int64_t)x.shape(0) == count, what);
  return x.data();
}

// Inputs, then outputs in the order of Credit's fields, then the tallies; returns the first NaN of signal and of the second row.
template <class T>
std::pair<int64_t, int64_t> credit_scan(std::optional<Column<const T>> signal, std::optional<Column<const T>> second, Column<const T> advantages,
                                        std::optional<Column<const bool>> mask, std::optional<Column<const int64_t>> turns,
                                        Column<const int64_t> bounds, std::vector<Column<T>> floats, Column<int32_t> ids,
                                        Column<bool> onsets, nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu> tallies,
                                        const ScanOptions& options, int threads) {
  const int64_t n = (int64_t)ids.shape(0), sequences = (int64_t)bounds.shape(0) - 1;
  Scan<T> s;
  s.bounds = bounds.data(), s.sequences = sequences;
  if (signal) s.signal = tokens(*signal, n, "signal shape");
  if (second) s.second = tokens(*second, n, "second shape");
  if (mask) s.mask = tokens(*mask, n, "mask shape");
  if (turns) s.turns = tokens(*turns, n, "turns shape");
  s.advantages = tokens(advantages, sequences, "advantages shape");
  require(floats.size() == 4, "four outputs of floats");
  T** const out[] = {&s.token_advantages, &s.weights, &s.g, &s.credit};
  for (int i = 0; i < 4; ++i) *out[i] = tokens(floats[i], n, "output shape");
  s.ids = tokens(ids, n, "ids shape"), s.onsets = tokens(onsets, n, "onsets shape");
  require((int64_t)tallies.shape(0) == sequences && tallies.shape(1) == kTallies, "tallies shape");
  s.tallies = tallies.data();
  nb::gil_scoped_release nogil;
  const Nan nan = scan(s, options, threads);
  return {nan.signal, nan.second};
}

#define GEAR_NAME(name, enumerator) #name,

std::map<std::string, std::vector<std::string>> tables() {
  return {{"sums", {GEAR_SUMS(GEAR_NAME)}}, {"values", {GEAR_VALUES(GEAR_NAME)}}, {"state", {GEAR_STATE(GEAR_NAME)}},
          {"rules", {GEAR_RULES(GEAR_NAME)}}, {"normalizers", {GEAR_NORMALIZERS(GEAR_NAME)}},
          {"segmenters", {GEAR_SEGMENTERS(GEAR_NAME)}}, {"tallies", {GEAR_TALLIES(GEAR_NAME)}},
          {"note_rows", {std::to_string(kNoteRows)}}};
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Compiled CPU pass of gear_kernels.token_stats; use it through gear_kernels, not directly.";
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Isa& isa : supported()) names.emplace_back(isa.name);
    return names;
  });
  m.def("tables", &tables);  // names in the order of the columns and numbers that the functions below take
  const auto student = nb::arg("student"), ignore_index = nb::arg("ignore_index"), inv_temperature = nb::arg("inv_temperature"),
             first = nb::arg("first"), threads = nb::arg("threads"), isa = nb::arg("isa");
  m.def("sweep", &sweep, student, nb::arg("teacher").none(), nb::arg("targets").none(), ignore_index, inv_temperature, first,
        nb::arg("teacher_moments"), nb::arg("sums"), threads, isa);
  m.def("finish", &finish, nb::arg("sums"), nb::arg("targets").none(), ignore_index, inv_temperature, nb::arg("teacher"),
        nb::arg("values"), nb::arg("state"), threads, isa);
  m.def("mixture", &mixture, student, nb::arg("teacher"), nb::arg("targets").none(), ignore_index, inv_temperature, first,
        nb::arg("state"), nb::arg("beta"), nb::arg("shares"), threads, isa);
  const auto def_gradient = [&](const char* name, auto function) {
    m.def(name, function, student, nb::arg("teacher").none(), nb::arg("targets").none(), ignore_index, inv_temperature, first,
          nb::arg("state"), nb::arg("beta"), nb::arg("grads"), nb::arg("dz"), threads, isa);
  };
  def_gradient("gradient", &gradient<false>), def_gradient("multiplied_gradient", &gradient<true>);
  m.def("note", &note, student, nb::arg("teacher").none(), nb::arg("targets").none(), ignore_index, inv_temperature, first,
        nb::arg("norm"), nb::arg("teacher_norm").none(), nb::arg("first_row"), nb::arg("divergence"),
        nb::arg("sums"), threads, isa);
  m.def("has_product", &has_product);
  m.def("may_use_tiles", &may_use_tiles);
  m.def("product", &product, nb::arg("a"), nb::arg("b"), nb::arg("out"), nb::arg("add"), nb::arg("tiles"), threads);
  nb::class_<ScanOptions>(m, "ScanOptions")
      .def(nb::init<>())
      .def_rw("rule", &ScanOptions::rule)
      .def_rw("normalizer", &ScanOptions::normalizer)
      .def_rw("segmenter", &ScanOptions::segmenter)
      .def_rw("a", &ScanOptions::a)
      .def_rw("b", &ScanOptions::b)
      .def_rw("c", &ScanOptions::c)
      .def_rw("level", &ScanOptions::level)
      .def_rw("quantile", &ScanOptions::quantile)
      .def_rw("signal_floor", &ScanOptions::signal_floor)
      .def_rw("threshold", &ScanOptions::threshold)
      .def_rw("ratio", &ScanOptions::ratio)
      .def_rw("floor", &ScanOptions::floor)
      .def_rw("longest", &ScanOptions::longest)
      .def_rw("window", &ScanOptions::window)
      .def_rw("renormalize", &ScanOptions::renormalize)
      .def_rw("stop_at_turn", &ScanOptions::stop_at_turn);
  const auto signal = nb::arg("signal").none(), second = nb::arg("second").none(), mask = nb::arg("mask").none(),
             turns = nb::arg("turns").none();
  m.def("scan", &credit_scan<float>, signal, second, nb::arg("advantages"), mask, turns, nb::arg("bounds"),
        nb::arg("floats"), nb::arg("ids"), nb::arg("onsets"), nb::arg("tallies"), nb::arg("options"), threads);
  m.def("scan", &credit_scan<double>, signal, second, nb::arg("advantages"), mask, turns, nb::arg("bounds"),
        nb::arg("floats"), nb::arg("ids"), nb::arg("onsets"), nb::arg("tallies"), nb::arg("options"), threads);
}
