// The gradients of the SSD scan within each cell, without tensor cores: any dtypes, strides and
// sizes, in float or double. docs/ssd_scan.md has the formulas and names.
//
// Block: kPlainThreads threads, one cell and some heads of a group, one after the other:
//
//   V = dy x^T,  GL = G L,  dG += V L w,  decays from V GL
//   dC += row (dy S^T),  dB += column w (x dS^T),  dx = w (column B dS + GL^T dy) + D dy
//   after the heads: dC += dG B,  dB += dG^T C
//
// Grid over (batch, cell, group, task of the group); blocks stride where each needs scratch of its
// own.
#include "common/launch.h"
#include "ssd_scan/gradient_task.cuh"
#include "ssd_scan/plain.cuh"
#include "ssd_scan/walks.cuh"

namespace statescan::ssd_scan::cuda {
namespace {

constexpr int kWarps = kPlainThreads / 32;

template <class R>
struct GradientShared {
  Decays<R> decays;
  DecaySums<R> sums;
  SharedArray<R, kWarps> held;
  Marks marks;
  GradientTask task;
};

// The block's operands in its scratch, as [row][column].
template <class R>
struct Tiles {
  R *B, *C, *dB, *dC, *projected;  // (step, state)
  R *G, *dG, *GL, *share;          // (step t, step s)
  R *x, *g, *out;                  // (step, headdim); g: dy before the gate
  R *S, *dS;                       // (state, headdim)
  int64_t wide, across, pitch;

  __device__ __forceinline__ Tiles(const Shape& p, R* at) {
    wide = pitch_of(p.state), across = pitch_of(kTile), pitch = pitch_of(p.headdim);
    for (R** x : {&B, &C, &dB, &dC, &projected}) *x = at, at += kTile * wide;
    for (R** x : {&G, &dG, &GL, &share}) *x = at, at += kTile * across;
    for (R** i : {&x, &g, &out}) *i = at, at += kTile * pitch;
    for (R** i : {&S, &dS}) *i = at, at += p.state * pitch;
  }
};

template <class R>
class Gradients {
 public:
  __device__ __forceinline__ Gradients(const GradientParams& p, const GradientTask& task,
                                       R* scratch)
      : p_(p),
        task_(task),
        cell_sums_{p, task},
        x_(p, scratch),
        N_(int(p.state)),
        P_(int(p.headdim)),
        shift_(p.shift_output ? 1 : 0),
        shared_(block_shared<GradientShared<R>>()) {}

  __device__ __forceinline__ void run() {
    load_marks(p_, task_.b, task_.cell, shared_.marks);
    cell_sums_.clear();
    __syncthreads();  // the marks are in place
    const Pieces pieces(p_, task_.b, task_.cell, shared_.marks);
    for (int begin = 0; begin < task_.cell.rows;) {
      const Piece piece = pieces.from(begin);
      piece.padding ? run_padding(piece) : run_piece(piece);
      begin = piece.row + piece.rows;
    }
  }

 private:
  __device__ __forceinline__ void run_padding(const Piece& piece) {
    for (int64_t h = task_.begin; h < task_.end; ++h) {
      for_elements(piece.rows, P_, [&](int t, int i) {
        store_at<R>(p_.dx, task_.b, piece.time(t), h, i, 0);
        if (p_.z) store_at<R>(p_.dz, task_.b, piece.time(t), h, i, 0);
      });
      clear_dt(p_, piece, h);
    }
    for_elements(piece.rows, N_, [&](int t, int n) {
      store_projection(p_.dB, piece.time(t), n, R(0));
      store_projection(p_.dC, piece.time(t), n, R(0));
    });
  }

  __device__ __forceinline__ void store_projection(const View<5>& x, int64_t time, int n, R value) {
    store_at<R>(part_view(x, task_.part), task_.b, time, task_.group, n, value);
  }

  __device__ __forceinline__ void run_piece(const Piece& piece) {
    __syncthreads();  // the piece before is done with
    load_rows(p_.B, piece, task_.group, 0, N_, 0, x_.B, x_.wide);
    load_rows(p_.C, piece, task_.group, 0, N_, shift_, x_.C, x_.wide);
    for_elements(piece.rows, N_,
                 [&](int t, int n) { x_.dB[t * x_.wide + n] = 0, x_.dC[t * x_.wide + n] = 0; });
    for_elements(piece.rows, piece.rows, [&](int t, int s) { x_.dG[t * x_.across + s] = 0; });
    __syncthreads();  // B and C are in place
    product<R>(
        piece.rows, piece.rows, Every{N_}, [&](int t, int n) { return x_.C[t * x_.wide + n]; },
        [&](int n, int s) { return x_.B[s * x_.wide + n]; }, x_.G, x_.across);
    for (int64_t h = task_.begin; h < task_.end; ++h) run_head(piece, h);
    finish_group(piece);
  }

