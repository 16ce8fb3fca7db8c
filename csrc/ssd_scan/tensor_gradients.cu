// The gradients of the SSD scan within each cell, on tensor cores: x, B and C of bfloat16, sums in
// float. docs/ssd_scan.md has the formulas and names.
//
// Block: one cell and some heads of a group, one after the other. A warp has 16 rows of dB and dC
// and 64 of their columns in registers for all of the heads, and one or two blocks of 16 x 16 of
// dG. Per head, for 64 columns of headdim at a time:
//
//   V = dy x^T,  GL = G L,  dG += V L w          x, dy, S staged
//   dC += row (dy S^T),  y and dz if gated       dS staged over S
//   dB += column w (x dS^T),  dx = w (column B dS + GL^T dy) + D dy,  decays
//   after the heads: dC += dG B,  dB += dG^T C
//
// Grid over (batch, cell, group, task of the group). Shared memory: see GradientTiles.
#include "common/launch.h"
#include "ssd_scan/kinds.h"
#include "ssd_scan/tensor_products.cuh"

namespace statescan::ssd_scan::cuda {
namespace {

template <int kN>
class TensorGradients : GradientWarp<kN> {
  using Base = GradientWarp<kN>;
  using Base::kProducts, Base::task, Base::cell_sums, Base::shift, Base::states, Base::tile_row;
  using Base::p_, Base::tiles_, Base::warp_, Base::held_, Base::kGroups, Base::kWarps;
  using Base::state_group, Base::columns_of, Base::load_state, Base::project, Base::for_products;
  using Base::through_state, Base::for_pairs, Base::add_skip, Base::weighted;

 public:
  using Base::kThreads;

  __device__ __forceinline__ explicit TensorGradients(const GradientParams& p)
      : Base(p, *dynamic_shared<GradientTiles<kN>>()) {}

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
  static constexpr int kOwn = (kBelow + kWarps - 1) / kWarps;  // blocks of dG of a warp

  __device__ __forceinline__ Slice projection(const View<5>& x, const Piece& piece) const {
    return Slice(part_view(x, task().part), piece, task().group, 0, states());
  }

  __device__ __forceinline__ void clear_rows(const Slice& x, int first, int rows) {
    const unsigned pairs = unsigned(x.columns + 1) / 2;
    for (unsigned k = threadIdx.x; k < unsigned(rows) * pairs; k += kThreads) {
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
      const int block = warp_ + kWarps * i;
      const int t = block >= 6 ? 3 : block >= 3 ? 2 : block >= 1, s = block - t * (t + 1) / 2;
      if (block < kBelow && 16 * t < tiles_.piece.rows) f(i, block, t, s);
    }
  }

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    load_tile(Slice(p_.B, piece, task().group, 0, states()), piece, 0, tiles_.B, int(threadIdx.x),
              kThreads);
    load_tile(Slice(p_.C, piece, task().group, 0, states()), piece, shift(), tiles_.C,
              int(threadIdx.x), kThreads);
#pragma unroll
    for (int j = 0; j < 4; ++j) dB_[j] = dC_[j] = Product{};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) dG_[i] = Product{};
    __syncthreads();  // B and C are in place
    for_blocks([&](int, int block, int t, int s) {
      Product G;
#pragma unroll 1
      for (int k = 0; k < states(); k += 16) {
        multiply(G, left_of(tiles_.C.at(16 * t, k), Tile<kSteps, kN>::kPitch),
                 right_of_transposed(tiles_.B.at(16 * s, k), Tile<kSteps, kN>::kPitch));
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // read by the same lane
        tiles_.G[(2 * block + h) * 32 + ptx::lane()] = {G.d[h][0], G.d[h][1], G.d[h][2], G.d[h][3]};
      }
    });
#pragma unroll 1
    for (int64_t h = task().begin; h < task().end; ++h) run_head(piece, h);
    finish_group(piece);
  }

