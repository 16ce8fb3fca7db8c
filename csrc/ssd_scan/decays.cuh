// The decays of one head within a piece, and their gradient: each by one warp.
//
// With a_t the sum of the logarithms up to and with step t, in base 2 and in two parts, since a
// small difference of two large sums must still be exact:
//
//   between(t, s) = exp(a_t' - a_s)   of what step s puts into the state, at the output of row t
//   row[t] = exp(a_t')                of the state before the piece, at the output of row t
//   column[s] = exp(a_last - a_s)     of what step s puts into the state, at the end of the piece
//   whole = exp(a_last)               of the state before the piece, at its end
//
// where t' is t, or t - 1 if the output is shifted. No exponent is positive for a stable scan, and
// nothing is ever divided by a decay.
#pragma once

#include "common/device_view.cuh"
#include "common/lanes.cuh"
#include "common/scalar.cuh"
#include "ssd_scan/pieces.cuh"

#include "ssd_scan/equations.h"

namespace statescan::ssd_scan::cuda {

template <class R>
struct alignas(16) Decays {
  SharedArray<R, kTile> weight,
      slope;  // the step size (1 where the decay is given), its derivative
  SharedArray<R, kTile> row, column;
  SharedArray<R, kTile + 1> high, low;  // a_t after t steps, in two parts
  R whole;

  __device__ __forceinline__ R between(int t, int s, int shift) {
    const int r = t + 1 - shift;
    return exp2((high[r] - high[s + 1]) + (low[r] - low[s + 1]));
  }
};

// What a head has for itself.
template <class R>
struct Head {
  R A, bias;

  __device__ __forceinline__ Head(const Inputs& p, int64_t head) {
    A = p.A ? load_element<R>(p.A.data, p.A.dtype, head * p.A.stride[0]) : R(0);
    bias = p.dt_bias ? load_element<R>(p.dt_bias.data, p.dt_bias.dtype, head * p.dt_bias.stride[0])
                     : R(0);
  }
};

// The sum over the lanes before and with this one, or over this one and those after it.
template <bool kFromEnd, class R>
__device__ __forceinline__ R running_sum(R x, int lane) {
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const R other =
        kFromEnd ? __shfl_down_sync(kAllLanes, x, by) : __shfl_up_sync(kAllLanes, x, by);
    if (kFromEnd ? lane + by < 32 : lane >= by) x += other;
  }
  return x;
}

template <class R>
__device__ __forceinline__ R warp_sum(R x) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

// What is given of a head's step sizes, or log decays, to lane l: of rows 2 l and 2 l + 1.
template <class R>
struct GivenSteps {
  R x[2];

  GivenSteps() = default;
  __device__ __forceinline__ GivenSteps(const Inputs& p, const Piece& piece, int64_t head) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = 2 * (int(threadIdx.x) % 32) + e;
      const View<3>& dt = p.dt;
      const int64_t at =
          piece.b * dt.stride[0] + piece.time(i) * dt.stride[1] + head * dt.stride[2];
      x[e] = i < piece.rows ? load_element<R>(dt.data, dt.dtype, at) : R(0);
    }
  }
};

