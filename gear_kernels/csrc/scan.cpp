// See scan.h. Compiled without contraction to fused multiply-adds: results are bitwise those of reference.py in the same dtype.
#include "scan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace gear {
namespace {

// One sequence's policy tokens, compacted: "next" always means the next policy token.
template <class T>
struct Work {
  int64_t n = 0;            // tokens; the vectors only ever grow
  std::vector<int64_t> at;  // places in the pack
  std::vector<T> x, g, entropy, tested, sorted;
  std::vector<int64_t> turn, end_of_turn;

  void reserve(int64_t tokens) {
    if ((int64_t)x.size() >= tokens) return;
    for (auto* v : {&x, &g, &entropy, &tested}) v->resize(tokens);
    for (auto* v : {&at, &turn, &end_of_turn}) v->resize(tokens);
  }
};

template <class T>
T bounded(T x) {  // an infinite KL becomes the largest finite one: g = 1, not NaN
  const T big = std::numeric_limits<T>::max() / 4;
  return x < -big ? -big : x > big ? big : x;
}

template <class T>
T quantile_of(std::vector<T>& x, double q) {
  const double position = q * (double)(x.size() - 1);
  const size_t low = (size_t)position, high = std::min(low + 1, x.size() - 1);
  std::nth_element(x.begin(), x.begin() + low, x.end());
  const T a = x[low], b = high == low ? a : *std::min_element(x.begin() + high, x.end());
  return a + (T)(position - (double)low) * (b - a);
}

template <class T>
void normalise(Work<T>& w, const ScanOptions& o) {
  const int64_t n = w.n;
  T low = n ? w.x[0] : 0, high = low;
  for (int64_t i = 0; i < n; ++i) low = std::min(low, w.x[i]), high = std::max(high, w.x[i]);
  if (low == high) return std::fill_n(w.g.begin(), n, T(0)), void();
  if (o.normalizer == kMinMax) {
    for (int64_t i = 0; i < n; ++i) w.g[i] = (w.x[i] - low) / (high - low);
    return;
  }
  T most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T x = w.x[i];
    w.g[i] = o.normalizer == kAbsMax ? std::abs(x) : x < 0 ? T(0) : x;
    most = std::max(most, w.g[i]);
  }
  T scale = most;
  if (o.normalizer == kNone) scale = 1;
  if (o.normalizer == kQuantile) {
    w.sorted.assign(w.g.begin(), w.g.begin() + n);
    scale = quantile_of(w.sorted, o.quantile);
    if (!(scale > 0)) scale = most;
  }
  if (!(scale > 0)) return std::fill_n(w.g.begin(), n, T(0)), void();
  for (int64_t i = 0; i < n; ++i) w.g[i] = std::min(w.g[i] / scale, T(1));  // dividing by 1 (`none`) changes nothing
}

template <class T>
void window_mean(Work<T>& w, int64_t window) {  // adds in the reference's order: own token first, then backwards
  for (int64_t i = 0; i < w.n; ++i) {
    T total = w.entropy[i];
    const int64_t count = std::min(window, i + 1);
    for (int64_t k = 1; k < count; ++k) total += w.entropy[i - k];
    w.tested[i] = total / (T)count;
  }
}

template <class T>
class Sequence {
 public:
  Sequence(const Scan<T>& s, const ScanOptions& o, int64_t b, Work<T>& w) : s_(s), o_(o), b_(b), w_(w), n_(w.n) {}

  void run() {
    double* t = s_.tallies + b_ * kTallies;
    std::fill(t, t + kTallies, 0.0);
    normalise(w_, o_);
    segment(t);
    weigh(t);
  }

 private:
  void find_turns() {  // once per sequence, or segments of two tokens in one long turn would cost its square
    for (int64_t i = n_ - 1; i >= 0; --i)
      w_.end_of_turn[i] = i + 1 < n_ && w_.turn[i + 1] == w_.turn[i] ? w_.end_of_turn[i + 1] : i;
  }

  int64_t last_allowed(int64_t i) const {
    const int64_t last = o_.stop_at_turn ? w_.end_of_turn[i] : n_ - 1;
    return o_.longest ? std::min(last, i + o_.longest - 1) : last;
  }

  bool above(int64_t i) const { return w_.g[i] > (T)o_.threshold; }
  bool onset(int64_t i) const { return o_.segmenter == kEntropyOnly || above(i); }

