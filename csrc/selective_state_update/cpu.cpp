// The state update on the CPU.
//
// Lanes are the numbers n of one row of the state, which lie side by side in memory:
//
//              n -> | vector 0 | vector 1 | ..
//   row p     h     | load, h <- a h + dt x B, store;  sum_p += h C
//   row p + 1 h     |   four rows share a vector of B and one of C
//
// The sums of kLanes rows become one vector of y, a lane for each row, by sum_lanes. What belongs
// to a row (dt, x, z, D, y) is computed with rows in the lanes.
#include "common/scratch.h"
#include "common/tile.h"
#include "common/vector_math.h"
#include "selective_state_update/equations.h"
#include "selective_state_update/kernels.h"

namespace statescan::selective_state_update {
namespace STATESCAN_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Some rows of one head at one token. T is the type that the state has in memory.
template <class R, class T>
struct Rows {
  int count, state;
  T* h;           // (row, state)
  const R* A;     // (row, state), unless the decay is that of the row
  const R* step;  // (row): exp(dt A) where A is the same for all n, else log2(e) dt
  const R* dt_x;  // (row)
  const R* B;     // (state), zeros up to a whole vector
  const R* C;
  R* y;  // (row), whole vectors
  int64_t h_pitch, A_pitch;
};

// The lanes of the last vector of a row, `count` of them in the state; the others are 0. Never
// touches what lies behind the row: another thread may be writing there.
template <class R, class T>
STATESCAN_INLINE Vec<R> load_part(const T* p, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<R, float>) {
    return (Vec<R>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
  }
#endif
  T part[kLanes<R>] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<R>; ++i) {
    if (i < count) part[i] = p[i];
  }
  return load_convert<R>(part);
}

template <class R, class T>
STATESCAN_INLINE void store_part(T* p, Vec<R> v, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<R, float>) {
    return _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
  }
#endif
  T part[kLanes<R>];
  store_convert<R>(part, v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<R>; ++i) {
    if (i < count) p[i] = part[i];
  }
}

// kRows neighbouring rows, a vector of each at a time. Everything the loop needs is taken out of
// `s` first: the compiler must assume that storing h changes what it points to.
template <bool kRowDecay, bool kOutput, int kRows, class R, class T>
STATESCAN_INLINE void update_group(const Rows<R, T>& s, int row, Vec<R>* sums) {
  T* h[kRows];
  const R* A[kRows];
  Vec<R> step[kRows], dt_x[kRows], sum[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    h[i] = s.h + (row + i) * s.h_pitch;
    A[i] = s.A + (row + i) * s.A_pitch;
    step[i] = splat(s.step[row + i]);
    dt_x[i] = splat(s.dt_x[row + i]);
    sum[i] = Vec<R>{};
  }
  const R *B = s.B, *C = s.C;
  const int state = s.state;
  const int64_t h_pitch = s.h_pitch;
  auto update = [&](int n, auto load_h, auto load_A, auto store_h) {
    const Vec<R> B_n = load(B + n), C_n = kOutput ? load(C + n) : B_n;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec<R> a = kRowDecay ? step[i] : decay(step[i], load_A(A[i] + n));
      // 16 rows ahead: no gain while the state is in a second-level cache, 1.7 times the speed where
      // it is not (25 MB of state).
      __builtin_prefetch(h[i] + n + 16 * h_pitch, 1);
      const Vec<R> next = next_state(a, load_h(h[i] + n), dt_x[i], B_n);
      store_h(h[i] + n, next);
      if constexpr (kOutput) sum[i] += next * C_n;
    }
  };
  int n = 0;
  for (; n + kLanes<R> <= state; n += kLanes<R>) {
    update(
        n, [](const T* p) { return load_convert<R>(p); }, [](const R* p) { return load(p); },
        [](T* p, Vec<R> v) { store_convert<R>(p, v); });
  }
  if (const int left = state - n; left > 0) {
    update(
        n, [=](const T* p) { return load_part<R>(p, left); },
        [=](const R* p) { return load_part<R>(p, left); },
        [=](T* p, Vec<R> v) { store_part<R>(p, v, left); });
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) sums[i] = sum[i];
}

template <bool kRowDecay, bool kOutput, class R, class T>
void update_rows(const Rows<R, T> s) {
  constexpr int kGroup = 4;
  for (int begin = 0; begin < s.count; begin += kLanes<R>) {
    const int left = s.count - begin, rows = left < kLanes<R> ? left : kLanes<R>;
    Vec<R> sums[kLanes<R>];
    int i = 0;
    for (; i + kGroup <= rows; i += kGroup) {
      update_group<kRowDecay, kOutput, kGroup>(s, begin + i, sums + i);
    }
    for (; i < rows; ++i) update_group<kRowDecay, kOutput, 1>(s, begin + i, sums + i);
    for (; i < kLanes<R>; ++i) sums[i] = Vec<R>{};
    if constexpr (kOutput) store(s.y + begin, sum_lanes<R>(sums));
  }
}

