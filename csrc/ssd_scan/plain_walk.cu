// The walks of the SSD scan without tensor cores: any dtypes, strides and sizes, in float or
// double.
//
// Block: kPlainThreads threads, 64 columns of one head's state along one part of a sequence. Per
// piece
//
//   outputs   G = C B^T, M = G between w, y = row (C S) + M x + D x, times silu(z)
//   states    S = whole S + B^T (column w x)        back: dS = whole dS + C^T (row dy)
//
// Grid over (part, batch, head, columns); blocks stride where each needs scratch of its own.
#include "common/launch.h"
#include "ssd_scan/plain.cuh"
#include "ssd_scan/walks.cuh"

namespace statescan::ssd_scan::cuda {
namespace {

constexpr int kColumns = 64;  // of headdim

template <class R>
struct WalkShared {
  Decays<R> decays;
  WalkPlace place;
};

// The block's operands in its scratch, as [row][column].
template <class R>
struct Tiles {
  R *key, *C, *G, *y, *value, *S;
  int64_t state_pitch, pitch;

  __device__ __forceinline__ Tiles(const WalkParams& p, R* at, int columns) {
    state_pitch = pitch_of(p.state), pitch = pitch_of(columns);
    key = at, at += kTile * state_pitch;
    C = at, at += p.backward ? 0 : kTile * state_pitch;
    G = at, at += p.backward ? 0 : kTile * pitch_of(kTile);
    y = at, at += p.backward ? 0 : kTile * pitch;
    value = at, at += kTile * pitch;
    S = at;
  }
};

template <class R>
class Walk {
 public:
  __device__ __forceinline__ Walk(const WalkParams& p, const WalkTask& task, R* scratch)
      : p_(p),
        task_(task),
        first_(task.column * kColumns),
        columns_(int(p.headdim - first_ < kColumns ? p.headdim - first_ : kColumns)),
        x_(p, scratch, columns_),
        own_(p, task.head),
        shared_(block_shared<WalkShared<R>>()) {}

  __device__ __forceinline__ void run() {
    const bool entered = task_.part > 0 && !p_.summarize;
    const R* carry = static_cast<const R*>(p_.carry) + task_.carry_row(p_) * p_.state * p_.headdim;
    for_state([&](int n, int i, R& S) { S = entered ? carry[n * p_.headdim + first_ + i] : R(0); });
    walk_cells(p_, shared_.place, *this);
    if (!p_.summarize) return;
    R* to = static_cast<R*>(p_.carry) +
            (task_.carry_row(p_) + p_.batch * p_.heads) * p_.state * p_.headdim;
    for_state([&](int n, int i, R& S) { to[n * p_.headdim + first_ + i] = S; });
    if (threadIdx.x == 0 && task_.column == 0) {
      static_cast<R*>(p_.factor)[task_.carry_row(p_) + p_.batch * p_.heads] = factor_;
    }
  }

  __device__ __forceinline__ void restart(int64_t slot) {
    for_state([&](int n, int i, R& S) {
      S = slot < 0 ? R(0) : load_at<R>(p_.enter, slot, task_.head, first_ + i, n);
    });
    factor_ = -1;
  }

  __device__ __forceinline__ void save(const Cell& cell) {
    if (!p_.backward && p_.chunk_states && cell.chunk_entry) {
      const View<4> to = chunk_view(p_.chunk_states, task_.b);
      for_state(
          [&](int n, int i, R& S) { store_at<R>(to, cell.chunk, task_.head, first_ + i, n, S); });
    }
    if (p_.cell_states == nullptr) return;
    const int64_t row = ((task_.b * p_.cells() + cell.index) * p_.heads + task_.head) * p_.state;
    for_state([&](int n, int i, R& S) {
      store_element(p_.cell_states, p_.cell_dtype(), (row + n) * p_.headdim + first_ + i, S);
    });
  }

  __device__ __forceinline__ void add_chunk_gradient(const Cell& cell) {
    const View<4> from = chunk_view(p_.chunk_states, task_.b);
    for_state(
        [&](int n, int i, R& S) { S += load_at<R>(from, cell.chunk, task_.head, first_ + i, n); });
  }

  __device__ __forceinline__ void clear_outputs(const Piece& piece) {
    for_elements(piece.rows, columns_, [&](int t, int i) {
      store_at<R>(p_.y, piece.b, piece.time(t), task_.head, first_ + i, 0);
    });
  }

  __device__ __forceinline__ void leave(int64_t slot) {
    for_state(
        [&](int n, int i, R& S) { store_at<R>(p_.leave, slot, task_.head, first_ + i, n, S); });
  }

  __device__ __forceinline__ void advance(const Piece& piece) {
    if (threadIdx.x < 32) find_decays(p_, piece, task_.head, own_, shared_.decays);
    load(piece);
    __syncthreads();  // operands and decays are in place
    if (!p_.backward && !p_.summarize) output(piece);
    update(piece);
  }

 private:
  template <class F>
  __device__ __forceinline__ void for_state(F&& f) {
    for_elements(int(p_.state), columns_, [&](int n, int i) { f(n, i, x_.S[n * x_.pitch + i]); });
    __syncthreads();  // the state is in place
  }