  __device__ __forceinline__ void run_head(const Piece& piece, int64_t h) {
    __syncthreads();  // the head before is done with, G is in place
    const Head<R> own(p_, h);
    if (threadIdx.x < 32) find_decays(p_, piece, h, own, shared_.decays);
    load(piece, h);
    __syncthreads();  // operands and decays are in place
    score(piece);
    hold();
    __syncthreads();  // V GL is in place
    if (p_.z) gate_gradient(piece, h);
    input_gradient(piece, h);
    through_steps(piece);
    through_states(piece);
    skip_gradient(piece, h);
    if (threadIdx.x >= 32) return;
    R held = 0;
    for (int i = 0; i < kWarps; ++i) held += shared_.held[i];
    const Sums<R> sums = decay_gradient(p_, piece, h, own.A, held * shared_.decays.whole,
                                        shared_.decays, shared_.sums, p_.ddt);
    if (threadIdx.x > 0) return;
    cell_sums_.dA(h) += sums.dA, cell_sums_.ddt_bias(h) += sums.ddt_bias;
  }

  __device__ __forceinline__ void load(const Piece& piece, int64_t h) {
    load_rows(p_.x, piece, h, 0, P_, 0, x_.x, x_.pitch);
    for_elements(piece.rows, P_, [&](int t, int i) {
      const R dy = p_.dy ? load_at<R>(p_.dy, task_.b, piece.time(t), h, i) : R(0);
      x_.g[t * x_.pitch + i] = ungated(p_, dy, piece, t, h, i);
    });
    load_state(p_.cell_states, piece.entry && !piece.first, p_.initial_state, piece.from, h, x_.S);
    load_state(p_.dcell_states, piece.exit && !piece.last, p_.dlast_state, piece.to, h, x_.dS);
  }

  // The state before the piece, or its gradient after it: what a walk saved, or where the sequence
  // begins or ends.
  __device__ __forceinline__ void load_state(const void* saved, bool is_saved, const View<4>& given,
                                             int64_t slot, int64_t h, R* to) {
    const int64_t from = cell_sums_.row(h) * p_.state * p_.headdim;
    for_elements(N_, P_, [&](int n, int i) {
      R x = 0;
      if (is_saved) {
        x = load_element<R>(saved, p_.cell_dtype(), from + int64_t(n) * P_ + i);
      } else if (given && slot >= 0) {
        x = load_at<R>(given, slot, h, i, n);
      }
      to[n * x_.pitch + i] = x;
    });
  }

  // GL, dG and V GL.
  __device__ __forceinline__ void score(const Piece& piece) {
    Decays<R>& d = shared_.decays;
    product<R>(
        piece.rows, piece.rows, Every{P_}, [&](int t, int i) { return x_.g[t * x_.pitch + i]; },
        [&](int i, int s) { return x_.x[s * x_.pitch + i]; }, x_.share, x_.across);
    __syncthreads();  // V is in place
    for_elements(piece.rows, piece.rows, [&](int t, int s) {
      const int64_t at = t * x_.across + s;
      const bool there = s + shift_ <= t;
      const R L = there ? d.between(t, s, shift_) : R(0);
      const R GL = there ? x_.G[at] * L : R(0), V = x_.share[at];
      x_.GL[at] = GL;
      x_.share[at] = there ? V * GL : R(0);
      if (there) x_.dG[at] += V * L * d.weight[s];
    });
  }

  // <S, dS>, a part for each warp.
  __device__ __forceinline__ void hold() {
    R sum = 0;
    for_elements(N_, P_,
                 [&](int n, int i) { sum += x_.S[n * x_.pitch + i] * x_.dS[n * x_.pitch + i]; });
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) shared_.held[int(threadIdx.x) / 32] = sum;
  }

