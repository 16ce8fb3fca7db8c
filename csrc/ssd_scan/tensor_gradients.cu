// The gradients of the SSD scan within each cell, on tensor cores: x, B and C of up to 24 bits,
// with sums in float. docs/ssd_scan.md has the formulas and names.
//
// Block: one cell and some heads of a group, one after the other. A warp has 16 rows of dB and dC
// and half of their columns in registers for all of the heads. Per head, or block of its columns:
//
//   5 warps  V = dy x^T, GL = G L, dG += V L w        |  all warps  dC += row (dy S^T)
//   others   the gradient of the last head's decays,  |             dB += column w (x dS^T)
//            the decays of the next                   |             dx = w (column B dS + GL^T dy)
//   ahead    the next head's x, dy, S, dS             |                  + D dy;  y and dz if gated
//
// After the heads: dC += dG B, dB += dG^T C. There is a barrier before each head and one between
// its two halves.
//
// Grid over (batch, cell, group, task of the group). Shared memory: see GradientTiles.
#include <type_traits>

#include "common/launch.h"
#include "ssd_scan/gradient_decays.cuh"
#include "ssd_scan/kinds.h"

namespace statescan::ssd_scan::cuda {
namespace {

template <int kN, int kTerms>
class TensorGradients : GradientWarp<kN, kTerms> {
  using Base = GradientWarp<kN, kTerms>;
  using Base::add_skip, Base::weighted, Base::for_rows, Base::kColumns;
  using Base::half, Base::row, Base::lane_row, Base::project, Base::from_output_;
  using Base::into_state_, Base::for_products;
  using Base::kDown, Base::kProducts, Base::task, Base::cell_sums, Base::steps, Base::shift;
  using Base::p_, Base::tiles_, Base::warp_, Base::dB_, Base::dC_, Base::held_, Base::states;
  using typename Base::Stage, typename Base::Tiles;

 public:
  __device__ __forceinline__ TensorGradients(const GradientParams& p, int stages)
      : Base(p, *dynamic_shared<Tiles>()), decays_(p, tiles_), stages_(stages) {}

  __device__ __forceinline__ void run() {
    load_marks(p_, task().b, task().cell, tiles_.marks);
    cell_sums().clear();
    for (int row = 0; row < task().cell.rows;) {
      __syncthreads();  // the marks are in place, the piece before is done with
      if (threadIdx.x == 0)
        tiles_.piece = Pieces(p_, task().b, task().cell, tiles_.marks).from(row);
      __syncthreads();  // the piece is known
      tiles_.piece.padding ? run_padding(tiles_.piece) : run_piece(tiles_.piece);
      row = tiles_.piece.row + tiles_.piece.rows;
    }
  }

 private:
  static constexpr int kOwn = 2, kBlockWarps = kBelow / kOwn;  // blocks of V of a warp

  __device__ __forceinline__ Slice projection(const View<5>& x, const Piece& piece) const {
    return Slice(part_view(x, task().part), piece, task().group, 0, states());
  }

  __device__ __forceinline__ void clear_rows(const Slice& x, int first, int rows) {
    const unsigned pairs = unsigned(x.columns + 1) / 2;
    for (unsigned k = threadIdx.x; k < unsigned(rows) * pairs; k += kGradientThreads) {
      store_pair(x, first + int(k / pairs), int(k % pairs) * 2, 0, 0);
    }
  }

  __device__ __forceinline__ void run_padding(const Piece& piece) {
    for (int64_t h = task().begin; h < task().end; ++h) {
      clear_rows(Slice(p_.dx, piece, h, 0, int(p_.headdim)), 0, piece.rows);
      if (p_.z) clear_rows(Slice(p_.dz, piece, h, 0, int(p_.headdim)), 0, piece.rows);
      clear_dt(p_, piece, h);
    }
    clear_rows(projection(p_.dB, piece), 0, piece.rows);
    clear_rows(projection(p_.dC, piece), 0, piece.rows);
  }

  // Calls f(which of the warp's blocks, block, t, s) for them, t and s in 16 steps.
  template <class F>
  __device__ __forceinline__ void for_blocks(F&& f) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int block = warp_ + kBlockWarps * i;
      const int t = block >= 6 ? 3 : block >= 3 ? 2 : block >= 1, s = block - t * (t + 1) / 2;
      if (warp_ < kBlockWarps && 16 * t < tiles_.piece.rows) f(i, block, t, s);
    }
  }

