// Forward of the SSD scan on the CPU, in the chunked form (Mamba-2, section 6). See cpu_walk.h for
// who does what. For a tile of a piece and each head, with G = C B^T shared by the heads:
//
//   M[t, s] = G[t, s] between(t, s) w_s              for s up to and with t
//   y[t]    = row[t] C[t] S + sum over s of M[t, s] x[s] + D x[t]
//   S       = whole S + sum over s of B[s]^T (column[s] w_s x[s])
#include "ssd_scan/cpu_walk.h"

namespace statescan::ssd_scan {
namespace STATESCAN_ISA {
namespace {

// R is computed in; E is the element of the operands of products (common/matmul.h).
template <class R, class E>
class Forward {
 public:
  Forward(const FwdParams& p, void* memory)
      : p_(p),
        state_pitch_(padded<R>(p.state)),
        pitch_(padded<R>(p.headdim)),
        state_size_((p.state + kMaxRows) * pitch_),
        scratch_(memory),
        decays_(p, scratch_) {
    constexpr int64_t kSteps = kTile + kMaxRows;
    for (R** x : {&B_, &C_}) *x = scratch_.take<R>(kSteps * state_pitch_);
    Bt_ = scratch_.take<E>((p.state + kMaxRows) * kPitch);
    G_ = scratch_.take<R>(kSteps * kPitch);
    M_ = scratch_.take<E>(kSteps * kPitch / kDepthE);
    for (R** x : {&x_, &y_, &z_}) *x = scratch_.take<R>(kSteps * pitch_);
    weighted_ = scratch_.take<E>(kSteps * pitch_);
    for (R** x : {&diagonal_, &ends_}) *x = scratch_.take<R>(kSteps);
    D_ = scratch_.take<R>(p.heads_per_task * pitch_);
    S_ = scratch_.take<R>(p.heads_per_task * state_size_);
    if constexpr (!std::is_same_v<R, E>) {
      for (E** x : {&C_pairs_, &B_pairs_, &B_columns_})
        *x = scratch_.take<E>(kSteps * state_pitch_);
      x_pairs_ = scratch_.take<E>(kSteps * pitch_);
      S_pairs_ = scratch_.take<E>(p.heads_per_task * state_size_ / 2);
    }
  }

  void run(int64_t task) {
    heads_ = task_heads(p_, task % p_.head_tasks());
    const int64_t row = task / p_.head_tasks();
    load_D(p_, p_.D, heads_, D_);
    for (int64_t s = p_.segments->row_offset[row]; s < p_.segments->row_offset[row + 1]; ++s) {
      run_segment(p_.segments->segments[s]);
    }
  }

 private:
  static constexpr int kDepthE = kDepth<E>;

  template <class F>
  STATESCAN_INLINE void for_heads(F&& f) {
    for (int64_t h = heads_.begin; h < heads_.end; ++h) f(h, S_ + (h - heads_.begin) * state_size_);
  }

  // The state as an operand.
  STATESCAN_INLINE E* operand_of(const R* S) {
    if constexpr (std::is_same_v<R, E>) return const_cast<R*>(S);
    return S_pairs_ + (S - S_) / 2;
  }

  void run_segment(const Segment& segment) {
    const bool given = segment.initial_slot >= 0 && p_.initial_state;
    state_is_zero_ = !given;
    for_heads([&](int64_t h, R* S) {
      clear(S, state_size_);
      if (!given) return;
      load_tile(state_plane(p_.initial_state, segment.initial_slot, h), int(p_.headdim),
                int(p_.state), S, pitch_);
      paired_rows(S, int(p_.state), pitch_, pitch_, operand_of(S));
    });
    state_is_wanted_ = segment.last_slot >= 0 && p_.last_state;
    const int64_t pieces = piece_count(p_, segment);
    for (int64_t i = 0; i < pieces; ++i) run_piece(segment, piece_at(p_, segment, i));
    if (!state_is_wanted_) return;
    for_heads([&](int64_t h, R* S) {
      store_tile(state_plane(p_.last_state, segment.last_slot, h), int(p_.headdim), int(p_.state),
                 S, pitch_);
    });
  }

