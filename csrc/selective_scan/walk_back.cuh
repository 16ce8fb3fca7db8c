// The backward's walk over a tile: forward from the saved state, keeping the state at every few steps
// in shared memory; then, from the last few steps to the first, forward again with h and a of every
// step in registers, and back.
#pragma once

#include "selective_scan/walk.cuh"

namespace statescan::selective_scan::cuda {

// kUTile and kSlopeTile (of softplus) are of nobody but the thread that writes them.
enum { kDeltaTile, kDeltaUTile, kDyTile, kDDeltaTile, kDDeltaUTile, kUTile, kSlopeTile, kBwdTiles };

// What a thread sums over time for its channel.
template <class C>
struct ColumnSums {
  typename C::R bias, D, dD = 0, dbias = 0;
};

template <class C>
struct BwdShared {
  using R = typename C::R;
  // Steps are summed over the lanes so many at a time that there is one number of dB or dC for each
  // lane and state of it to sum up.
  static constexpr int kSummed = C::kSummed, kHeld = C::kHeld, kPieces = kSteps / kHeld;
  static constexpr int kCheckpoint = C::kKept * 32;  // of a warp and piece
  // dB and dC of a step before they are summed over the lanes of a warp: [lane's row][state], such
  // that both writing rows and summing over them meets no bank twice.
  static constexpr int kShareRow = C::kS == 1 ? 1 : C::kStates + 4;
  static constexpr int kShare = C::kRow * kShareRow + (C::kS == 1 ? 1 : 16);
  static constexpr int kResult = kSummed * 2 * C::kStates;
  static_assert(kSummed * 2 * C::kL == 32 && kCheckpoint == kHeld * 2 * C::kStates);

  alignas(32) SharedArray<Tile<C>, kBwdTiles> tile;
  alignas(32) SharedArray<StateTile<C>, 2> projection;
  // h before each piece; and dB and dC, [step][which][state], which begin one sum further on, so
  // that they overwrite what has been read already.
  alignas(32) SharedArray<R, C::kWarps*(kPieces* kCheckpoint + kResult)> checkpoint;
  alignas(32) SharedArray<R, C::kWarps * kSummed * 2 * kShare> share;
  // Here rather than in registers, which h and a need.
  SharedArray<ColumnSums<C>, C::kThreads> sums;
  SharedArray<TileInfo, 2> info;
  Task task;
  Fetched<C, true> fetched;
  Tile<C> y, gate;  // gate: dz / y