  // In rounds: the first has B and C brought, then comes one for each step, and in the last there
  // are only sums of the last head left.
  __device__ __forceinline__ void run_piece(const Piece& piece) {
    find_operands(p_, cell_sums(), piece, steps(), warp_, tiles_.operands);
    Step step = steps().before({task().begin, 0});
    for (;; step = steps().after(step)) {
      Stage& stage = begin_round(step);
      decays_.advance(piece, warp_, step);
      if (step.h == task().end) break;
      step.h < task().begin ? begin_group(piece) : take_step(piece, step, stage);
    }
    finish_group(piece);
  }

  __device__ __forceinline__ Stage& stage_of(const Step& step) {
    return tiles_.stage[stages_ == 1 ? 0 : steps().count(step) & 1];
  }

  // Fetches the next step, or with a single stage this one; returns this one's stage, which is in
  // place.
  __device__ __forceinline__ Stage& begin_round(const Step& step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // places, decays and, of two stages, this one are there, the other is free
    const Step fetched = stages_ == 2 ? steps().after(step) : step;
    if (fetched.h >= task().begin && fetched.h < task().end) {
      fetch_step(p_, tiles_.operands, steps(), fetched, stage_of(fetched));
    }
    if (stages_ == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // the stage is in place
    }
    return stage_of(step);
  }

