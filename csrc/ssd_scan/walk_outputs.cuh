// The outputs of a piece in a walk on tensor cores: G = C B^T by the block, M = G between w by the
// head, y = row (C S) + M x + D x by the warp, which has S.
#pragma once

#include "ssd_scan/walk_warp.cuh"

namespace statescan::ssd_scan::cuda {

template <class Kind>
class WalkOutputs : protected WalkWarp<Kind> {
  using Base = WalkWarp<Kind>;

 protected:
  using Base::Base;
  using Base::kTerms, Base::kAcross, Base::kHeadThreads, Base::kHeadWarps, Base::column,
      Base::decays, Base::first, Base::head, Base::operands, Base::own_value, Base::shift,
      Base::stop, Base::warp;
  using Base::own_tiles_, Base::p_, Base::state_, Base::stop_, Base::tiles_;
  using typename Base::State;

  // By some warps, before output(): two neighbouring blocks at a time share the rows of C and go side
  // by side. The second may lie above the diagonal.
  __device__ __forceinline__ void find_G(int warp, int warps) {
    Operands<Kind>& x = operands(stop_);
#pragma unroll 1
    for (int pair = warp; pair < 6; pair += warps) {
      const int t = pair < 2 ? 3 : pair < 4 ? 2 : 5 - pair, s = pair < 4 ? pair % 2 * 2 : 0;
      if (16 * t >= stop().piece.rows) continue;
      Product G[2];
#pragma unroll 2
      for (int k = 0; k < p_.state; k += 32) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Terms<Left, kTerms> C = x.C.left(16 * t, k + 16 * i);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            multiply(G[j], C, x.key.right_of_transpose(16 * (s + j), k + 16 * i));
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (s + j > t) continue;
        const int at = (t * (t + 1) / 2 + s + j) * 64 + ptx::lane();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          tiles_.G[at + 32 * h] = {G[j].d[h][0], G[j].d[h][1], G[j].d[h][2], G[j].d[h][3]};
        }
      }
    }
  }

  // Outputs of 32 steps at a time: enough to do between one load and the next, and registers for it.
  __device__ __forceinline__ void output(const Piece& piece) {
    const bool has_columns = state_.columns() > 0;
    const int rows = piece.rows;
#pragma unroll
    for (int t = 0; t < kSteps; t += 32) {
      if (t >= rows) break;
      Product y[2][kAcross];
      if (has_columns) state_.add_output(operands(stop_).C, t, y);
      if (t == 0) {
        __syncthreads();  // G is in place
        find_M(rows);
        ptx::barrier_sync(1 + int(threadIdx.x) / kHeadThreads, kHeadThreads);  // M is in place
      }
      if (!has_columns) continue;
      add_steps(t, rows, y);
      if (p_.D) add_skip(t, y);
      const Slice to(p_.y, piece, head(), first() + column(), state_.columns());
      if (kTerms == 1 && !p_.z && to.packed && to.dtype == DType::kBFloat16 &&
          state_.columns() >= State::kColumns) {
        store_directly(to, t, rows, y);
      } else {
        store_staged(to, piece, t, rows, y);
      }
    }
  }

 private:
  // A warp has whole rows of blocks, as many blocks as the others of its head if there are two.
  __device__ __forceinline__ void find_M(int rows) {
    Decays<float>& d = decays();
    const int lane = ptx::lane();
#pragma unroll 1
    for (int i = 0; i < 4 / kHeadWarps; ++i) {
      const int t = i == 0 ? 3 - warp() : warp();
      if (16 * t >= rows) continue;
      const float begin_high = d.high[16 * t], begin_low = d.low[16 * t];
      float high[2], low[2], from_begin[2];  // of the lane's rows
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int after = 16 * t + lane / 4 + 8 * r + 1 - shift();
        high[r] = d.high[after], low[r] = d.low[after];
        from_begin[r] = exp2((high[r] - begin_high) + (low[r] - begin_low));
      }
#pragma unroll 1
      for (int s = 0; s < t; ++s) {
        decay_G(t, s, [&](int step, float (&G)[2]) {
          const float to_begin =
              exp2((begin_high - d.high[step + 1]) + (begin_low - d.low[step + 1]));
#pragma unroll
          for (int r = 0; r < 2; ++r) G[r] *= from_begin[r] * (to_begin * d.weight[step]);
        });
      }
      decay_G(t, t, [&](int step, float (&G)[2]) {
        const float step_high = d.high[step + 1], step_low = d.low[step + 1];
        const float weight = d.weight[step];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float L = exp2((high[r] - step_high) + (low[r] - step_low));
          G[r] = step + shift() <= 16 * t + lane / 4 + 8 * r ? G[r] * L * weight : 0.0f;
        }
      });
    }
  }

  // A block of G becomes one of M: decay(step, the lane's two numbers of G).
  template <class Decay>
  __device__ __forceinline__ void decay_G(int t, int s, Decay&& decay) {
    const int block = t * (t + 1) / 2 + s, lane = ptx::lane();
    Product x;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 v = tiles_.G[(2 * block + h) * 32 + lane];
      const float rows[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float G[2] = {rows[e][0], rows[e][1]};
        decay(16 * s + 8 * h + lane % 4 * 2 + e, G);
        x.d[h][e] = G[0], x.d[h][2 + e] = G[1];
      }
    }
    const auto M = left_terms<kTerms>(x);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      const uint32_t (&a)[4] = M.term[i].a;
      own_tiles_.M[(block * kTerms + i) * 32 + lane] = {a[0], a[1], a[2], a[3]};
    }
  }

  __device__ __forceinline__ Terms<Left, kTerms> load_M(int t, int s) {
    const int block = t / 16 * (t / 16 + 1) / 2 + s / 16;
    return terms<kTerms>([&](int i) -> Left {
      const uint4 a = own_tiles_.M[(block * kTerms + i) * 32 + ptx::lane()];
      return {{a.x, a.y, a.z, a.w}};
    });
  }

  // y <- row y + M x.
  __device__ __forceinline__ void add_steps(int t, int rows, Product (&y)[2][kAcross]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        y[r][j].for_each([&](int row, int, float& v) { v *= decays().row[t + 16 * r + row]; });
      }
    }
    auto& value = own_value();