  // y once more, for dz.
  __device__ __forceinline__ void gate_gradient(const Piece& piece, int64_t h) {
    Decays<R>& d = shared_.decays;
    product<R>(
        piece.rows, P_, UpTo{N_, shift_},
        [&](int t, int k) {
          return k < N_ ? d.row[t] * x_.C[t * x_.wide + k]
                        : x_.GL[t * x_.across + k - N_] * d.weight[k - N_];
        },
        [&](int k, int i) {
          return k < N_ ? x_.S[k * x_.pitch + i] : x_.x[(k - N_) * x_.pitch + i];
        },
        x_.out, x_.pitch);
    __syncthreads();  // y is in place
    for_elements(piece.rows, P_, [&](int t, int i) {
      const int64_t time = piece.time(t);
      R y = x_.out[t * x_.pitch + i];
      if (p_.D) y += skip_weight<R>(p_, h, i) * x_.x[t * x_.pitch + i];
      const R z = load_at<R>(p_.z, task_.b, time, h, i);
      const R dout = p_.dy ? load_at<R>(p_.dy, task_.b, time, h, i) : R(0);
      store_at<R>(p_.dz, task_.b, time, h, i, dout * silu_slope(z, sigmoid(z)) * y);
    });
    __syncthreads();  // y has been read
  }

  __device__ __forceinline__ void input_gradient(const Piece& piece, int64_t h) {
    Decays<R>& d = shared_.decays;
    const int rows = piece.rows;
    product<R>(
        rows, P_, From{rows + N_, shift_},
        [&](int s, int k) {
          return k < rows ? x_.GL[k * x_.across + s] : d.column[s] * x_.B[s * x_.wide + k - rows];
        },
        [&](int k, int i) {
          return k < rows ? x_.g[k * x_.pitch + i] : x_.dS[(k - rows) * x_.pitch + i];
        },
        x_.out, x_.pitch);
    __syncthreads();  // dx is in place
    for_elements(rows, P_, [&](int s, int i) {
      R dx = d.weight[s] * x_.out[s * x_.pitch + i];
      if (p_.D) dx += skip_weight<R>(p_, h, i) * x_.g[s * x_.pitch + i];
      store_at<R>(p_.dx, task_.b, piece.time(s), h, i, dx);
    });
  }

  // What the weights get through the outputs of the piece; and for each step what goes from it and
  // those before to outputs after it, from row sums that grow from column to column.
  __device__ __forceinline__ void through_steps(const Piece& piece) {
    Decays<R>& d = shared_.decays;
    const int i = int(threadIdx.x), rows = piece.rows;
    if (i < rows) {
      R sum = 0;
      for (int t = i; t < rows; ++t) sum += x_.share[t * x_.across + i];
      shared_.sums.d_weight[i] = sum;
    }
    __syncthreads();  // columns have been read
    if (i < rows) {
      R sum = 0;
      for (int s = 0; s < rows; ++s) {
        R& share = x_.share[i * x_.across + s];
        share = sum += share * d.weight[s];
      }
    }
    __syncthreads();  // row sums are in place
    if (i < rows) {
      R sum = 0;
      for (int t = i + 1 + shift_; t < rows; ++t) sum += x_.share[t * x_.across + i];
      shared_.sums.through[i] = sum;
    }
  }

  // dC through the state before the piece and dB through the one after it, and what the decays get
  // of them.
  __device__ __forceinline__ void through_states(const Piece& piece) {
    Decays<R>& d = shared_.decays;
    project(
        piece, x_.g, x_.S, x_.C, x_.dC, shared_.sums.from_output, [&](int t) { return d.row[t]; },
        [](int) { return R(1); });
    project(
        piece, x_.x, x_.dS, x_.B, x_.dB, shared_.sums.into_state,
        [&](int s) { return d.column[s]; }, [&](int s) { return d.weight[s]; });
  }

  // With Q[t, n] = scale(t) <vectors[t], state[n]>: sums[t, n] += weight(t) Q[t, n] and products[t]
  // = sum over n of partner[t, n] Q[t, n].
  template <class Scale, class Weight>
  __device__ __forceinline__ void project(const Piece& piece, const R* vectors, const R* state,
                                          const R* partner, R* sums,
                                          SharedArray<R, kTile>& products, Scale&& scale,
                                          Weight&& weight) {
    product<R>(
        piece.rows, N_, Every{P_}, [&](int t, int i) { return vectors[t * x_.pitch + i]; },
        [&](int i, int n) { return state[n * x_.pitch + i]; }, x_.projected, x_.wide);
    __syncthreads();  // the products are in place
    for (int t = int(threadIdx.x) / 32; t < piece.rows; t += kWarps) {
      const R by = scale(t), shared = by * weight(t);
      R sum = 0;
      for (int n = int(threadIdx.x) % 32; n < N_; n += 32) {
        const int64_t at = t * x_.wide + n;
        const R Q = x_.projected[at];
        sums[at] += shared * Q;
        sum += partner[at] * (by * Q);
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) products[t] = sum;
    }
    __syncthreads();  // they have been read, their sums are in place
  }