  void run_piece(const Segment& segment, const Piece& piece) {
    const int64_t b = segment.batch;
    if (piece.entry) for_heads([&](int64_t h, R* S) { save(b, piece, h, S); });
    if (segment.padding) return run_padding(b, piece);
    load_group(b, piece);
    for_heads([&](int64_t h, R* S) { run_head(b, piece, h, S); });
    state_is_zero_ = false;
  }

  void save(int64_t b, const Piece& piece, int64_t h, const R* S) {
    if (p_.chunk_states && piece.chunk_entry) {
      store_tile(state_plane(p_.chunk_states, b, piece.chunk, h), int(p_.headdim), int(p_.state), S,
                 pitch_);
    }
    if (p_.cell_states == nullptr) return;
    const int64_t at = (b * p_.cells() + piece.cell) * p_.heads + h;
    const Plane to =
        Plane{p_.cell_states, p_.cell_dtype(), 1, p_.headdim}.shifted(at * p_.state * p_.headdim);
    store_tile(to, int(p_.headdim), int(p_.state), S, pitch_);
  }

  void run_padding(int64_t b, const Piece& piece) {
    clear(y_, piece.steps() * pitch_);
    for_heads([&](int64_t h, R*) {
      store_tile(scan_plane(p_, p_.y, b, h, piece), int(p_.headdim), piece.steps(), y_, pitch_);
    });
  }

  // B, C and G = C B^T, in whole vectors on and below the diagonal.
  void load_group(int64_t b, const Piece& piece) {
    const int steps = piece.steps(), N = int(p_.state);
    load_projection<R>(p_, p_.B, b, heads_.group, piece, false, B_);
    load_projection<R>(p_, p_.C, b, heads_.group, piece, p_.shift_output, C_);
    C_operand_ = paired_columns(C_, steps, state_pitch_, state_pitch_, C_pairs_);
    B_operand_ = paired_rows(B_, steps, state_pitch_, state_pitch_, B_pairs_);
    const E* B = paired_columns(B_, steps, state_pitch_, state_pitch_, B_columns_);
    const E* Bt = transposed<R>(B, steps, N, state_pitch_, Bt_, kPitch);
    const int C_pitch = state_pitch_ / kDepthE;
    for_blocks<1>(steps, padded<R>(steps) / kLanes<R>, [&](auto M, auto V, int t, int s) {
      if (s * kLanes<R> >= t + M()) return;
      Block<R, M(), V()> G;
      multiply(G, C_operand_ + t * C_pitch, C_pitch, 1, Bt + s * kLanes<R>, kPitch,
               (N + kDepthE - 1) / kDepthE);
      G.store_to(G_ + t * kPitch + s * kLanes<R>, kPitch);
    });
    const int back = p_.shift_output ? 1 : 0;
    for (int t = back; t < steps; ++t) diagonal_[t] = G_[t * kPitch + t - back];
  }

  void run_head(int64_t b, const Piece& piece, int64_t h, R* S) {
    const int steps = piece.steps(), P = int(p_.headdim);
    load_tile(scan_plane(p_, p_.x, b, h, piece), P, steps, x_, pitch_);
    load_tile(scan_plane(p_, p_.dt, b, h, piece), 1, steps, decays_.weight, 1);
    decays_.find(p_, load_or<R>(p_.A, h, 0), load_or<R>(p_.dt_bias, h, 0), steps, nullptr);
    mix_steps(steps);
    const bool more = h + 1 < heads_.end;
    const Plane next = scan_plane(p_, p_.x, b, more ? h + 1 : heads_.begin,
                                  more ? piece : neighbour(p_, piece, 1));
    output(steps, S, D_ + (h - heads_.begin) * pitch_, next);
    if (p_.z) gate(b, piece, h);
    store_tile(scan_plane(p_, p_.y, b, h, piece), P, steps, y_, pitch_);
    if (!piece.last || state_is_wanted_) update(steps, S);
  }

  // M, in whole vectors: what lies above the diagonal is not read. The decay to the last number of
  // a row is 1.
  void mix_steps(int steps) {
    for (int t = 0; t < steps; ++t) {
      for (int s = 0; s <= t; s += kLanes<R>) {
        store_columns<R>(
            M_ + t * kPitch / kDepthE, s,
            load(G_ + t * kPitch + s) * decays_.between(t, s) * load(decays_.weight + s));
      }
    }
    const int back = p_.shift_output ? 1 : 0;
    for (int t = back; t < steps; ++t) ends_[t] = diagonal_[t] * decays_.weight[t - back];
  }