  // The last token of the segment that opens at i; `closed`: a rule ended it, or it ended before the last policy token.
  int64_t end(int64_t i, bool& closed) const {
    closed = true;
    if (o_.segmenter == kFixed) return std::min(i + o_.fixed, n_) - 1;
    if (o_.segmenter == kTurn) return w_.end_of_turn[i];
    const int64_t last = last_allowed(i);
    int64_t u = i + 1;
    if (o_.segmenter == kKlOnly) {
      while (u <= last && !above(u)) ++u;
      closed = u - 1 < n_ - 1;
      return u - 1;
    }
    const std::vector<T>& tested = o_.segmenter == kEntropyWindow ? w_.tested : w_.entropy;
    const T own = w_.entropy[i], limit = (T)o_.ratio * (own < (T)o_.floor ? (T)o_.floor : own);
    while (u <= last && !(tested[u] > limit)) ++u;
    if (u <= last) return u;
    closed = last < n_ - 1;
    return last;
  }

  void put(int64_t i, T c, int32_t id, bool first) {
    const int64_t at = w_.at[i];
    s_.g[at] = w_.g[i], s_.credit[at] = c, s_.ids[at] = id, s_.onsets[at] = first;
  }

  void segment(double* t) {
    if (o_.segmenter == kEntropyWindow) window_mean(w_, o_.window);
    if (o_.segmenter == kTurn || o_.stop_at_turn) find_turns();
    const bool covers = o_.segmenter == kFixed || o_.segmenter == kTurn || o_.segmenter == kEntropyOnly;
    int32_t id = 0;
    for (int64_t i = 0; i < n_;) {
      if (o_.segmenter == kToken || !(covers || onset(i))) {
        put(i, w_.g[i], -1, false), ++i;
        continue;
      }
      bool closed;
      const int64_t last = end(i, closed);
      for (int64_t u = i; u <= last; ++u) put(u, w_.g[i], id, u == i);
      t[tInside] += (double)(last - i + 1), t[tSegments] += 1, t[tUnclosed] += !closed;
      ++id, i = last + 1;
    }
  }

  void weigh(double* t) {
    const T a = s_.advantages[b_], sign = (T)((a > 0) - (a < 0)), alpha = (T)o_.alpha;
    double total = 0, signals = 0;  // locals: sums in memory would wait for their own stores
    int64_t above_count = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t at = w_.at[i];
      const T w = T(0.5) + (T(0.5) - s_.credit[at]) * sign, weight = T(1) + alpha * (w - T(0.5));
      s_.weights[at] = weight, s_.token_advantages[at] = weight * a;
      total += (double)weight, signals += (double)s_.signal[at], above_count += above(i);
    }
    if (o_.renormalize) total = renormalise(total / (double)std::max<int64_t>(n_, 1), a);
    t[tAbove] = (double)above_count, t[tSignal] = signals;
    t[tWeightPositive] = a > 0 ? total : 0, t[tWeightNegative] = a < 0 ? total : 0;
    t[tTokens] = (double)n_, t[tPositive] = a > 0 ? (double)n_ : 0, t[tNegative] = a < 0 ? (double)n_ : 0;
  }

  double renormalise(double mean, T a) {  // returns the sum of the new weights
    double total = 0;
    for (int64_t i = 0; i < n_; ++i) {
      T& weight = s_.weights[w_.at[i]];
      weight = (T)((double)weight / mean);
      s_.token_advantages[w_.at[i]] = weight * a;
      total += (double)weight;
    }
    return total;
  }

  const Scan<T>& s_;
  const ScanOptions& o_;
  const int64_t b_;
  Work<T>& w_;
  const int64_t n_;
};

// Fills `w` with the policy tokens of sequence b and blanks the others' outputs; the first NaN of each input, or -1.
template <class T>
Nan gather(const Scan<T>& s, int64_t b, Work<T>& w) {
  Nan nan;
  w.reserve(s.bounds[b + 1] - s.bounds[b]);
  int64_t n = 0;
  for (int64_t at = s.bounds[b]; at < s.bounds[b + 1]; ++at) {
    if (s.mask && !s.mask[at]) {
      s.token_advantages[at] = s.weights[at] = s.g[at] = s.credit[at] = 0, s.ids[at] = -1, s.onsets[at] = false;
      continue;
    }
    w.at[n] = at, w.x[n] = bounded(s.signal[at]);
    if (s.signal[at] != s.signal[at] && nan.signal < 0) nan.signal = at;
    if (s.entropy) {
      w.entropy[n] = s.entropy[at];
      if (s.entropy[at] != s.entropy[at] && nan.entropy < 0) nan.entropy = at;
    }
    if (s.turns) w.turn[n] = s.turns[at];
    ++n;
  }
  w.n = n;
  return nan;
}

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
      const Nan nan = gather(s, b, work);
      keep_first(mine.signal, nan.signal), keep_first(mine.entropy, nan.entropy);
      Sequence<T>(s, options, b, work).run();
    }
#pragma omp critical
    keep_first(first.signal, mine.signal), keep_first(first.entropy, mine.entropy);
  }
  return first;
}

template Nan scan<float>(const Scan<float>&, const ScanOptions&, int);
template Nan scan<double>(const Scan<double>&, const ScanOptions&, int);

}  // namespace gear
