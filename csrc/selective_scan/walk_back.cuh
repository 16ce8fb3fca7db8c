// The backward's walk over a tile: forward from the saved state, keeping the state at every few steps
// in shared memory; then, from the last few steps to the first, forward again with h and a of every
// step in registers, and back.
#pragma once

#include "selective_scan/walk.cuh"

namespace statescan::selective_scan::cuda {

// Tiles besides those of Over (z becomes dz / y).
enum { kDDelta = 4, kDDeltaU, kY, kBwdTiles };

// What a thread sums over time for its channel.
template <class C>
struct ColumnSums {
  typename C::R bias, D, dD = 0, dbias = 0;
};

template <class C>
struct BwdShared {
  // As many steps as make one number of dB or dC for each lane and state of it to sum up.
  static constexpr int kHeld = 16 / C::kL, kPieces = kSteps / kHeld;
  static constexpr int kCheckpoint = C::kKept * 32;  // of a warp and piece
  // dB and dC of a step before they are summed over the lanes of a warp: [lane's row][state], such
  // that both writing rows and summing over them meets no bank twice.
  static constexpr int kShareRow = C::kS == 1 ? 1 : C::kStates + 4;
  static constexpr int kShare = C::kRow * kShareRow + (C::kS == 1 ? 1 : 16);
  static_assert(kHeld * 2 * C::kL == 32 && kCheckpoint >= kHeld * 2 * C::kStates);

  alignas(32) SharedArray<Tile<C>, kBwdTiles> tile;
  alignas(32) SharedArray<StateTile<C>, 2> projection;
  Marks marks;
  // h before each piece. Once it has been walked back, its dB and dC: [step][which][state].
  alignas(32) SharedArray<typename C::R, C::kWarps * kPieces * kCheckpoint> checkpoint;
  alignas(32) SharedArray<typename C::R, C::kWarps * kHeld * 2 * kShare> share;
  // Here rather than in registers, which h and a need.
  SharedArray<ColumnSums<C>, C::kThreads> sums;
  Task task;
  Span span;

