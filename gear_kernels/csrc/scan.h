// The credit scan over packed trajectories: normalise, segment, weigh; one sequence at a time, in the order of reference/credit.py.
#pragma once
#include <cstdint>

#include "tables.h"

namespace gear {

enum Rule { GEAR_RULES(GEAR_ENUMERATOR) kRules };
enum Normalizer { GEAR_NORMALIZERS(GEAR_ENUMERATOR) kNormalizers };
enum Segmenter { GEAR_SEGMENTERS(GEAR_ENUMERATOR) kSegmenters };
enum Tally { GEAR_TALLIES(GEAR_ENUMERATOR) kTallies };
constexpr double kSilent = 1e-3;  // nats, reference.credit.SILENT: a scale below this or below the floor is silent

struct ScanOptions {  // the fields of rules.Lowered, and the rule's level over the pack
  int rule = kGear, normalizer = kNone, segmenter = kToken;
  double a = 0, b = 0, c = 0, level = 1;
  double quantile = 0.95, signal_floor = 0, threshold = 0, ratio = 1, floor = 0;
  int64_t longest = 0, window = 1;
  bool renormalize = false, stop_at_turn = false;
};

// T is float or double. Pointers [tokens] but for advantages [sequences] and bounds [sequences + 1].
template <class T>
struct Scan {
  const T *signal = nullptr, *second = nullptr, *advantages = nullptr;  // null signal: zeros
  const bool* mask = nullptr;            // null: every token is the policy's
  const int64_t* turns = nullptr;        // null: no turns
  const int64_t* bounds = nullptr;
  int64_t sequences = 0;
  T *token_advantages = nullptr, *weights = nullptr, *g = nullptr, *credit = nullptr;
  int32_t* ids = nullptr;
  bool* onsets = nullptr;
  double* tallies = nullptr;
};

// -1, or the first packed token whose signal (or second row) is NaN on a policy token.
struct Nan {
  int64_t signal = -1, second = -1;
};

template <class T>
Nan scan(const Scan<T>& s, const ScanOptions& options, int threads);

}  // namespace gear