// Numbers along one dimension of a tensor.
struct Line {
  void* data;
  DType dtype;
  int64_t stride;
};

template <int kRank>
STATESCAN_INLINE Line line(const View<kRank>& x, int64_t offset, int64_t stride) {
  return {static_cast<char*>(x.data) + offset * element_bytes(x.dtype), x.dtype, stride};
}

// to[i] = x[i], i < count, and zeros up to a whole vector. Not load_tile: for a line as short as
// these its setting up would cost more than the loading.
template <class R>
STATESCAN_INLINE void load_line(const Line& x, int count, R* to) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = static_cast<const T*>(x.data);
    for (int i = 0; i < count; i += kLanes<R>) {
      const int left = count - i;
      if (x.stride == 1 && left >= kLanes<R>) {
        store(to + i, load_convert<R>(from + i));
      } else if (x.stride == 1) {
        store(to + i, load_part<R>(from + i, left));
      } else if (x.stride == 0) {
        store(to + i, splat(load_one<R>(from)));
      } else {
        Vec<R> v{};
        for (int j = 0; j < kLanes<R> && j < left; ++j) {
          v[j] = load_one<R>(from + (i + j) * x.stride);
        }
        store(to + i, v);
      }
    }
  });
}

template <class R>
STATESCAN_INLINE void store_line(const Line& x, int count, const R* from) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(x.data);
    int i = 0;
    if (x.stride == 1) {
      for (; i + kLanes<R> <= count; i += kLanes<R>) store_convert<R>(to + i, load(from + i));
    }
    for (; i < count; ++i) store_one<R>(to + i * x.stride, from[i]);
  });
}

template <class R>
class Update {
 public:
  Update(const Params& p, void* memory) : p_(p), pitch_(int(p.pitch())) {
    Scratch scratch(memory);
    const int64_t rows = p.task_rows() + kLanes<R>;
    dt_ = scratch.take<R>(rows);
    step_ = scratch.take<R>(rows);
    x_ = scratch.take<R>(rows);
    dt_x_ = scratch.take<R>(rows);
    y_ = scratch.take<R>(rows);
    B_ = scratch.take<R>(pitch_);
    C_ = scratch.take<R>(pitch_);
    h_ = scratch.take<R>(p.task_rows() * pitch_);
    A_ = scratch.take<R>(p.task_rows() * pitch_);
    row_decay_ = p.A.stride[2] == 0;
    A_in_place_ = p.A.dtype == kCompute && p.A.stride[2] == 1;
    // A state of another type is rounded once, at the end, so between tokens it lives in scratch.
    h_in_place_ = p.h.stride[3] == 1 && (p.h.dtype == kCompute || (p.tokens == 1 && kNarrow));
  }

  void run(int64_t task) {
    const int64_t part = task % p_.tasks_per_head(), head_task = task / p_.tasks_per_head();
    b_ = head_task / p_.heads, head_ = head_task % p_.heads;
    row_ = part * p_.task_rows();
    const int64_t left = p_.headdim - row_;
    rows_ = int(left < p_.task_rows() ? left : p_.task_rows());
    const int64_t slot = p_.slot_of != nullptr ? p_.slot_of[b_] : b_;
    if (slot < 0) return zero_output();

    const Plane h = state_plane(p_.h, slot);
    if (!h_in_place_) load_tile(h, int(p_.state), rows_, h_, pitch_);
    if (!row_decay_ && !A_in_place_) load_tile(A_plane(), int(p_.state), rows_, A_, pitch_);
    for (int64_t t = 0; t < p_.tokens; ++t) {
      load_projections(t);
      prepare(t);
      h_in_place_ ? update_in_place(h) : update_state(h_, pitch_);
      if (p_.compute_output) finish(t);
    }
    if (!h_in_place_) store_tile(h, int(p_.state), rows_, h_, pitch_);
  }

 private:
  static constexpr DType kCompute = std::is_same_v<R, double> ? DType::kFloat64 : DType::kFloat32;
  // Kernels that read a 16-bit state as it is. double is for checks: it goes through scratch.
  static constexpr bool kNarrow = std::is_same_v<R, float>;

  // In the words of a Plane: state numbers are its rows, and rows of the state follow each other in
  // its time, so a tile is (row, state).
  Plane state_plane(const View<4>& x, int64_t slot) const {
    return Plane{x.data, x.dtype, x.stride[3], x.stride[2]}.shifted(
        slot * x.stride[0] + head_ * x.stride[1] + row_ * x.stride[2]);
  }
  Plane A_plane() const {
    const View<3>& x = p_.A;
    return Plane{x.data, x.dtype, x.stride[2], x.stride[1]}.shifted(head_ * x.stride[0] +
                                                                    row_ * x.stride[1]);
  }
  // What belongs to the rows of this task.
  Line of_rows(const View<4>& x, int64_t t) const {
    return line(x, b_ * x.stride[0] + t * x.stride[1] + head_ * x.stride[2] + row_ * x.stride[3],
                x.stride[3]);
  }
  Line of_rows(const View<2>& x) const {
    return line(x, head_ * x.stride[0] + row_ * x.stride[1], x.stride[1]);
  }
  Line of_rows(const View<3>& A) const {  // the first of its state numbers
    return line(A, head_ * A.stride[0] + row_ * A.stride[1], A.stride[1]);
  }