  __device__ __forceinline__ void stage(const Piece& piece, int64_t h, int first) {
    const int columns = columns_of(first);
    load_tile(Slice(p_.x, piece, h, first, columns), piece, 0, tiles_.x, int(threadIdx.x),
              kThreads);
    load_ungated(p_, piece, h, first, columns, tiles_.g, int(threadIdx.x), kThreads);
  }

  __device__ __forceinline__ void run_head(const Piece& piece, int64_t h) {
    __syncthreads();  // the head before is done with
    if (warp_ == 0) find_decays(p_, piece, h, Head<float>(p_, h), tiles_.decays);
    Product V[kOwn];
#pragma unroll 1
    for (int first = 0; first < p_.headdim; first += kColumns) {
      if (first > 0) __syncthreads();  // the columns before have been read
      stage(piece, h, first);
      __syncthreads();  // operands and decays are in place
      for_blocks([&](int i, int, int t, int s) {
        Product& sum = V[i];
#pragma unroll 1
        for (int k = 0; k < columns_of(first); k += 16) {
          multiply(sum, left_of(tiles_.g.at(16 * t, k), kPitch),
                   right_of_transposed(tiles_.x.at(16 * s, k), kPitch));
        }
      });
    }
    for_blocks([&](int i, int block, int t, int s) { score(block, t, s, V[i], dG_[i]); });
    from_output_[0] = from_output_[1] = into_state_[0] = into_state_[1] = held_ = 0;
#pragma unroll 1
    for (int first = 0; first < p_.headdim; first += kColumns) {
      const int columns = columns_of(first);
      if (p_.headdim > kColumns) {
        __syncthreads();  // the columns before have been read
        stage(piece, h, first);
      }
      this->template load_state<false>(p_.cell_states, piece.entry && !piece.first,
                                       p_.initial_state, piece.from, h, first, columns);
      __syncthreads();  // S, GL and V GL are in place
      project(tiles_.g, columns, tiles_.C, tiles_.decays.row, nullptr, dC_, from_output_);
      if (p_.z) gate_gradient(piece, h, first, columns);
      if (first == 0) add_columns(tiles_.share, piece.rows, tiles_.sums);
      __syncthreads();  // S has been read
      this->template load_state<true>(p_.dcell_states, piece.exit && !piece.last, p_.dlast_state,
                                      piece.to, h, first, columns);
      if (first == 0) add_rows(tiles_.share, piece.rows, tiles_.decays);
      __syncthreads();  // dS and the row sums are in place
      project(tiles_.x, columns, tiles_.B, tiles_.decays.column, &tiles_.decays.weight, dB_,
              into_state_);
      input_gradient(piece, h, first, columns);
      if (first == 0) add_crossing(tiles_.share, piece.rows, shift(), tiles_.sums);
      if (p_.D) skip_gradient(piece, h, first, columns);
    }
    gather();
    __syncthreads();  // all sums are in place
    if (warp_ == 0) finish_head(piece, h);
  }

