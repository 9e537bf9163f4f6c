// See scan.h. Compiled without contraction to fused multiply-adds: results are bitwise those of reference/credit.py.
#include "scan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace gear {
namespace {

template <class T>
T bounded(T x) {  // an infinite KL becomes the largest finite one: g = 1, not NaN
  const T big = std::numeric_limits<T>::max() / 4;
  return x < -big ? -big : x > big ? big : x;
}

template <class T>
T clip(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// Reductions in eight lanes, joined in order: one lane waits four cycles for each of its own steps (they took a third of a pass).
constexpr int kLanes = 8;

template <class A, class T, class F>
A reduce(const T* x, int64_t n, A start, F join) {
  A lane[kLanes];
  std::fill_n(lane, kLanes, start);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lane[k] = join(lane[k], (A)x[i + k]);
  for (; i < n; ++i) lane[0] = join(lane[0], (A)x[i]);
  for (int k = 1; k < kLanes; ++k) lane[0] = join(lane[0], lane[k]);
  return lane[0];
}

template <class T>
double sum(const T* x, int64_t n) {
  return reduce(x, n, 0.0, [](double a, double b) { return a + b; });
}

template <class T>
T quantile_of(std::vector<T>& x, double q) {
  const double position = q * (double)(x.size() - 1);
  const size_t low = (size_t)position, high = std::min(low + 1, x.size() - 1);
  std::nth_element(x.begin(), x.begin() + low, x.end());
  const T a = x[low], b = high == low ? a : *std::min_element(x.begin() + high, x.end());
  return a + (T)(position - (double)low) * (b - a);
}

// A thread's memory; it only ever grows. The columns hold a masked sequence's policy tokens without gaps.
template <class T>
struct Work {
  std::vector<int64_t> at, turn, end_of_turn;
  std::vector<T> x, second, tested, sorted, columns[4];
  std::vector<int32_t> ids;
  std::vector<char> onsets;

  void reserve(int64_t tokens, bool masked) {
    if ((int64_t)x.size() < tokens)
      for (auto* v : {&x, &second, &tested}) v->resize(tokens);
    if ((int64_t)turn.size() < tokens) turn.resize(tokens), end_of_turn.resize(tokens);
    if (!masked || (int64_t)at.size() >= tokens) return;
    at.resize(tokens), ids.resize(tokens), onsets.resize(tokens);
    for (auto& v : columns) v.resize(tokens);
  }
};

// One sequence's n policy tokens, adjacent in memory: "next" always means the next policy token.
template <class T>
class Sequence {
 public:
  Sequence(const Scan<T>& s, const ScanOptions& o, int64_t b, Work<T>& w)
      : s_(s), o_(o), w_(w), start_(s.bounds[b]), n_(s.bounds[b + 1] - s.bounds[b]), a_(s.advantages[b]),
        sign_((T)((a_ > 0) - (a_ < 0))), tally_(s.tallies + b * kTallies) {}

  Nan run() {
    w_.reserve(n_, s_.mask != nullptr);
    std::fill(tally_, tally_ + kTallies, 0.0);
    s_.mask ? gather() : look();
    const Nan nan = first_nan();
    tally_[tTokens] = (double)n_;
    if (o_.rule == kGear || o_.rule == kLift) {
      normalise();
      segment();
    }
    weigh();
    if (s_.mask) scatter();
    return nan;
  }

 private:
  // ---- rows in, results out ----

  void look() {  // nothing masked: in place
    second_ = s_.second ? s_.second + start_ : nullptr;
    turn_ = s_.turns ? s_.turns + start_ : nullptr;
    adv_ = s_.token_advantages + start_, weight_ = s_.weights + start_, g_ = s_.g + start_, credit_ = s_.credit + start_;
    ids_ = s_.ids + start_, onsets_ = s_.onsets + start_;
    for (int64_t i = 0; i < n_; ++i) w_.x[i] = s_.signal ? bounded(s_.signal[start_ + i]) : T(0);
  }

  void gather() {
    const int64_t end = start_ + n_;
    n_ = 0;
    for (int64_t at = start_; at < end; ++at) {
      if (!s_.mask[at]) {
        s_.token_advantages[at] = s_.weights[at] = s_.g[at] = s_.credit[at] = 0, s_.ids[at] = -1, s_.onsets[at] = false;
        continue;
      }
      w_.at[n_] = at, w_.x[n_] = s_.signal ? bounded(s_.signal[at]) : T(0);
      if (s_.second) w_.second[n_] = s_.second[at];
      if (s_.turns) w_.turn[n_] = s_.turns[at];
      ++n_;
    }
    second_ = w_.second.data(), turn_ = w_.turn.data();
    T** const out[] = {&adv_, &weight_, &g_, &credit_};
    for (int i = 0; i < 4; ++i) *out[i] = w_.columns[i].data();
    ids_ = w_.ids.data(), onsets_ = reinterpret_cast<bool*>(w_.onsets.data());
  }

  void scatter() {
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t at = w_.at[i];
      s_.token_advantages[at] = adv_[i], s_.weights[at] = weight_[i], s_.g[at] = g_[i], s_.credit[at] = credit_[i];
      s_.ids[at] = ids_[i], s_.onsets[at] = onsets_[i];
    }
  }

  int64_t place(int64_t i) const { return s_.mask ? w_.at[i] : start_ + i; }

  Nan first_nan() const {
    Nan nan;
    bool any = false;
    for (int64_t i = 0; i < n_; ++i) any |= w_.x[i] != w_.x[i];
    for (int64_t i = 0; s_.second && i < n_; ++i) any |= second_[i] != second_[i];
    for (int64_t i = 0; any && i < n_; ++i) {
      if (w_.x[i] != w_.x[i] && nan.signal < 0) nan.signal = place(i);
      if (s_.second && second_[i] != second_[i] && nan.second < 0) nan.second = place(i);
    }
    return nan;
  }

  // ---- normalise ----

  void normalise() {
    const T* x = w_.x.data();
    const T first = n_ ? x[0] : 0;
    const T low = reduce(x, n_, first, [](T a, T b) { return b < a ? b : a; });
    const T high = reduce(x, n_, first, [](T a, T b) { return b > a ? b : a; });
    if (low == high) return divisor(T(0)), std::fill_n(g_, n_, T(0)), void();
    if (o_.normalizer == kMinMax) {
      const T scale = divisor(high - low);
      for (int64_t i = 0; i < n_; ++i) g_[i] = (x[i] - low) / scale;
      return;
    }
    const bool absolute = o_.normalizer == kAbsMax;
    for (int64_t i = 0; i < n_; ++i) g_[i] = x[i] < 0 ? (absolute ? -x[i] : T(0)) : x[i];
    const T most = absolute ? std::max(-low, high) : std::max(high, T(0));
    T scale = o_.normalizer == kNone ? T(1) : most;
    if (o_.normalizer == kQuantile) {
      w_.sorted.assign(g_, g_ + n_);
      scale = quantile_of(w_.sorted, o_.quantile);
      if (!(scale > 0)) scale = most;
    }
    scale = divisor(scale);
    if (!(scale > 0)) return std::fill_n(g_, n_, T(0)), void();
    for (int64_t i = 0; i < n_; ++i) g_[i] = std::min(g_[i] / scale, T(1));  // dividing by 1 (`none`) changes nothing
  }

  // What the signal is divided by; notes whether the sequence is silent.
  T divisor(T scale) {
    if (o_.normalizer == kNone) return scale;
    tally_[tSilent] = n_ && scale < (T)std::max(kSilent, o_.signal_floor);
    return std::max(scale, (T)o_.signal_floor);
  }

  void window_mean() {  // adds in the reference's order: own token first, then backwards
    for (int64_t i = 0; i < n_; ++i) {
      T total = second_[i];
      const int64_t count = std::min(o_.window, i + 1);
      for (int64_t k = 1; k < count; ++k) total += second_[i - k];
      w_.tested[i] = total / (T)count;
    }
  }

  void least_ahead() {
    for (int64_t i = 0; i < n_; ++i) {
      T least = second_[i];
      for (int64_t k = 1; k < o_.window && i + k < n_; ++k) least = std::min(least, second_[i + k]);
      w_.tested[i] = least;
    }
  }

  // ---- segment ----

  void find_turns() {  // once per sequence, or segments of two tokens in one long turn would cost its square
    for (int64_t i = n_ - 1; i >= 0; --i)
      w_.end_of_turn[i] = i + 1 < n_ && turn_[i + 1] == turn_[i] ? w_.end_of_turn[i + 1] : i;
  }

  int64_t last_allowed(int64_t i) const {
    const int64_t last = o_.stop_at_turn ? w_.end_of_turn[i] : n_ - 1;
    return o_.longest ? std::min(last, i + o_.longest - 1) : last;
  }

  bool above(int64_t i) const { return g_[i] > (T)o_.threshold; }

  bool stable(T a, T b) const { return a <= (T)o_.ratio * b && b <= (T)o_.ratio * a; }

  // The last token of the segment that opens at i; `closed`: a rule ended it, or it ended before the last policy token.
  int64_t end(int64_t i, bool& closed) const {
    closed = true;
    if (o_.segmenter == kTurn) return w_.end_of_turn[i];
    const int64_t last = last_allowed(i);
    if (o_.segmenter == kFixed) return last;
    int64_t u = i + 1;
    if (o_.segmenter == kKlOnly || o_.segmenter == kStable) {
      if (o_.segmenter == kKlOnly)
        while (u <= last && !above(u)) ++u;
      else
        while (u <= last && stable(second_[i], second_[u])) ++u;
      closed = u - 1 < n_ - 1;
      return u - 1;
    }
    const T* tested = o_.segmenter == kEntropyWindow ? w_.tested.data() : second_;
    const T own = second_[i], limit = (T)o_.ratio * (own < (T)o_.floor ? (T)o_.floor : own);
    while (u <= last && !(tested[u] > limit)) ++u;
    if (u <= last) return u;
    closed = last < n_ - 1;
    return last;
  }

  void segment() {
    if (o_.segmenter == kEntropyWindow) window_mean();
    if (o_.segmenter == kTurn || o_.stop_at_turn) find_turns();
    const bool covers = o_.segmenter == kFixed || o_.segmenter == kTurn || o_.segmenter == kEntropyOnly;
    unsegmented(o_.rule == kLift);
    int64_t count = 0;
    for (int64_t i = 0; i < n_; ++i) count += above(i);
    tally_[tAbove] = (double)count;
    if (o_.segmenter == kToken || (!covers && !count)) return;
    int32_t id = 0;
    for (int64_t i = 0; i < n_;) {
      if (!covers && !above(i)) {
        ++i;
        continue;
      }
      bool closed;
      const int64_t last = end(i, closed);
      onsets_[i] = true;
      std::fill(ids_ + i, ids_ + last + 1, id), std::fill(credit_ + i, credit_ + last + 1, g_[i]);
      tally_[tInside] += (double)(last - i + 1), tally_[tUnclosed] += !closed;
      ++id, i = last + 1;
    }
    tally_[tSegments] = id;
  }

  void unsegmented(bool zero) {
    zero ? (void)std::fill_n(credit_, n_, T(0)) : (void)std::copy_n(g_, n_, credit_);
    std::fill_n(ids_, n_, -1), std::fill_n(onsets_, n_, false);
  }

  // ---- weigh ----

  void weigh() {
    if (o_.rule == kGear)
      for (int64_t i = 0; i < n_; ++i) weight_[i] = T(1) + (T)o_.a * (T(0.5) + (T(0.5) - credit_[i]) * sign_ - T(0.5));
    else if (o_.rule == kLift)
      for (int64_t i = 0; i < n_; ++i) weight_[i] = clip(T(1) + (T)o_.a * credit_[i], T(1), (T)o_.b);
    else
      unsegmented_rule(), unsegmented(false);
    if (o_.renormalize) renormalise();
    for (int64_t i = 0; i < n_; ++i) adv_[i] = weight_[i] * a_;
    const double total = sum(weight_, n_);
    tally_[tSignal] = sum(w_.x.data(), n_);
    if (a_ > 0) tally_[tPositive] = (double)n_, tally_[tWeightPositive] = total;
    if (a_ < 0) tally_[tNegative] = (double)n_, tally_[tWeightNegative] = total;
  }

  void renormalise() {
    double total = 0;  // in the reference's order
    for (int64_t i = 0; i < n_; ++i) total += (double)weight_[i];
    const double mean = total / (double)std::max<int64_t>(n_, 1);
    for (int64_t i = 0; i < n_; ++i) weight_[i] = (T)((double)weight_[i] / mean);
  }

  void unsegmented_rule() {  // fills weight_, and g_ with the quantity behind it
    const T* x = w_.x.data();
    const T a = (T)o_.a, b = (T)o_.b, c = (T)o_.c, level = (T)o_.level, bound = (T)o_.ratio;
    switch (o_.rule) {
      case kRatio:
        for (int64_t i = 0; i < n_; ++i) g_[i] = ratio(x[i], b), weight_[i] = T(1) - a + a * g_[i];
        break;
      case kGatedRatio:
        least_ahead();
        for (int64_t i = 0; i < n_; ++i) {
          g_[i] = clip(T(1) - b * (w_.tested[i] / level), c, T(1));
          weight_[i] = ratio(x[i], a) * g_[i];
        }
        break;
      case kShare:
        for (int64_t i = 0; i < n_; ++i) g_[i] = weight_[i] = bounded(second_[i]) / (bounded(second_[i]) + level);
        break;
      case kMargin:
        for (int64_t i = 0; i < n_; ++i) {
          const T d = clip(-x[i], -bound, bound);
          g_[i] = d, weight_[i] = T(1) + (sign_ < 0 ? b * std::max(-d - c, T(0)) : a * std::max(d - c, T(0)));
        }
        break;
      default:
        for (int64_t i = 0; i < n_; ++i) g_[i] = weight_[i] = second_[i] >= level ? T(1) : T(0);
    }
  }

  T ratio(T x, T by) const { return clip(std::exp(-x * sign_), T(1) - by, T(1) + by); }

  const Scan<T>& s_;
  const ScanOptions& o_;
  Work<T>& w_;
  const int64_t start_;
  int64_t n_;
  const T a_, sign_;
  double* tally_;
  const T* second_ = nullptr;
  const int64_t* turn_ = nullptr;
  T *adv_, *weight_, *g_, *credit_;
  int32_t* ids_;
  bool* onsets_;
};

inline void keep_first(int64_t& first, int64_t at) {
  if (at >= 0 && (first < 0 || at < first)) first = at;
}

}  // namespace

template <class T>
Nan scan(const Scan<T>& s, const ScanOptions& options, int threads) {
  Nan first;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Work<T> work;
    Nan mine;
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < s.sequences; ++b) {
      const Nan nan = Sequence<T>(s, options, b, work).run();
      keep_first(mine.signal, nan.signal), keep_first(mine.second, nan.second);
    }
#pragma omp critical
    keep_first(first.signal, mine.signal), keep_first(first.second, mine.second);
  }
  return first;
}

template Nan scan<float>(const Scan<float>&, const ScanOptions&, int);
template Nan scan<double>(const Scan<double>&, const ScanOptions&, int);

}  // namespace gear