  __device__ __forceinline__ void begin_group(const Piece& piece) {
    const int thread = int(threadIdx.x);
    load_tile(Slice(p_.B, piece, task().group, 0, states()), piece, 0, tiles_.B, thread,
              kGradientThreads);
    load_tile(Slice(p_.C, piece, task().group, 0, states()), piece, shift(), tiles_.C, thread,
              kGradientThreads);
#pragma unroll
    for (int j = 0; j < kDown; ++j) dB_[j] = dC_[j] = Product{};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) dG_[i] = Product{};
    __syncthreads();  // B and C are in place
    this->load_B();
    for_blocks([&](int, int block, int t, int s) {
      Product G;
#pragma unroll 1
      for (int k = 0; k < states(); k += 16) {
        multiply(G, tiles_.C.left(16 * t, k), tiles_.B.right_of_transpose(16 * s, k));
      }
      keep(G, tiles_.G, block);
    });
  }

  __device__ __forceinline__ void take_step(const Piece& piece, const Step& step, Stage& stage) {
    Skip<kColumns>& skip = tiles_.skip[steps().count(step) & 1];
    Decays<float>& decays = tiles_.decays_of(step.h);
    HeadSums& sums = tiles_.sums_of(step.h);
    const Steps all = steps();
    const int lane = ptx::lane();
    if (step.i < all.blocks()) {
      for_blocks([&](int i, int block, int t, int s) {
        Product V;
        if (step.i > 0) V = kept(tiles_.product, block);
#pragma unroll
        for (int k = 0; k < kColumns; k += 16) {
          multiply(V, stage.g.left(16 * t, k, lane), stage.x.right_of_transpose(16 * s, k, lane));
        }
        if (step.i + 1 < all.blocks()) return keep(V, tiles_.product, block);
        score(block, t, s, V, dG_[i], decays, sums.blocks);
      });
      if (!all.has_states(step)) return;
      __syncthreads();  // GL is in place
    }
    if (all.first_of(step) == 0) {
      from_output_[0] = from_output_[1] = into_state_[0] = into_state_[1] = held_ = 0;
    }
    project(stage, decays);
    if (row() < piece.rows) {
      if (p_.z) gate_gradient(piece, step, decays, stage, skip);
      input_gradient(piece, step, decays, stage, skip);
    }
    if (p_.D) skip_gradient(stage, skip);
    if (step.i + 1 == all.per_head()) gather(decays, sums);
  }

  // The lanes' sums for steps become sums for each half of the states.
  __device__ __forceinline__ void gather(Decays<float>& decays, HeadSums& sums) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = lane_row() + 8 * i, at = half() * kSteps + t;
      const float output = quad_sum(from_output_[i]), into = quad_sum(into_state_[i]);
      if (ptx::lane() % 4 > 0) continue;
      sums.from_output[at] = decays.row[t] * output;
      sums.into_state[at] = decays.column[t] * into;
    }
    const float held = warp_sum(held_);
    if (ptx::lane() == 0) sums.held[warp_] = held;
  }

  // GL, dG and the sums over V GL of a block.
  __device__ __forceinline__ void score(int block, int t0, int s0, Product& V, Product& dG,
                                        Decays<float>& d, BlockSums& sums) {
    const int lane = ptx::lane(), t = 16 * t0 + lane / 4, s = 16 * s0 + lane % 4 * 2;
    const Product G = kept(tiles_.G, block);
    float row[2], row_low[2];  // of the sums of the decays
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = t + 8 * i + 1 - shift();
      row[i] = d.high[r], row_low[i] = d.low[r];
    }
    Product GL;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = s + 8 * h + e;
        const float high = d.high[column + 1], low = d.low[column + 1], weight = d.weight[column];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float L = ptx::ex2((row[i] - high) + (row_low[i] - low));
          const float there = column + shift() <= t + 8 * i ? L : 0.0f;
          float& V_GL = V.d[h][2 * i + e];
          GL.d[h][2 * i + e] = G.d[h][2 * i + e] * there;
          dG.d[h][2 * i + e] += V_GL * there * weight;
          V_GL *= GL.d[h][2 * i + e];
        }
      }
    }
    tiles_.GL.put(16 * t0, 16 * s0, GL);
    sum_block<kTerms>(V, d, t0, s0, shift(), sums);
  }

  // y once more, for dz.
  __device__ __forceinline__ void gate_gradient(const Piece& piece, const Step& step,
                                                Decays<float>& decays, Stage& stage,
                                                Skip<kColumns>& skip) {
    Product y[kProducts];
    this->add_states(tiles_.C, stage.S, 0, states(), y);
    this->scale_rows(decays.row, y);
#pragma unroll 1
    for (int s = 0; s <= row(); s += 16) {
      const auto M = weighted(tiles_.GL.left(row(), s), decays, s);
      for_products(y, [&](Product& sum, int c) { multiply(sum, M, stage.x.right(s, c)); });
    }
    const Operands& operands = tiles_.operands;
    const Slice dy = operands.dy.at(steps(), step), z = operands.z.at(steps(), step);
    const Slice dz = operands.dz.at(steps(), step);
    for_products(y, [&](Product& sum, int c) {
      for_rows(sum, [&](int i, int j, float (&v)[8]) {
        const int t = row() + i, column = c + j;
        if (t >= piece.rows) return;
        add_skip(stage.x, skip, t, column, v);
        float out[8] = {}, gate[8];
        if (p_.dy) load_some(dy, t, column, out);
        load_some(z, t, column, gate);
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] *= out[k] * silu_slope(gate[k], sigmoid(gate[k]));
        store_some(dz, t, column, v);
      });
    });
  }

  __device__ __forceinline__ void input_gradient(const Piece& piece, const Step& step,
                                                 Decays<float>& decays, Stage& stage,
                                                 Skip<kColumns>& skip) {
    const int lane = ptx::lane();
    Product dx[kProducts];
    this->add_input_states(stage.dS, dx);
    this->scale_rows(decays.column, dx);
#pragma unroll 1
    for (int t = row(); t < piece.rows; t += 16) {
      const auto GL = tiles_.GL.left_of_transpose(t, row(), lane);
      for_products(dx, [&](Product& sum, int c) { multiply(sum, GL, stage.g.right(t, c, lane)); });
    }
    const Slice to = tiles_.operands.dx.at(steps(), step);
    for_products(dx, [&](Product& sum, int c) {
      for_rows(sum, [&](int i, int j, float (&v)[8]) {
        const int s = row() + i, column = c + j;
        if (s >= piece.rows) return;
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] *= decays.weight[s];
        add_skip(stage.g, skip, s, column, v);
        store_some(to, s, column, v);
      });
    });
  }

  // The diagonal of dy^T x, 16 columns to a warp.
  __device__ __forceinline__ void skip_gradient(Stage& stage, Skip<kColumns>& skip) {
    const int c = 16 * warp_;
    if (c >= kColumns) return;
    const int lane = ptx::lane();
    Product sum;
#pragma unroll
    for (int t = 0; t < kSteps; t += 16) {
      multiply(sum, stage.g.left_of_transpose(t, c, lane), stage.x.right(t, c, lane));
    }
    for_diagonal(sum, [&](int i, float x) { skip.dD[c + i] = x; });
  }

  // dB and dC through G, of which all the heads have their share in dG by now.
  __device__ __forceinline__ void finish_group(const Piece& piece) {
    for_blocks([&](int i, int, int t, int s) { tiles_.GL.put(16 * t, 16 * s, dG_[i]); });
    __syncthreads();  // dG is in place
    add_through_G(p_.dC, piece, shift(), dC_, [&](Product& dC, int n) {
#pragma unroll 1
      for (int s = 0; s <= row(); s += 16) {
        multiply(dC, tiles_.GL.left(row(), s), tiles_.B.right(s, n));
      }
    });
    add_through_G(p_.dB, piece, 0, dB_, [&](Product& dB, int n) {
#pragma unroll 1
      for (int t = row(); t < piece.rows; t += 16) {
        multiply(dB, tiles_.GL.left_of_transpose(t, row()), tiles_.C.right(t, n));
      }
    });
    // No output reads the last C.
    if (shift() == 1 && piece.last) {
      clear_rows(projection(p_.dC, piece), piece.rows - 1, 1);
    }
  }

  // add(sums, first state) for the warp's rows of dB or dC, which are stored `shift` steps earlier.
  template <class Add>
  __device__ __forceinline__ void add_through_G(const View<5>& x, const Piece& piece, int shift,
                                                Product (&sums)[kDown], Add&& add) {
    const Slice to = projection(x, piece);
#pragma unroll
    for (int j = 0; j < kDown; ++j) {
      const int n = this->state_of(j);
      if (n >= states() || row() >= piece.rows) continue;
      add(sums[j], n);
      for_rows(sums[j], [&](int i, int k, float (&v)[8]) {
        const int t = row() + i;
        if (t < piece.rows && (t >= shift || !piece.first)) store_some(to, t - shift, n + k, v);
      });
    }
  }

  GradientDecays<kN, kTerms> decays_;
  int stages_;
  Product dG_[kOwn];
};