  __device__ __forceinline__ void load(const Piece& piece) {
    const int shift = p_.shift_output ? 1 : 0, N = int(p_.state);
    const int64_t group = task_.head / p_.group_heads();
    if (!p_.backward) {
      load_rows(p_.B, piece, group, 0, N, 0, x_.key, x_.state_pitch);
      if (!p_.summarize) load_rows(p_.C, piece, group, 0, N, shift, x_.C, x_.state_pitch);
      load_rows(p_.x, piece, task_.head, first_, columns_, 0, x_.value, x_.pitch);
      return;
    }
    load_rows(p_.C, piece, group, 0, N, shift, x_.key, x_.state_pitch);
    for_elements(piece.rows, columns_, [&](int t, int i) {
      const R dy = p_.dy ? load_at<R>(p_.dy, piece.b, piece.time(t), task_.head, first_ + i) : R(0);
      x_.value[t * x_.pitch + i] = ungated(p_, dy, piece, t, task_.head, first_ + i);
    });
  }

  __device__ __forceinline__ void output(const Piece& piece) {
    const int rows = piece.rows, shift = p_.shift_output ? 1 : 0, N = int(p_.state);
    const int64_t wide = x_.state_pitch, across = pitch_of(kTile);
    Decays<R>& d = shared_.decays;
    product<R>(
        rows, rows, Every{N}, [&](int t, int n) { return x_.C[t * wide + n]; },
        [&](int n, int s) { return x_.key[s * wide + n]; }, x_.G, across);
    __syncthreads();  // G is in place
    for_elements(rows, rows, [&](int t, int s) {
      R& M = x_.G[t * across + s];
      M = s + shift <= t ? M * d.between(t, s, shift) * d.weight[s] : R(0);
    });
    __syncthreads();  // M is in place
    product<R>(       // row C S and M x are one product
        rows, columns_, UpTo{N, shift},
        [&](int t, int k) {
          return k < N ? d.row[t] * x_.C[t * wide + k] : x_.G[t * across + k - N];
        },
        [&](int k, int i) {
          return k < N ? x_.S[k * x_.pitch + i] : x_.value[(k - N) * x_.pitch + i];
        },
        x_.y, x_.pitch);
    __syncthreads();  // y is in place, the state has been read
    for_elements(rows, columns_, [&](int t, int i) {
      const int64_t time = piece.time(t), column = first_ + i;
      R y = x_.y[t * x_.pitch + i];
      if (p_.D) y += skip_weight<R>(p_, task_.head, column) * x_.value[t * x_.pitch + i];
      if (p_.z) y *= silu(load_at<R>(p_.z, piece.b, time, task_.head, column));
      store_at<R>(p_.y, piece.b, time, task_.head, column, y);
    });
    __syncthreads();  // the values have been read
  }

  __device__ __forceinline__ void update(const Piece& piece) {
    Decays<R>& d = shared_.decays;
    const R whole = d.whole;
    for_elements(piece.rows, columns_, [&](int t, int i) {
      x_.value[t * x_.pitch + i] *= p_.backward ? d.row[t] : d.column[t] * d.weight[t];
    });
    __syncthreads();  // the values are weighted
    product<R>(
        int(p_.state), columns_, Every{piece.rows},
        [&](int n, int t) { return x_.key[t * x_.state_pitch + n]; },
        [&](int t, int i) { return x_.value[t * x_.pitch + i]; }, x_.S, x_.pitch, whole);
    if (factor_ >= 0) factor_ *= whole;
    __syncthreads();  // the state is in place, everything else may be written again
  }

  const WalkParams& p_;
  const WalkTask& task_;
  int64_t first_;  // column
  int columns_;
  Tiles<R> x_;
  Head<R> own_;
  WalkShared<R>& shared_;
  R factor_ = 1;  // of the state before the part, in the one after it; -1: a sequence starts within
};

template <class R>
__global__ __launch_bounds__(kPlainThreads, 1) void plain_walk_kernel(const WalkParams p,
                                                                      int64_t elements,
                                                                      int64_t tasks) {
  R* scratch = p.scratch == nullptr ? dynamic_shared<R>()
                                    : static_cast<R*>(p.scratch) + blockIdx.x * elements;
  WalkPlace& place = block_shared<WalkShared<R>>().place;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    __syncthreads();  // the task before is done with
    if (threadIdx.x == 0) place.task = walk_task(p, i, (p.headdim + kColumns - 1) / kColumns, 1);
    __syncthreads();  // the task is known
    Walk<R>(p, place.task, scratch).run();
  }
}

int64_t tasks_of(const WalkParams& p) {
  return (p.summarize ? p.parts - 1 : p.parts) * p.batch * p.heads *
         ((p.headdim + kColumns - 1) / kColumns);
}

}  // namespace

Room plain_walk_room(const WalkParams& p) {
  const int64_t wide = p.state | 1, columns = std::min<int64_t>(p.headdim, kColumns) | 1;
  const int64_t elements = kTile * (wide + columns) + p.state * columns +
                           (p.backward ? 0 : kTile * (wide + (kTile | 1) + columns));
  return room_for(p, elements, tasks_of(p));
}

void plain_walk(const WalkParams& p, cudaStream_t stream) {
  const Room room = plain_walk_room(p);
  const int64_t tasks = tasks_of(p);
  auto run = [&](auto* type) {
    using R = std::remove_pointer_t<decltype(type)>;
    launch("ssd_scan plain walk", plain_walk_kernel<R>, std::min(blocks_for(tasks, 1), room.blocks),
           kPlainThreads, room.is_shared ? size_t(room.elements * sizeof(R)) : 0, stream, p,
           room.elements, tasks);
  };
  p.compute == DType::kFloat64 ? run(static_cast<double*>(nullptr))
                               : run(static_cast<float*>(nullptr));
}

}  // namespace statescan::ssd_scan::cuda