  __device__ __forceinline__ void skip_gradient(const Piece& piece, int64_t h) {
    if (!p_.D) return;
    auto column = [&](int i) {
      R sum = 0;
      for (int t = 0; t < piece.rows; ++t) sum += x_.g[t * x_.pitch + i] * x_.x[t * x_.pitch + i];
      return sum;
    };
    if (p_.wide_D) {
      for (int i = int(threadIdx.x); i < P_; i += kPlainThreads) cell_sums_.skip(h, i) += column(i);
    } else if (threadIdx.x < 32) {
      R sum = 0;
      for (int i = int(threadIdx.x); i < P_; i += 32) sum += column(i);
      sum = warp_sum(sum);
      if (threadIdx.x == 0) cell_sums_.skip(h, 0) += sum;
    }
  }

  // dB and dC through G, of which all the heads have their share in dG by now.
  __device__ __forceinline__ void finish_group(const Piece& piece) {
    __syncthreads();  // dG, dB and dC are in place
    product<R>(
        piece.rows, N_, UpTo{0, shift_}, [&](int t, int s) { return x_.dG[t * x_.across + s]; },
        [&](int s, int n) { return x_.B[s * x_.wide + n]; }, x_.dC, x_.wide, R(1));
    product<R>(
        piece.rows, N_, From{piece.rows, shift_},
        [&](int s, int t) { return x_.dG[t * x_.across + s]; },
        [&](int t, int n) { return x_.C[t * x_.wide + n]; }, x_.dB, x_.wide, R(1));
    __syncthreads();  // dB and dC are in place
    for_elements(piece.rows, N_, [&](int t, int n) {
      const int64_t at = t * x_.wide + n;
      store_projection(p_.dB, piece.time(t), n, x_.dB[at]);
      if (t >= shift_ || !piece.first) {
        store_projection(p_.dC, piece.time(t, shift_), n, x_.dC[at]);
      }
    });
    if (shift_ == 0 || !piece.last) return;
    for (int n = int(threadIdx.x); n < N_; n += kPlainThreads) {  // no output reads the last C
      store_projection(p_.dC, piece.time(piece.rows - 1), n, R(0));
    }
  }

  const GradientParams& p_;
  const GradientTask& task_;
  CellSums<R> cell_sums_;
  Tiles<R> x_;
  int N_, P_, shift_;
  GradientShared<R>& shared_;
};

template <class R>
__global__ __launch_bounds__(kPlainThreads, 1) void plain_gradients_kernel(const GradientParams p,
                                                                           int64_t elements,
                                                                           int64_t tasks) {
  R* scratch = p.scratch == nullptr ? dynamic_shared<R>()
                                    : static_cast<R*>(p.scratch) + blockIdx.x * elements;
  GradientTask& task = block_shared<GradientShared<R>>().task;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) task = gradient_task(p, i);
    __syncthreads();  // the task is known
    Gradients<R>(p, task, scratch).run();
  }
}

}  // namespace

Room plain_gradient_room(const GradientParams& p) {
  const int64_t wide = p.state | 1, pitch = p.headdim | 1;
  const int64_t elements = kTile * (5 * wide + 4 * (kTile | 1) + 3 * pitch) + 2 * p.state * pitch;
  return room_for(p, elements, gradient_tasks(p));
}

void plain_gradients(const GradientParams& p, cudaStream_t stream) {
  const Room room = plain_gradient_room(p);
  const int64_t tasks = gradient_tasks(p);
  auto run = [&](auto* type) {
    using R = std::remove_pointer_t<decltype(type)>;
    launch("ssd_scan plain gradients", plain_gradients_kernel<R>,
           std::min(blocks_for(tasks, 1), room.blocks), kPlainThreads,
           room.is_shared ? size_t(room.elements * sizeof(R)) : 0, stream, p, room.elements, tasks);
  };
  p.compute == DType::kFloat64 ? run(static_cast<double*>(nullptr))
                               : run(static_cast<float*>(nullptr));
}

}  // namespace statescan::ssd_scan::cuda