  __device__ __forceinline__ int checkpoint_at(int warp, int piece) const {
    return (warp * kPieces + piece) * kCheckpoint;
  }
};

// What a lane carries from tile to tile.
template <class C>
struct Gradients {
  Kept<C> dh, dA, dfixed[2];  // dB and dC where they are constant
};

// What one piece's steps add to the gradients of B and C lies in `share`; sums it over the lanes.
template <class C>
__device__ __forceinline__ void sum_shares(BwdShared<C>& shared, const Lane<C>& lane, int piece) {
  using S = BwdShared<C>;
  const int q = lane.lane % C::kL, row = lane.lane / C::kL;  // row: (step, which)
  auto* first = &shared.share[(lane.warp * S::kHeld * 2 + row) * S::kShare + q * C::kS];
  Several<typename C::R, C::kS> sum{};
#pragma unroll
  for (int r = 0; r < C::kRow; ++r) {
    const auto v = several<C::kS>(first[r * S::kShareRow]);
#pragma unroll
    for (int s = 0; s < C::kS; ++s) sum.x[s] += v.x[s];
  }
  const int at = shared.checkpoint_at(lane.warp, piece) + row * C::kStates + q * C::kS;
  several<C::kS>(shared.checkpoint[at]) = sum;
}

template <class C, bool kMarked>
__device__ __forceinline__ void walk_piece_back(const Steps<C, kMarked>& x, const Parameters<C>& k,
                                                void* dinitial, BwdShared<C>& shared, int piece,
                                                Gradients<C>& g) {
  using R = typename C::R;
  using S = BwdShared<C>;
  constexpr int kHeld = S::kHeld;
  const Lane<C> lane;
  Kept<C> h[kHeld], a[kHeld];
  const int checkpoint = shared.checkpoint_at(lane.warp, piece) + lane.lane;
  // The state before step i of the piece.
  auto find_before = [&](int i, int row, Kept<C>& h_prev) {
#pragma unroll
    for (int j = 0; j < C::kKept; ++j) {
      h_prev[j / C::kS][j % C::kS] = i == 0 ? shared.checkpoint[checkpoint + j * 32]
                                            : h[i == 0 ? 0 : i - 1][j / C::kS][j % C::kS];
    }
    if (kMarked && x.marks.mark[row] & kStart) {
      load_start<C>(x.p, x.task, x.marks, row, x.first_state, h_prev);
    }
  };
  // Adds to what the tiles hold of d delta (to be scaled by ln 2) and d (delta u).
  auto add_to_tiles = [&](int row, const R* sums) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      auto& out = several<C::kC>(shared.tile[kDDelta + which][row * C::kPitch + lane.channel]);
      auto v = out;
#pragma unroll
      for (int c = 0; c < C::kC; ++c) v.x[c] += sums[which * C::kC + c];
      out = v;
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int row = x.row(piece * kHeld + i);
    Kept<C> h_prev;
    find_before(i, row, h_prev);
    const auto delta = x.channels(x.delta, row, lane), u = x.channels(x.u, row, lane);
    const auto B = x.states(k, 0, row, lane);
#pragma unroll
    for (int c = 0; c < C::kC; ++c) {
      const R delta_u = delta.x[c] * u.x[c];
#pragma unroll
      for (int s = 0; s < C::kS; ++s) {
        a[i][c][s] = decay(delta.x[c], k.A[c][s]);
        h[i][c][s] = next_state(a[i][c][s], h_prev[c][s], delta_u, k.projection(0, B, c, s));
      }
    }
  }
  R sums[kHeld * 2 * C::kC];  // of each step: over this lane's states
#pragma unroll
  for (int i = kHeld - 1; i >= 0; --i) {
    const int row = x.row(piece * kHeld + i);
    if constexpr (kMarked) {
      add_state_gradients<C>(x.p, x.task, x.span, row, x.marks, x.first_state, g.dh);
    }
    Kept<C> h_prev;
    find_before(i, row, h_prev);
    const auto delta = x.channels(x.delta, row, lane), u = x.channels(x.u, row, lane);
    const auto dy = x.channels(shared.tile[kDy], row, lane);
    const auto B = x.states(k, 0, row, lane), C_t = x.states(k, 1, row, lane);
    Several<R, C::kS> dB{}, dC{};
#pragma unroll
    for (int c = 0; c < C::kC; ++c) {
      const R delta_u = delta.x[c] * u.x[c];
      R d_delta = 0, d_delta_u = 0;
#pragma unroll
      for (int s = 0; s < C::kS; ++s) {
        R dB_s, dC_s;
        step_vjp(a[i][c][s], h_prev[c][s], h[i][c][s], delta.x[c], delta_u, k.A[c][s],
                 k.projection(0, B, c, s), k.projection(1, C_t, c, s), dy.x[c], g.dh[c][s],
                 g.dA[c][s], dB_s, dC_s, d_delta, d_delta_u);
        dB.x[s] += dB_s;
        dC.x[s] += dC_s;
        if constexpr (C::kAny) {
          g.dfixed[0][c][s] += dB_s;
          g.dfixed[1][c][s] += dC_s;
        }
      }
      sums[i * 2 * C::kC + c] = d_delta;
      sums[(i * 2 + 1) * C::kC + c] = d_delta_u;
    }
    if constexpr (C::kL == 1) add_to_tiles(row, sums + i * 2 * C::kC);
    const int at = (lane.warp * kHeld + i) * 2 * S::kShare + lane.lane % C::kRow * S::kShareRow +
                   lane.q * C::kS;
    several<C::kS>(shared.share[at]) = dB;
    several<C::kS>(shared.share[at + S::kShare]) = dC;
    if (kMarked && x.marks.mark[row] & kStart) {
      if (dinitial != nullptr && x.marks.mark[row] & kFromSlot) {
        store_states<C>(static_cast<R*>(dinitial) + x.marks.slot[row] * x.p.dim * x.p.state, false,
                        x.p, x.task, x.first_state, g.dh);
      }
#pragma unroll
      for (int j = 0; j < C::kKept; ++j) g.dh[j / C::kS][j % C::kS] = 0;
    }
  }
  if constexpr (C::kL > 1) {
    sum_over_states<C>(sums, lane.q);
#pragma unroll
    for (int j = 0; j < kHeld / C::kL; ++j) {
      add_to_tiles(x.row(piece * kHeld + lane.q * (kHeld / C::kL) + j), sums + j * 2 * C::kC);
    }
  }
  __syncwarp();  // the shares are in place, and the checkpoint has been read
  sum_shares(shared, lane, piece);
  __syncwarp();  // the shares have been read
}

// All of a tile for one block of states. `h` is the state before it. y is added to if there is a gate,
// whose gradient needs it.
template <class C, bool kMarked>
__device__ __forceinline__ void walk_back(const Steps<C, kMarked>& x, const Parameters<C>& k,
                                          Kept<C>& h, void* dinitial, BwdShared<C>& shared,
                                          Gradients<C>& g) {
  using S = BwdShared<C>;
  const Lane<C> lane;
  const bool gated = bool(x.p.over[kZ]);
  auto nobody = [](int, const Kept<C>&) {};
#pragma unroll 1
  for (int piece = 0; piece < S::kPieces; ++piece) {
#pragma unroll
    for (int i = 0; i < C::kKept; ++i) {
      shared.checkpoint[shared.checkpoint_at(lane.warp, piece) + i * 32 + lane.lane] =
          h[i / C::kS][i % C::kS];
    }
    const int begin = piece * S::kHeld, end = begin + S::kHeld;
    if (gated) {
      walk<C, true>(x, k, h, shared.tile[kY], begin, end, nobody);
    } else if (piece + 1 < S::kPieces) {
      walk<C, false>(x, k, h, shared.tile[kY], begin, end, nobody);
    }
  }
#pragma unroll 1
  for (int piece = S::kPieces - 1; piece >= 0; --piece) {
    walk_piece_back<C>(x, k, dinitial, shared, piece, g);
  }
}

}  // namespace statescan::selective_scan::cuda