  // B and C of token t, unless the task before left them here.
  void load_projections(int64_t t) {
    const int64_t group = head_ / (p_.heads / p_.groups);
    const int64_t key = (b_ * p_.tokens + t) * p_.groups + group;
    if (key == loaded_) return;
    loaded_ = key;
    load_projection(p_.B, t, group, B_);
    if (p_.compute_output) load_projection(p_.C, t, group, C_);
  }

  void load_projection(const View<4>& x, int64_t t, int64_t group, R* to) {
    load_line(line(x, b_ * x.stride[0] + t * x.stride[1] + group * x.stride[2], x.stride[3]),
              int(p_.state), to);
  }

  // Step sizes, decays and dt x of the rows.
  void prepare(int64_t t) {
    load_line(of_rows(p_.x, t), rows_, x_);
    // A tied step is computed once, for the rows of one vector, and then spread.
    const int steps = p_.step_is_tied() ? 1 : rows_;
    load_line(of_rows(p_.dt, t), steps, dt_);
    if (p_.dt_bias) load_line(of_rows(p_.dt_bias), steps, step_);
    for (int i = 0; i < steps; i += kLanes<R>) {
      const Vec<R> bias = p_.dt_bias ? load(step_ + i) : Vec<R>{};
      store(dt_ + i, step_size(load(dt_ + i), bias, p_.dt_softplus, R(p_.dt_min), R(p_.dt_max)));
    }
    if (row_decay_) load_line(of_rows(p_.A), p_.decay_is_tied() ? 1 : rows_, step_);
    Vec<R> dt = splat(dt_[0]), a{};
    if (p_.decay_is_tied()) a = decay(dt * R(kLog2e), splat(step_[0]));
    for (int i = 0; i < rows_; i += kLanes<R>) {
      if (steps > 1) dt = load(dt_ + i);
      if (!row_decay_) {
        a = dt * R(kLog2e);
      } else if (!p_.decay_is_tied()) {
        a = decay(dt * R(kLog2e), load(step_ + i));
      }
      store(step_ + i, a);
      store(dt_x_ + i, dt * load(x_ + i));
    }
  }

  void update_in_place(const Plane& h) {
    if (h.dtype == kCompute) return update_state(static_cast<R*>(h.data), h.time_stride);
    if constexpr (kNarrow) {
      if (h.dtype == DType::kFloat16) {
        return update_state(static_cast<Half*>(h.data), h.time_stride);
      }
      update_state(static_cast<BFloat16*>(h.data), h.time_stride);
    }
  }

  template <class T>
  void update_state(T* h, int64_t h_pitch) {
    const Plane A = A_plane();
    const Rows<R, T> rows{rows_,
                          int(p_.state),
                          h,
                          A_in_place_ ? static_cast<const R*>(A.data) : A_,
                          step_,
                          dt_x_,
                          B_,
                          C_,
                          y_,
                          h_pitch,
                          A_in_place_ ? A.time_stride : pitch_};
    if (row_decay_) {
      return p_.compute_output ? update_rows<true, true>(rows) : update_rows<true, false>(rows);
    }
    p_.compute_output ? update_rows<false, true>(rows) : update_rows<false, false>(rows);
  }

  // y = (<C, h> + D x) silu(z)
  void finish(int64_t t) {
    if (p_.D) {
      load_line(of_rows(p_.D), rows_, dt_);
      for (int i = 0; i < rows_; i += kLanes<R>) {
        store(y_ + i, skip(load(y_ + i), load(dt_ + i), load(x_ + i)));
      }
    }
    if (p_.z) {
      load_line(of_rows(p_.z, t), rows_, dt_);
      for (int i = 0; i < rows_; i += kLanes<R>) {
        store(y_ + i, gate(load(y_ + i), load(dt_ + i)));
      }
    }
    store_line(of_rows(p_.y, t), rows_, y_);
  }

  void zero_output() {
    if (!p_.compute_output) return;
    for (int i = 0; i < rows_; ++i) y_[i] = 0;
    for (int64_t t = 0; t < p_.tokens; ++t) store_line(of_rows(p_.y, t), rows_, y_);
  }

  const Params& p_;
  int pitch_;
  bool row_decay_;                // A is the same for all n: one decay for a row
  bool A_in_place_, h_in_place_;  // read where they are, not through scratch
  int64_t b_ = 0, head_ = 0, row_ = 0;
  int rows_ = 0;
  int64_t loaded_ = -1;  // whose B and C are in scratch
  R *dt_, *step_, *x_, *dt_x_, *y_, *B_, *C_, *h_, *A_;
};

template <class R>
void run(const Params& p, const Range& range) {
  Update<R> update(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) update.run(task);
}

}  // namespace

void update(const Params& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run<double>(p, range);
  run<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::selective_state_update
