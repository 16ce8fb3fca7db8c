// The products of the walk for Hopper: what one warpgroup does with the operands that a stage has.
#pragma once

#include "common/lanes.cuh"
#include "ssd_scan/hopper.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kGroupThreads = 128, kThreads = 3 * kGroupThreads;
inline constexpr int kGroups = 2;  // warpgroups that multiply

template <int kN, int kUnits>
class HopperGroup {
 public:
  __device__ __forceinline__ HopperGroup(const WalkParams& p, HopperTiles<kN, kUnits>& tiles)
      : p_(p),
        tiles_(tiles),
        group_(__shfl_sync(kAllLanes, int(threadIdx.x) / kGroupThreads - 1, 0)) {}

 protected:
  static constexpr int kPanels = kN / 64, kOwn = kUnits / kGroups;  // units of a warpgroup

  __device__ __forceinline__ int thread() const {
    return ptx::opaque(int(threadIdx.x)) % kGroupThreads;
  }
  __device__ __forceinline__ HopperTask& task() const { return tiles_.task; }
  __device__ __forceinline__ Stage<kN, kUnits>& stage() const { return tiles_.stage[at_]; }
  __device__ __forceinline__ Unit& own(int unit) const { return tiles_.task.unit[unit]; }

  // f(number among the warpgroup's units, among the block's).
  template <class F>
  __device__ __forceinline__ void for_own(F&& f) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      f(i, kGroups * i + group_);
    }
  }

  __device__ __forceinline__ void group_barrier() { ptx::barrier_sync(1 + group_, kGroupThreads); }

  __device__ __forceinline__ void round_state() {
    group_barrier();  // the rounded states have been read
    for_own([&](int i, int unit) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        store_transposed(S_[i][panel], tiles_.S[unit], 64 * panel);
      }
    });
    ptx::fence_proxy_async();
    group_barrier();  // they are in place
  }

  // Outputs and the states after the piece. Registers decide the order: M of all units instead of G,
  // and values are weighted when M has been used. What waits here, the other warpgroup covers.
  __device__ __forceinline__ void output(const Piece& piece) {
    uint32_t M[kOwn][4][4];
    GroupProduct y;
    mix(M, y);
    for_own([&](int i, int unit) {
      ptx::wgmma_wait<0>(y.d);
      Decays<float>& d = stage().decays[unit];
      y.for_each_pair([&](int t, int, float& a, float& b) {
        const float row = d.row[t];
        a *= row, b *= row;
      });
      ptx::wgmma_fence(y.d, M[i]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        ptx::wgmma_64x64x16(y.d, M[i][k], stage().value[unit].columns(16 * k));
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(y.d);
      store_output(y, piece, unit);
      update(i, unit);
      if (i + 1 < kOwn) through_state(unit + kGroups, y);
      i + 1 < kOwn ? ptx::wgmma_wait<1>(S_[i]) : ptx::wgmma_wait<0>(S_[i]);
    });
  }

  // y = C S, begun.
  __device__ __forceinline__ void through_state(int unit, GroupProduct& y) {
    ptx::wgmma_fence(y.d);
#pragma unroll
    for (int k = 0; k < kN; k += 16) {
      ptx::wgmma_64x64x16<true>(y.d, stage().C.rows(k), tiles_.S[unit].columns(k), k > 0);
    }
    ptx::wgmma_commit();
  }

  // The thread's part of M of each unit, as a left operand: nothing above the diagonal, below it in
  // blocks of 16 x 16 products of factors.
  __device__ __forceinline__ void mix(uint32_t (&M)[kOwn][4][4], GroupProduct& y) {
    GroupProduct G;
    ptx::wgmma_fence(G.d);
#pragma unroll
    for (int k = 0; k < kN; k += 16) {
      ptx::wgmma_64x64x16<false>(G.d, stage().C.rows(k), stage().key.rows(k), k > 0);
    }
    ptx::wgmma_commit();
    through_state(group_, y);
    ptx::wgmma_wait<1>(G.d);
    const int warp = warp_of_group(), row = fragment_row(), column = fragment_column();
    uint32_t on_diagonal[kOwn][4];
    mix_diagonal(G, warp, on_diagonal);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* g = G.d + 8 * k;
      for_own([&](int i, int unit) {
        Factors& factors = stage().factors[unit];
#pragma unroll
        for (int j = 0; j < 4; ++j) M[i][k][j] = k == warp ? on_diagonal[i][j] : 0;
        if (k >= warp) return;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float from = factors.from_block[16 * warp + row + j % 2 * 8];
          const auto to =
              several<2>(factors.to_block[48 * (warp - 1) + 16 * k + column + j / 2 * 8]);
          M[i][k][j] = ptx::pack_bf16(g[2 * j] * (from * to.x[0]), g[2 * j + 1] * (from * to.x[1]));
        }
      });
    }
  }

  // The warp's block of 16 x 16 on the diagonal, number by number.
  __device__ __forceinline__ void mix_diagonal(const GroupProduct& G, int warp,
                                               uint32_t (&M)[kOwn][4]) {
    const int shift = p_.shift_output ? 1 : 0;
    const int row = 16 * warp + fragment_row(), column = 16 * warp + fragment_column();
    auto mixed = [&](Decays<float>& d, int j) {
      const int t = row + j / 2 % 2 * 8, s = column + j / 4 * 8 + j % 2;
      const float g =
          warp < 2 ? (warp == 0 ? G.d[j] : G.d[8 + j]) : (warp == 2 ? G.d[16 + j] : G.d[24 + j]);
      const float v = g * d.between(t, s, shift) * d.weight[s];
      return s + shift <= t ? v : 0;
    };
    for_own([&](int i, int unit) {
      Decays<float>& d = stage().decays[unit];
#pragma unroll
      for (int j = 0; j < 8; j += 2) M[i][j / 2] = ptx::pack_bf16(mixed(d, j), mixed(d, j + 1));
    });
  }

  // y += D x.
  __device__ __forceinline__ void add_skip(GroupProduct& y, int unit) {
    y.for_each_pair([&](int t, int column, float& a, float& b) {
      const uint32_t x = *reinterpret_cast<uint32_t*>(stage().value[unit].at(t, column));
      const auto D = several<2>(tiles_.D[unit * kColumns + column]);
      a += D.x[0] * bits_to_float(x << 16), b += D.x[1] * bits_to_float(x & 0xffff0000u);
    });
  }

  // y *= silu(z).
  __device__ __forceinline__ void gate(GroupProduct& y, const Piece& piece, int unit) {
    const int first = 16 * warp_of_group() + fragment_row(), across = fragment_column();
    const int columns = own(unit).columns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = first + 8 * half;
      if (t >= piece.rows) continue;
      const char* row = stage().z[unit] + t * row_bytes(p_.z) + 2 * across;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (8 * j >= columns) continue;
        const uint32_t z = *reinterpret_cast<const uint32_t*>(row + 16 * j);
        y.d[4 * j + 2 * half] *= silu_of(bits_to_float(z << 16));
        y.d[4 * j + 2 * half + 1] *= silu_of(bits_to_float(z & 0xffff0000u));
      }
    }
  }
  __device__ __forceinline__ static float silu_of(float z) { return z * sigmoid_for<BFloat16>(z); }

  // From one row of a piece to the next.
  __device__ __forceinline__ int64_t row_bytes(const View<4>& x) const {
    return 2 * (p_.reverse ? -x.stride[1] : x.stride[1]);
  }

  // Four neighbouring lanes have pairs of each 8 columns of a row, and exchange them: each gets all
  // of every fourth 8 columns.
  __device__ __forceinline__ void store_output(GroupProduct& y, const Piece& piece, int unit) {
    if (p_.D) add_skip(y, unit);
    if (p_.z) gate(y, piece, unit);
    const int first = 16 * warp_of_group() + fragment_row(), member = fragment_column() / 2;
    const int columns = own(unit).columns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = first + 8 * half;
      char* row = stage().y[unit] + t * row_bytes(p_.y) + 16 * member;
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* d = &y.d[4 * (j + i) + 2 * half];
          pairs[i] = ptx::pack_bf16(d[0], d[1]);
        }
        exchange(pairs, member);
        if (t < piece.rows && 8 * (j + member) < columns) {
          ptx::store(reinterpret_cast<uint4*>(row + 16 * j),
                     uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
        }
      }
    }
  }

  // Lane m of four gets v[m] of each: a transpose of 4 x 4.
  __device__ __forceinline__ static void exchange(uint32_t (&v)[4], int member) {
#pragma unroll
    for (int by = 1; by < 4; by *= 2) {
      const bool upper = member & by;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & by) continue;
        uint32_t &low = v[i], &high = v[i + by];
        const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? low : high, by);
        (upper ? low : high) = other;
      }
    }
  }

  // S = whole S + what each step puts into it, begun.
  __device__ __forceinline__ void update(int i, int unit) {
    const float whole = stage().decays[unit].whole;
    Factors& factors = stage().factors[unit];
    const int first = 16 * warp_of_group(), step = fragment_column();
    uint32_t values[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Left x = left_of_columns(stage().value[unit], 16 * k, first);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto into = several<2>(factors.into[16 * k + step + j / 2 * 8]);
        values[k][j] = ptx::pack_bf16(bits_to_float(x.a[j] << 16) * into.x[0],
                                      bits_to_float(x.a[j] & 0xffff0000u) * into.x[1]);
      }
    }
    if (p_.summarize && thread() == 0 && tiles_.factor[unit] >= 0) tiles_.factor[unit] *= whole;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (float& S : S_[i][panel].d) S *= whole;
    }
    ptx::wgmma_fence(S_[i], values);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        ptx::wgmma_64x64x16(S_[i][panel].d, values[k], stage().key.columns(16 * k, panel));
      }
    }
    ptx::wgmma_commit();
  }

  const WalkParams& p_;
  HopperTiles<kN, kUnits>& tiles_;
  int group_;   // of the warpgroups that multiply
  int at_ = 0;  // the stage
  GroupProduct S_[kOwn][kPanels];
};

}  // namespace statescan::ssd_scan::cuda
