// Lists of columns and choices that Python has as well: each is written once here as X(name, enumerator), from which both the enum
// and the names come. backends/native.py compares the names and their order with its own when it loads the module.
#pragma once

#define GEAR_ENUMERATOR(name, enumerator) enumerator,

// reference.SUM_NAMES, the columns of `sums` [splits, rows, 12]: the partial sums of both heads
#define GEAR_SUMS(X)                                                                                                          \
  X(max, mMax) X(z, mZ) X(first, mFirst) X(cross, mCross)                                                                     \
  X(teacher_max, mTeacher) X(teacher_z, mTeacherZ) X(teacher_first, mTeacherFirst) X(teacher_cross, mTeacherCross)            \
  X(target, mTarget) X(teacher_target, mTeacherTarget) X(outside, mOutside) X(teacher_outside, mTeacherOutside)

// reference.STAT_NAMES, the rows of `values` [10, rows] and the columns of `grads` [rows, 10]
#define GEAR_VALUES(X)                                                                                                        \
  X(logprobs, kLogprob) X(teacher_logprobs, kTeacherLogprob) X(entropy, kEntropy) X(teacher_entropy, kTeacherEntropy)         \
  X(reverse_kl, kReverseKl) X(forward_kl, kForwardKl) X(jsd, kJsd) X(logsumexp, kLogSumExp) X(top1, kTop1)                    \
  X(argmax_agreement, kArgmaxAgreement)

// reference.STATE_NAMES, the columns of `state` [rows, 9]: all that the backward needs beside the logits
#define GEAR_STATE(X)                                                                                                         \
  X(max, sMax) X(log_z, sLogZ) X(teacher_max, sTeacherMax) X(teacher_log_z, sTeacherLogZ)                                     \
  X(entropy, sEntropy) X(reverse_kl, sReverseKl) X(forward_kl, sForwardKl) X(logprobs, sLogprob) X(mixture_kl, sMixtureKl)

// rules.RULES
#define GEAR_RULES(X)                                                                                                         \
  X(gear, kGear) X(ratio, kRatio) X(gated_ratio, kGatedRatio) X(share, kShare) X(margin, kMargin) X(at_least, kAtLeast)       \
  X(lift, kLift)

// rules.NORMALIZERS
#define GEAR_NORMALIZERS(X)                                                                                                   \
  X(relu_max, kReluMax) X(max, kMax) X(minmax, kMinMax) X(abs_max, kAbsMax) X(quantile, kQuantile) X(none, kNone)

// rules.SCAN_SEGMENTERS; random stays in Python, which draws its places
#define GEAR_SEGMENTERS(X)                                                                                                    \
  X(entropy, kEntropySegments) X(token, kToken) X(kl_only, kKlOnly) X(entropy_only, kEntropyOnly) X(turn, kTurn)              \
  X(entropy_window, kEntropyWindow) X(random, kRandom) X(fixed, kFixed) X(stable, kStable)

// reference.credit.TALLIES, the columns of `tallies` [sequences, 11] float64: sums over a sequence's policy tokens; silent: 1 if
// its scale is small
#define GEAR_TALLIES(X)                                                                                                       \
  X(tokens, tTokens) X(above, tAbove) X(inside, tInside) X(segments, tSegments) X(unclosed, tUnclosed) X(signal, tSignal)     \
  X(positive, tPositive) X(up, tWeightPositive) X(negative, tNegative) X(down, tWeightNegative) X(silent, tSilent)
