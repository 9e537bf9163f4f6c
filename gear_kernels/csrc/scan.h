// The credit scan over packed trajectories: normalise, segment, weigh; one sequence at a time, in the order of reference.py.
#pragma once
#include <cstdint>

namespace gear {

// Orders are those of NORMALIZERS and SEGMENTERS in credit.py; `random` stays in Python, which draws its places.
enum Normalizer { kReluMax, kMax, kMinMax, kAbsMax, kQuantile, kNone };
enum Segmenter { kEntropySegments, kToken, kKlOnly, kEntropyOnly, kTurn, kEntropyWindow, kRandom, kFixed };

// Columns of `tallies` [sequences, kTallies], float64: sums over a sequence's policy tokens.
enum Tally { tTokens, tAbove, tInside, tSegments, tUnclosed, tSignal, tPositive, tWeightPositive, tNegative, tWeightNegative, kTallies };

struct ScanOptions {
  int normalizer = kReluMax, segmenter = kEntropySegments;
  double quantile = 0.95, threshold = 0.1, ratio = 1.5, alpha = 0.2, floor = 0;
  int64_t longest = 0;  // of a segment, in policy tokens; 0: no limit
  int64_t fixed = 8, window = 8;
  bool renormalize = false, stop_at_turn = false;
};

// T is float or double. Pointers [tokens] but for advantages [sequences] and bounds [sequences + 1].
template <class T>
struct Scan {
  const T *signal = nullptr, *entropy = nullptr, *advantages = nullptr;
  const bool* mask = nullptr;            // null: every token is the policy's
  const int64_t* turns = nullptr;        // null: no turns
  const int64_t* bounds = nullptr;
  int64_t sequences = 0;
  T *token_advantages = nullptr, *weights = nullptr, *g = nullptr, *credit = nullptr;
  int32_t* ids = nullptr;
  bool* onsets = nullptr;
  double* tallies = nullptr;
};

// -1, or the first packed token whose signal (or entropy) is NaN on a policy token.
struct Nan {
  int64_t signal = -1, entropy = -1;
};

template <class T>
Nan scan(const Scan<T>& s, const ScanOptions& options, int threads);

}  // namespace gear