  __device__ __forceinline__ int checkpoint_at(int warp, int piece) const {
    return warp * (kPieces * kCheckpoint + kResult) + piece * kCheckpoint;
  }
  __device__ __forceinline__ int result_at(int warp) const {
    return checkpoint_at(warp, 0) + kResult;
  }
};

// What a lane carries from tile to tile.
template <class C>
struct Gradients {
  Kept<C> dh, dA, dfixed[2];  // dB and dC where they are constant
};

// What kSummed steps from `first` on add to the gradients of B and C lies in `share`; sums it over
// the lanes.
template <class C>
__device__ __forceinline__ void sum_shares(BwdShared<C>& shared, const Lane<C>& lane, int first) {
  using S = BwdShared<C>;
  __syncwarp();  // the shares are in place, and the checkpoint has been read
  const int q = lane.lane % C::kL, row = lane.lane / C::kL;  // row: (step, which)
  auto* from = &shared.share[(lane.warp * S::kSummed * 2 + row) * S::kShare + q * C::kS];
  auto sum = several<C::kS>(from[0]);
#pragma unroll
  for (int r = 1; r < C::kRow; ++r) {
    const auto v = several<C::kS>(from[r * S::kShareRow]);
#pragma unroll
    for (int s = 0; s < C::kS; ++s) sum.x[s] += v.x[s];
  }
  const int at = shared.result_at(lane.warp) + (first * 2 + row) * C::kStates + q * C::kS;
  several<C::kS>(shared.checkpoint[at]) = sum;
  __syncwarp();  // the shares have been read
}

// h and a of every step of a piece.
template <class C>
struct Held {
  Kept<C> h[C::kHeld], a[C::kHeld];
};

// The state before step i of the piece.
template <class C, bool kMarked>
__device__ __forceinline__ void find_before(const Steps<C, kMarked>& x, const Lane<C>& lane,
                                            BwdShared<C>& shared, int piece, const Held<C>& held,
                                            int i, Kept<C>& h_prev) {
  const int step = piece * C::kHeld + i, at = shared.checkpoint_at(lane.warp, piece) + lane.lane;
#pragma unroll
  for (int j = 0; j < C::kKept; ++j) {
    h_prev[j / C::kS][j % C::kS] =
        i == 0 ? shared.checkpoint[at + j * 32] : held.h[i == 0 ? 0 : i - 1][j / C::kS][j % C::kS];
  }
  if (kMarked && x.info.mark[step] & kStart) {
    load_start<C>(x.p, x.task, x.info, step, x.first_state, h_prev);
  }
}

template <class C, bool kMarked>
__device__ __forceinline__ void walk_piece(const Steps<C, kMarked>& x, const Parameters<C>& k,
                                           const Lane<C>& lane, BwdShared<C>& shared, int piece,
                                           Held<C>& held) {
  const int begin = piece * C::kHeld;
#pragma unroll
  for (int i = 0; i < C::kHeld; ++i) {
    Kept<C> h_prev;
    find_before(x, lane, shared, piece, held, i, h_prev);
    const auto delta = x.channels(x.delta, begin + i, lane);
    const auto delta_u = x.channels(x.delta_u, begin + i, lane);
    const auto B = x.states(k, 0, begin + i, lane);
#pragma unroll
    for (int c = 0; c < C::kC; ++c) {
#pragma unroll
      for (int s = 0; s < C::kS; ++s) {
        held.a[i][c][s] = decay(delta.x[c], k.A[c][s]);
        held.h[i][c][s] =
            next_state(held.a[i][c][s], h_prev[c][s], delta_u.x[c], k.projection(0, B, c, s));
      }
    }
  }
}

// Adds a piece's outputs, which the gradient of the gate needs, to y.
template <class C, bool kMarked>
__device__ __forceinline__ void add_piece_outputs(const Steps<C, kMarked>& x,
                                                  const Parameters<C>& k, const Lane<C>& lane,
                                                  int begin, const Held<C>& held, Tile<C>& y) {
  using R = typename C::R;
#pragma unroll
  for (int i0 = 0; i0 < C::kHeld; i0 += kBatch) {
    R sums[kBatch * C::kC];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const auto C_t = x.states(k, 1, begin + i0 + j, lane);
#pragma unroll
      for (int c = 0; c < C::kC; ++c) {
        R sum = 0;
#pragma unroll
        for (int s = 0; s < C::kS; ++s) {
          sum += k.projection(1, C_t, c, s) * held.h[i0 + j][c][s];
        }
        sums[j * C::kC + c] = sum;
      }
    }
    add_outputs<C>(sums, lane, begin + i0, y);
  }
}

// Puts d delta (to be scaled by ln 2) and d (delta u) of a step into their tiles; adds it, if they are
// not the `first` states of the tile.
template <class C>
__device__ __forceinline__ void add_step_gradients(BwdShared<C>& shared, const Lane<C>& lane,
                                                   bool first, int step,
                                                   const typename C::R* sums) {
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    auto& out = several<C::kC>(shared.tile[kDDeltaTile + which][step * C::kPitch + lane.channel]);
    Several<typename C::R, C::kC> v{};
    if (!first) v = out;
#pragma unroll
    for (int c = 0; c < C::kC; ++c) v.x[c] += sums[which * C::kC + c];
    out = v;
  }
}