template <int kN, int kTerms>
__global__ __launch_bounds__(kGradientThreads,
                             1) void tensor_gradients_kernel(const GradientParams p, int stages,
                                                             int64_t tasks) {
  auto& tiles = *dynamic_shared<GradientTiles<kN, kTerms>>();
  for (int64_t i = blockIdx.x; i < tasks; i = tiles.index + gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) tiles.index = i, tiles.task = gradient_task(p, i);
    __syncthreads();  // the task is known
    TensorGradients<kN, kTerms>(p, stages).run();
  }
}

template <int kValue>
using Int = std::integral_constant<int, kValue>;

template <int kN, int kTerms>
int64_t shared_bytes(int stages) {
  using Tiles = GradientTiles<kN, kTerms>;
  return sizeof(Tiles) - (2 - stages) * sizeof(typename Tiles::Stage);
}

template <int kN, int kTerms>
void run(const GradientParams& p, cudaStream_t stream) {
  const int64_t tasks = gradient_tasks(p);
  const int stages = shared_bytes<kN, kTerms>(2) <= p.shared_bytes ? 2 : 1;
  launch("ssd_scan gradients", tensor_gradients_kernel<kN, kTerms>, blocks_for(tasks, 1),
         kGradientThreads, size_t(shared_bytes<kN, kTerms>(stages)), stream, p, stages, tasks);
}

// f(states, terms) with what a problem takes; false if there is no such kernel.
template <class F>
bool with_kernel(const GradientParams& p, F&& f) {
  const int terms = p.terms();
  if (terms == 1) return p.state <= 128 ? f(Int<128>{}, Int<1>{}) : f(Int<256>{}, Int<1>{});
  if (terms == 0 || p.state > 128) return false;
  return terms == 2 ? f(Int<128>{}, Int<2>{}) : f(Int<128>{}, Int<3>{});
}

}  // namespace

bool has_tensor_gradients(const GradientParams& p) {
  return with_kernel(p, [&](auto states, auto terms) {
    return shared_bytes<states(), terms()>(1) <= p.shared_bytes;
  });
}

void tensor_gradients(const GradientParams& p, cudaStream_t stream) {
  with_kernel(p, [&](auto states, auto terms) {
    run<states(), terms()>(p, stream);
    return true;
  });
}

}  // namespace statescan::ssd_scan::cuda