#pragma unroll
    for (int s = 0; s <= t + 16; s += 16) {
      if (s >= rows) break;
      Terms<Right, kTerms> x[kAcross];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) x[j] = value.right(s, column() + 16 * j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (s > t + 16 * r || t + 16 * r >= rows) continue;
        const Terms<Left, kTerms> M = load_M(t + 16 * r, s);
#pragma unroll
        for (int j = 0; j < kAcross; ++j) multiply(y[r][j], M, x[j]);
      }
    }
  }

  __device__ __forceinline__ void add_skip(int t, Product (&y)[2][kAcross]) {
    auto& value = own_value();
    const int lane = ptx::lane();
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int c = column() + 16 * j + 8 * h + lane % 4 * 2;
        const auto D = several<2>(own_tiles_.D[c]);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float x, next;
          value.pair(t + 8 * r + lane / 4, c, x, next);
          float* v = &y[r / 2][j].d[h][r % 2 * 2];
          v[0] += D.x[0] * x, v[1] += D.x[1] * next;
        }
      }
    }
  }

  // Straight from the registers: bfloat16, all columns, no gate. Lanes exchange pairs with their
  // neighbours, so that each has 4 numbers of a step and a warp fills 32 bytes of every row.
  __device__ __forceinline__ void store_directly(const Slice& to, int t, int rows,
                                                 const Product (&y)[2][kAcross]) {
    const int lane = ptx::lane(), c = lane % 2 == 1 ? lane % 4 * 2 + 6 : lane % 4 * 2;
    int row = t + lane / 4;
    char* at = const_cast<char*>(to.data) + 2 * (row * to.step + c);
#pragma unroll
    for (int r = 0; r < 4; ++r, row += 8, at += 16 * to.step) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const float* low = &y[r / 2][j].d[0][r % 2 * 2];
        const float* high = &y[r / 2][j].d[1][r % 2 * 2];
        const uint32_t own[2] = {ptx::pack_bf16(low[0], low[1]), ptx::pack_bf16(high[0], high[1])};
        const bool odd = lane % 2 == 1;
        const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? own[0] : own[1], 1);
        const uint2 four = odd ? uint2{other, own[1]} : uint2{own[0], other};
        if (row < rows) ptx::store(reinterpret_cast<uint2*>(at) + 4 * j, four);
      }
    }
  }

  // Any others: 16 steps at a time go through the warp's stage, from where a lane takes 8
  // neighbours of a step.
  __device__ __forceinline__ void store_staged(const Slice& to, const Piece& piece, int t, int rows,
                                               const Product (&y)[2][kAcross]) {
    auto& stage = own_tiles_.stage[warp()].element;
    constexpr int kPitch = OutputStage<Kind>::kPitch;
    constexpr unsigned kPacks = 2 * kAcross;
#pragma unroll
    for (int r = 0; r < 2; ++r, t += 16) {
      if (t >= rows) continue;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const unsigned lane = unsigned(ptx::lane());
        float* at = &stage[int(lane / 4 * kPitch + 16 * j + lane % 4 * 2)];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &y[r][j].d[i / 2][i % 2 * 2];
          several<2>(at[i % 2 * 8 * kPitch + i / 2 * 8]) = {pair[0], pair[1]};
        }
      }
      __syncwarp();  // the stage is filled
#pragma unroll 1
      for (unsigned k = unsigned(ptx::lane()); k < 16 * kPacks; k += 32) {
        const int row = int(k / kPacks), i = int(k % kPacks) * 8;
        if (t + row < rows && i < to.columns) {
          store_neighbours(to, piece, t + row, i, &stage[row * kPitch + i]);
        }
      }
      __syncwarp();  // it has been read
    }
  }

  __device__ __forceinline__ void store_neighbours(const Slice& to, const Piece& piece, int t,
                                                   int i, float* y) {
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = several<4>(y[e / 4 * 4]).x[e % 4];
    if (p_.z) {
      float gate[8];
      load_numbers(Slice(p_.z, piece, head(), first() + column(), to.columns), t, i, gate);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] *= silu(gate[e]);
    }
    store_numbers(to, t, i, v);
  }
};

}  // namespace statescan::ssd_scan::cuda