// Back over a piece of which h and a are held.
template <class C, bool kMarked>
__device__ __forceinline__ void walk_piece_back(const Steps<C, kMarked>& x, const Parameters<C>& k,
                                                const Lane<C>& lane, void* dinitial,
                                                BwdShared<C>& shared, int piece,
                                                const Held<C>& held, Gradients<C>& g) {
  using R = typename C::R;
  using S = BwdShared<C>;
  const int begin = piece * S::kHeld;
#pragma unroll
  for (int i0 = S::kHeld - S::kSummed; i0 >= 0; i0 -= S::kSummed) {
    R sums[S::kSummed * 2 * C::kC];  // of each step: over this lane's states
#pragma unroll
    for (int j = S::kSummed - 1; j >= 0; --j) {
      const int i = i0 + j, step = begin + i;
      if constexpr (kMarked) {
        add_state_gradients<C>(x.p, x.task, x.info, step, x.first_state, g.dh);
      }
      Kept<C> h_prev;
      find_before(x, lane, shared, piece, held, i, h_prev);
      const auto delta = x.channels(x.delta, step, lane),
                 delta_u = x.channels(x.delta_u, step, lane);
      const auto dy = x.channels(shared.tile[kDyTile], step, lane);
      const auto B = x.states(k, 0, step, lane), C_t = x.states(k, 1, step, lane);
      Several<R, C::kS> dB{}, dC{};
#pragma unroll
      for (int c = 0; c < C::kC; ++c) {
        R d_delta = 0, d_delta_u = 0;
#pragma unroll
        for (int s = 0; s < C::kS; ++s) {
          R dB_s, dC_s;
          step_vjp(held.a[i][c][s], h_prev[c][s], held.h[i][c][s], delta.x[c], delta_u.x[c],
                   k.A[c][s], k.projection(0, B, c, s), k.projection(1, C_t, c, s), dy.x[c],
                   g.dh[c][s], g.dA[c][s], dB_s, dC_s, d_delta, d_delta_u);
          dB.x[s] += dB_s;
          dC.x[s] += dC_s;
          if constexpr (C::kAny) {
            g.dfixed[0][c][s] += dB_s;
            g.dfixed[1][c][s] += dC_s;
          }
        }
        sums[j * 2 * C::kC + c] = d_delta;
        sums[(j * 2 + 1) * C::kC + c] = d_delta_u;
      }
      if constexpr (C::kL == 1)
        add_step_gradients<C>(shared, lane, x.first_state == 0, step, sums + j * 2 * C::kC);
      const int at = (lane.warp * S::kSummed + j) * 2 * S::kShare +
                     lane.lane % C::kRow * S::kShareRow + lane.q * C::kS;
      several<C::kS>(shared.share[at]) = dB;
      several<C::kS>(shared.share[at + S::kShare]) = dC;
      if (kMarked && x.info.mark[step] & kStart) {
        if (dinitial != nullptr && x.info.mark[step] & kFromSlot) {
          store_states<C>(static_cast<R*>(dinitial) + x.info.slot[step] * x.p.dim * x.p.state,
                          false, x.p, x.task, x.first_state, g.dh);
        }
#pragma unroll
        for (int s = 0; s < C::kKept; ++s) g.dh[s / C::kS][s % C::kS] = 0;
      }
    }
    if constexpr (C::kL > 1) {
      sum_over_states<C>(sums, lane.q);
#pragma unroll
      for (int j = 0; j < S::kSummed / C::kL; ++j) {
        add_step_gradients<C>(shared, lane, x.first_state == 0,
                              begin + i0 + lane.q * (S::kSummed / C::kL) + j, sums + j * 2 * C::kC);
      }
    }
    sum_shares(shared, lane, begin + i0);
  }
}

// All of a tile for one block of states. `h` is the state before it. y is added to if there is a
// gate, whose gradient needs it.
template <class C, bool kMarked>
__device__ __forceinline__ void walk_back(const Steps<C, kMarked>& x, const Parameters<C>& k,
                                          Kept<C>& h, void* dinitial, BwdShared<C>& shared,
                                          Gradients<C>& g) {
  using S = BwdShared<C>;
  const Lane<C> lane;
#pragma unroll 1
  for (int piece = 0; piece < S::kPieces; ++piece) {
#pragma unroll
    for (int i = 0; i < C::kKept; ++i) {
      shared.checkpoint[shared.checkpoint_at(lane.warp, piece) + i * 32 + lane.lane] =
          h[i / C::kS][i % C::kS];
    }
    if (piece + 1 == S::kPieces) break;
    walk<C, false>(x, k, h, shared.y, piece * S::kHeld, (piece + 1) * S::kHeld,
                   [](int, const Kept<C>&) {});
  }
#pragma unroll 1
  for (int piece = S::kPieces - 1; piece >= 0; --piece) {
    Held<C> held;
    walk_piece(x, k, lane, shared, piece, held);
    if (x.p.over[kZ]) {
      add_piece_outputs(x, k, lane, piece * S::kHeld, held, shared.y);
    }
    walk_piece_back(x, k, lane, dinitial, shared, piece, held, g);
  }
}

}  // namespace statescan::selective_scan::cuda