  // The lanes' sums for steps become sums for each group of states.
  __device__ __forceinline__ void gather() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float output = from_output_[i], into = into_state_[i];
      for (int by = 1; by < 4; by *= 2) {
        output += __shfl_xor_sync(kAllLanes, output, by);
        into += __shfl_xor_sync(kAllLanes, into, by);
      }
      const int at = state_group() * kSteps + 16 * tile_row() + ptx::lane() / 4 + 8 * i;
      if (ptx::lane() % 4 == 0) tiles_.from_output[at] = output, tiles_.into_state[at] = into;
    }
    held_ = warp_sum(held_);
    if (ptx::lane() == 0) tiles_.held[warp_] = held_;
  }

  __device__ __forceinline__ void finish_head(const Piece& piece, int64_t h) {
    for (int i = ptx::lane(); i < kSteps; i += 32) {
      float output = 0, into = 0;
      for (int k = 0; k < kGroups; ++k) {
        output += tiles_.from_output[k * kSteps + i], into += tiles_.into_state[k * kSteps + i];
      }
      tiles_.sums.from_output[i] = output, tiles_.sums.into_state[i] = into;
    }
    __syncwarp();  // they are in place
    float held = 0;
    for (int i = 0; i < kWarps; ++i) held += tiles_.held[i];
    const Sums<float> sums =
        decay_gradient(p_, piece, h, Head<float>(p_, h).A, held * tiles_.decays.whole,
                       tiles_.decays, tiles_.sums, p_.ddt);
    if (ptx::lane() > 0) return;
    cell_sums().add(h, sums);
  }

  // GL, dG and V GL of a block.
  __device__ __forceinline__ void score(int block, int t0, int s0, const Product& V, Product& dG) {
    Decays<float>& d = tiles_.decays;
    const int lane = ptx::lane();
    Product GL;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 row = tiles_.G[(2 * block + h) * 32 + lane];
      const float G[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = 16 * t0 + lane / 4 + i / 2 * 8, s = 16 * s0 + 8 * h + lane % 4 * 2 + i % 2;
        const float L = s + shift() <= t ? d.between(t, s, shift()) : 0.0f;
        GL.d[h][i] = G[i] * L;
        dG.d[h][i] += V.d[h][i] * L * d.weight[s];
        tiles_.share.at(t, s) = V.d[h][i] * GL.d[h][i];
      }
    }
    store_rounded(GL, tiles_.GL.at(16 * t0, 16 * s0), kPitch);
  }

  // y once more, for dz.
  __device__ __forceinline__ void gate_gradient(const Piece& piece, int64_t h, int first,
                                                int columns) {
    if (16 * tile_row() >= piece.rows) return;
    Product y[kProducts];
    through_state(tiles_.C, columns, tiles_.decays.row, y);
#pragma unroll 1
    for (int s = 0; s <= tile_row(); ++s) {
      const Left M = weighted(left_of(tiles_.GL.at(16 * tile_row(), 16 * s), kPitch), 16 * s);
      for_products(y, columns, [&](Product& sum, int c) {
        multiply(sum, M, right_of(tiles_.x.at(16 * s, c), kPitch));
      });
    }
    const Slice dy(p_.dy ? p_.dy : p_.x, piece, h, first, columns);
    const Slice z(p_.z, piece, h, first, columns), dz(p_.dz, piece, h, first, columns);
    for_pairs(y, columns, [&](int t, int column, float a, float b) {
      add_skip(tiles_.x, h, first, t, column, columns, a, b);
      float out[2] = {}, gate[2];
      if (p_.dy) load_pair(dy, t, column, out[0], out[1]);
      load_pair(z, t, column, gate[0], gate[1]);
      store_pair(dz, t, column, out[0] * silu_slope(gate[0], sigmoid(gate[0])) * a,
                 out[1] * silu_slope(gate[1], sigmoid(gate[1])) * b);
    });
  }

  __device__ __forceinline__ void input_gradient(const Piece& piece, int64_t h, int first,
                                                 int columns) {
    if (16 * tile_row() >= piece.rows) return;
    Product dx[kProducts];
    through_state(tiles_.B, columns, tiles_.decays.column, dx);
#pragma unroll 1
    for (int t = 16 * tile_row(); t < piece.rows; t += 16) {
      const Left GL = left_of_transposed(tiles_.GL.at(t, 16 * tile_row()), kPitch);
      for_products(dx, columns, [&](Product& sum, int c) {
        multiply(sum, GL, right_of(tiles_.g.at(t, c), kPitch));
      });
    }
    const Slice to(p_.dx, piece, h, first, columns);
    for_pairs(dx, columns, [&](int s, int column, float a, float b) {
      a *= tiles_.decays.weight[s], b *= tiles_.decays.weight[s];
      add_skip(tiles_.g, h, first, s, column, columns, a, b);
      store_pair(to, s, column, a, b);
    });
  }

  __device__ __forceinline__ void skip_gradient(const Piece& piece, int64_t h, int first,
                                                int columns) {
    const CellSums<float> sums = cell_sums();
    for_quarters([&](int i, int begin) {
      const float sum = column_dot(tiles_.g, tiles_.x, i < columns ? i : 0, begin, piece.rows);
      if (begin > 0) return;
      if (!p_.wide_D) {
        tiles_.skip[i] = i < columns ? sum : 0.0f;
      } else if (i < columns) {
        sums.skip(h, first + i) += sum;
      }
    });
    if (p_.wide_D) return;
    __syncthreads();  // the columns' sums are in place
    if (warp_ > 0) return;
    const float sum = warp_sum(tiles_.skip[ptx::lane()] + tiles_.skip[ptx::lane() + 32]);
    if (ptx::lane() == 0) sums.skip(h, 0) += sum;
  }

  // dB and dC through G, of which all the heads have their share in dG by now.
  __device__ __forceinline__ void finish_group(const Piece& piece) {
    __syncthreads();  // GL has been read
    for_blocks([&](int i, int, int t, int s) {
      store_rounded(dG_[i], tiles_.GL.at(16 * t, 16 * s), kPitch);
    });
    __syncthreads();  // dG is in place
    add_through_G(p_.dC, piece, shift(), dC_, [&](Product& dC, int n) {
#pragma unroll 1
      for (int s = 0; s <= tile_row(); ++s) {
        multiply(dC, left_of(tiles_.GL.at(16 * tile_row(), 16 * s), kPitch),
                 right_of(tiles_.B.at(16 * s, n), Tile<kSteps, kN>::kPitch));
      }
    });
    add_through_G(p_.dB, piece, 0, dB_, [&](Product& dB, int n) {
#pragma unroll 1
      for (int t = 16 * tile_row(); t < piece.rows; t += 16) {
        multiply(dB, left_of_transposed(tiles_.GL.at(t, 16 * tile_row()), kPitch),
                 right_of(tiles_.C.at(t, n), Tile<kSteps, kN>::kPitch));
      }
    });
    // No output reads the last C.
    if (shift() == 1 && piece.last) clear_rows(projection(p_.dC, piece), piece.rows - 1, 1);
  }

  // add(sums, first state) for the warp's rows of dB or dC, which are stored `shift` steps earlier.
  template <class Add>
  __device__ __forceinline__ void add_through_G(const View<5>& x, const Piece& piece, int shift,
                                                Product (&sums)[4], Add&& add) {
    const Slice to = projection(x, piece);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = 64 * state_group() + 16 * j;
      if (n >= states() || 16 * tile_row() >= piece.rows) continue;
      add(sums[j], n);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int t = 16 * tile_row() + ptx::lane() / 4 + 8 * i;
          if (t >= piece.rows || (t < shift && piece.first)) continue;
          store_pair(to, t - shift, n + 8 * h + ptx::lane() % 4 * 2, sums[j].d[h][2 * i],
                     sums[j].d[h][2 * i + 1]);
        }
      }
    }
  }

  float from_output_[2], into_state_[2];  // of the head
  Product dB_[4], dC_[4], dG_[kOwn];
};

template <int kN>
__global__ __launch_bounds__(TensorGradients<kN>::kThreads,
                             1) void tensor_gradients_kernel(const GradientParams p,
                                                             int64_t tasks) {
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) dynamic_shared<GradientTiles<kN>>()->task = gradient_task(p, i);
    __syncthreads();  // the task is known
    TensorGradients<kN>(p).run();
  }
}

template <int kN>
void run(const GradientParams& p, cudaStream_t stream) {
  const int64_t tasks = gradient_tasks(p);
  launch("ssd_scan gradients", tensor_gradients_kernel<kN>, blocks_for(tasks, 1),
         TensorGradients<kN>::kThreads, sizeof(GradientTiles<kN>), stream, p, tasks);
}

}  // namespace

bool has_tensor_gradients(const GradientParams& p) {
  const size_t bytes = p.state <= 128 ? sizeof(GradientTiles<128>) : sizeof(GradientTiles<256>);
  return p.bfloat16 && int64_t(bytes) <= p.shared_bytes;
}

void tensor_gradients(const GradientParams& p, cudaStream_t stream) {
  p.state <= 128 ? run<128>(p, stream) : run<256>(p, stream);
}

}  // namespace statescan::ssd_scan::cuda
