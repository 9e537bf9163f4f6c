// The credit scan over packed trajectories: normalise, segment, weigh; one sequence at a time, in the order of reference.py.
#pragma once
#include <cstdint>

namespace gear {

// Orders are those of RULES, NORMALIZERS and SEGMENTERS in methods.py; `random` stays in Python, which draws its places.
enum Rule { kGear, kRatio, kGatedRatio, kShare, kMargin, kAtLeast, kLift };
enum Normalizer { kReluMax, kMax, kMinMax, kAbsMax, kQuantile, kNone };
enum Segmenter { kEntropySegments, kToken, kKlOnly, kEntropyOnly, kTurn, kEntropyWindow, kRandom, kFixed, kStable };

// Columns of `tallies` [sequences, kTallies], float64: sums over a sequence's policy tokens; tSilent: 1 if its scale is small.
enum Tally {
  tTokens, tAbove, tInside, tSegments, tUnclosed, tSignal, tPositive, tWeightPositive, tNegative, tWeightNegative, tSilent, kTallies
};
constexpr double kSilent = 1e-3;  // nats, reference.SILENT: a scale below this or below the floor is silent

struct ScanOptions {  // fields of methods.Scan; `level` is its value over the pack
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