  // `next` is what will be read after this head, asked for while it is computed.
  void output(int steps, const R* S, const R* D, const Plane& next) {
    const int diagonal = p_.shift_output ? 0 : 1, C_pitch = state_pitch_ / kDepthE;
    const E* x = paired_rows(x_, steps, pitch_, pitch_, x_pairs_);
    const E* S_operand = operand_of(S);
    for_blocks(steps, pitch_ / kLanes<R>, [&](auto M, auto V, int t, int v) {
      const int p = v * kLanes<R>, left = steps - t;
      if (v == 0) prefetch_tile(next.at(0, t), int(p_.headdim), left < M() ? left : M());
      Block<R, M(), V()> y;
      if (!state_is_zero_) {
        multiply(y, C_operand_ + t * C_pitch, C_pitch, 1, S_operand + p, pitch_,
                 (int(p_.state) + kDepthE - 1) / kDepthE);
        y.scale_rows(decays_.row + t);
      }
      constexpr int kRow = kPitch / kDepthE;
      const E* row = M_ + t * kRow;
      multiply(y, row, kRow, 1, x + p, pitch_, t / kDepthE);
      multiply_triangle(y, {row + t / kDepthE, kRow, 1, x + t / kDepthE * pitch_ + p, pitch_},
                        ends_ + t, x_ + t * pitch_ + p, diagonal);
      if (p_.D) y.add_scaled(x_ + t * pitch_ + p, pitch_, D + p);
      y.store_to(y_ + t * pitch_ + p, pitch_);
    });
  }

  void gate(int64_t b, const Piece& piece, int64_t h) {
    load_tile(scan_plane(p_, p_.z, b, h, piece), int(p_.headdim), piece.steps(), z_, pitch_);
    for (int i = 0; i < piece.steps() * pitch_; i += kLanes<R>) {
      store(y_ + i, load(y_ + i) * silu(load(z_ + i)));
    }
  }

  void update(int steps, R* S) {
    for (int s = 0; s < steps; s += kLanes<R>) {
      store(ends_ + s, load(decays_.column + s) * load(decays_.weight + s));
    }
    const E* weighted = scaled_rows(x_, ends_, steps, pitch_, pitch_, weighted_);
    E* S_operand = operand_of(S);
    for_blocks(int(p_.state), pitch_ / kLanes<R>, [&](auto M, auto V, int n, int v) {
      const int p = v * kLanes<R>;
      Block<R, M(), V()> next;
      R* at = S + n * pitch_ + p;
      if (!state_is_zero_) {
        next.load_from(at, pitch_);
        next.scale(decays_.whole);
      }
      multiply(next, B_operand_ + n, 1, state_pitch_, weighted + p, pitch_,
               (steps + kDepthE - 1) / kDepthE);
      next.store_to(at, pitch_);
      store_paired_rows(next, S_operand + n / kDepthE * pitch_ + p, pitch_);
    });
  }

  const FwdParams& p_;
  Heads heads_;
  int state_pitch_, pitch_;  // of tiles whose columns are states, or headdim
  int64_t state_size_;
  bool state_is_zero_, state_is_wanted_;
  Scratch scratch_;
  Decays<R> decays_;
  R *B_, *C_;            // (step, state)
  E* Bt_;                // (state, step)
  R* G_;                 // (step t, step s)
  E* M_;                 // likewise
  R *x_, *y_, *z_;       // (step, headdim)
  E* weighted_;          // likewise
  R *diagonal_, *ends_;  // (step): the last number of each row of G, of M
  R *D_, *S_;            // (head, headdim), (head, state, headdim)
  const E *C_operand_, *B_operand_;
  E *C_pairs_ = nullptr, *B_pairs_ = nullptr, *B_columns_ = nullptr, *x_pairs_ = nullptr,
    *S_pairs_ = nullptr;
};

template <class R, class E>
void run_tasks(const FwdParams& p, const Range& range) {
  Forward<R, E> forward(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) forward.run(task);
}

}  // namespace

void fwd(const FwdParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_tasks<double, double>(p, range);
#if defined(__AVX512BF16__)
  if (p.bfloat16) return run_tasks<float, Pair>(p, range);
#endif
  run_tasks<float, float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::ssd_scan