// Rows beyond the last one have no weight, and decays that are finite.
template <class R>
__device__ __forceinline__ void find_decays(const Inputs& p, const Piece& piece, const Head<R>& own,
                                            const GivenSteps<R>& given, Decays<R>& d) {
  const int lane = int(threadIdx.x) % 32;
  const double scale = p.has_dt ? double(own.A) * kLog2e : kLog2e;
  double log2[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    R w = 0, slope = 0;
    if (i < piece.rows) {
      w = given.x[e];
      if (p.has_dt) {
        w = step_size(w, own.bias, p.dt_softplus, R(p.dt_min), R(p.dt_max), slope);
      }
      const double l = double(w) * scale;
      log2[e] = l < -kLog2Bound ? -kLog2Bound : l > kLog2Bound ? kLog2Bound : l;
      if (!p.has_dt) w = 1;
    }
    d.weight[i] = w, d.slope[i] = slope;
  }
  const double after = running_sum<false>(log2[0] + log2[1], lane);
  const double last = __shfl_sync(kAllLanes, after, 31);
  const double at[3] = {after - (log2[0] + log2[1]), after - log2[1], after};
  auto parts = [](double a, R& high, R& low) { high = R(a), low = R(a - double(high)); };
  R last_high, last_low, high, low, previous = 0;
  parts(last, last_high, last_low);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts(at[i], high, low);
    const R here = exp2(high + low);
    if (i > 0) {
      const int t = 2 * lane + i - 1;
      d.high[t + 1] = high, d.low[t + 1] = low;
      d.column[t] = exp2((last_high - high) + (last_low - low));
      d.row[t] = p.shift_output ? previous : here;
    } else if (lane == 0) {
      d.high[0] = 0, d.low[0] = 0;
      d.whole = exp2(last_high + last_low);
    }
    previous = here;
  }
}
template <class R>
__device__ __forceinline__ void find_decays(const Inputs& p, const Piece& piece, int64_t head,
                                            const Head<R>& own, Decays<R>& d) {
  find_decays(p, piece, own, GivenSteps<R>(p, piece, head), d);
}

// What the gradient of the decays is made of, see docs/ssd_scan.md.
template <class R>
struct DecaySums {
  SharedArray<R, kTile> from_output;  // <row[t] C[t] S, dy[t]>
  SharedArray<R, kTile> into_state;   // <column[s] B[s] dS, x[s]>
  SharedArray<R, kTile> d_weight;     // of the weights, through the outputs of the piece
  SharedArray<R, kTile> through;      // what goes from steps up to s to outputs after it
};

template <class R>
struct Sums {
  R dA = 0, ddt_bias = 0;
};

// Stores the gradient of dt as given, or of the logarithm of the decay; returns the piece's share
// of dA and ddt_bias to every lane. `held` is <whole S, dS>, from state to state. All are sums of
// terms that contain the logarithm, and of no others: nothing is added that has to cancel.
template <class R>
__device__ __forceinline__ Sums<R> decay_gradient(const Inputs& p, const Piece& piece, int64_t head,
                                                  R A, R held, Decays<R>& d, DecaySums<R>& sums,
                                                  const View<3>& ddt) {
  const int lane = int(threadIdx.x) % 32, shift = p.shift_output ? 1 : 0;
  R output[2] = {}, into[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    if (i + shift < piece.rows) output[e] = sums.from_output[i + shift];
    if (i < piece.rows) into[e] = d.weight[i] * sums.into_state[i];
  }
  // Over the outputs from a row on: of the row after the lane's, and of its own two.
  const R after = running_sum<true>(output[0] + output[1], lane) - (output[0] + output[1]);
  R before = running_sum<false>(into[0] + into[1], lane);
  const R own = __shfl_up_sync(kAllLanes, before, 1);
  before = lane == 0 ? R(0) : own;
  Sums<R> result;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = 2 * lane + e;
    if (i >= piece.rows) continue;
    R d_decay = held + (before + (e == 1 ? into[0] : R(0)));
    d_decay += after + output[1] + (e == 0 ? output[0] : R(0));
    if (i > 0) d_decay += sums.through[i - 1];
    R gradient = d_decay;
    if (p.has_dt) {
      gradient = (sums.d_weight[i] + sums.into_state[i] + d_decay * A) * d.slope[i];
      result.dA += d_decay * d.weight[i];
      result.ddt_bias += gradient;
    }
    store_element(ddt.data, ddt.dtype,
                  piece.b * ddt.stride[0] + piece.time(i) * ddt.stride[1] + head * ddt.stride[2],
                  gradient);
  }
  return {warp_sum(result.dA), warp_sum(result.ddt_bias)};
}

}  // namespace statescan::ssd_scan::cuda
