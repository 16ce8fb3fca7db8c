// Backward of the SSD scan on the CPU: pieces from the last to the first, each from the state that
// the forward saved at its cell. See cpu_walk.h for who does what, docs/ssd_scan.md for the
// derivation.
//
// Most products have steps in their lanes, so that what is summed over the heads, and what the
// decays need of each step, is summed by whole vectors. With dS the gradient of the state after the
// piece:
//
//   V[s, t]  = <x[s], dy[t]>,   L[s, t] = between(t, s),   GL = G L          for t from s on
//   dG[s, t] += V L w_s                                    summed over the heads of the task
//   dC[n, t] += row[t] <S[n], dy[t]> + sum over s of B[s, n] dG[s, t]        S: before the piece
//   dB[n, s] += column[s] w_s <dS[n], x[s]> + sum over t of C[t, n] dG[s, t]
//   dx[s]    = w_s (column[s] B[s] dS + sum over t of GL[s, t] dy[t]) + D dy[s]
//   dS       = whole dS + sum over t of C[t]^T row[t] dy[t]                  for the piece before
#include "ssd_scan/cpu_decay_gradient.h"

namespace statescan::ssd_scan {
namespace STATESCAN_ISA {
namespace {

template <class R, class E>
class Backward {
 public:
  Backward(const BwdParams& p, void* memory)
      : p_(p),
        state_pitch_(padded<R>(p.state)),
        pitch_(padded<R>(p.headdim)),
        state_size_((p.state + kMaxRows) * pitch_),
        scratch_(memory),
        decays_(p, scratch_),
        changes_(p, scratch_) {
    constexpr int64_t kSteps = kTile + kMaxRows;
    const int64_t states = (p.state + kMaxRows) * kPitch, across = kSteps * kPitch;
    for (R** x : {&B_, &C_}) *x = scratch_.take<R>(kSteps * state_pitch_);
    for (R** x : {&Ct_, &Bt_, &dCt_, &dBt_}) *x = scratch_.take<R>(states);
    for (R** x : {&G_, &dG_, &V_, &GL_, &transposed_}) *x = scratch_.take<R>(across);
    for (R** x : {&x_, &dy_, &z_, &out_}) *x = scratch_.take<R>(kSteps * pitch_);
    scaled_ = scratch_.take<E>(kSteps * pitch_);
    for (E** x : {&xt_, &dyt_}) *x = scratch_.take<E>((p.headdim + kMaxRows) * kPitch);
    for (R** x : {&D_, &dD_}) *x = scratch_.take<R>(p.heads_per_task * pitch_);
    for (R** x : {&dA_, &dbias_}) *x = scratch_.take<R>(p.heads_per_task);
    Ct_operand_ = scratch_.take<E>(states);
    if constexpr (std::is_same_v<R, E>) Ct_ = Ct_operand_;
    S_ = scratch_.take<R>(state_size_);
    dS_ = scratch_.take<R>(p.heads_per_task * state_size_);
    if constexpr (!std::is_same_v<R, E>) {
      for (E** x : {&B_columns_, &C_columns_, &C_rows_}) {
        *x = scratch_.take<E>(kSteps * state_pitch_);
      }
      GL_pairs_ = scratch_.take<E>(across);
      for (E** x : {&x_pairs_, &dy_pairs_}) *x = scratch_.take<E>(kSteps * pitch_);
      state_pairs_ = scratch_.take<E>(state_size_);
    }
  }

  void run(int64_t task) {
    heads_ = task_heads(p_, task % p_.head_tasks());
    const int64_t rows = p_.segments->rows(), groups = p_.row_groups();
    row_group_ = task / p_.head_tasks();
    load_D(p_, p_.D, heads_, D_);
    clear(dD_, heads_.count() * pitch_);
    clear(dA_, heads_.count());
    clear(dbias_, heads_.count());
    for (int64_t row = rows * row_group_ / groups; row < rows * (row_group_ + 1) / groups; ++row) {
      for (int64_t s = p_.segments->row_offset[row + 1]; s-- > p_.segments->row_offset[row];) {
        run_segment(p_.segments->segments[s]);
      }
    }
    for_heads([&](int64_t h, int i, R*) { finish(h, i); });
  }

 private:
  static constexpr int kDepthE = kDepth<E>;

  // Calls f(head, which of the task's it is, the gradient of its state).
  template <class F>
  STATESCAN_INLINE void for_heads(F&& f) {
    for (int i = 0; i < heads_.count(); ++i) f(heads_.begin + i, i, dS_ + i * state_size_);
  }

  // Hands over what was summed over the rows of this task.
  void finish(int64_t h, int i) {
    const int64_t at = row_group_ * p_.heads + h;
    static_cast<R*>(p_.dA)[at] = dA_[i];
    static_cast<R*>(p_.ddt_bias)[at] = dbias_[i];
    R* dD = static_cast<R*>(p_.dD) + at * (p_.wide_D ? p_.headdim : 1);
    R sum = 0;
    for (int64_t n = 0; n < p_.headdim; ++n) {
      const R share = dD_[i * pitch_ + n];
      if (p_.wide_D) dD[n] = share;
      sum += share;
    }
    if (!p_.wide_D) *dD = sum;
  }

  void run_segment(const Segment& segment) {
    const bool given = segment.last_slot >= 0 && p_.dlast_state;
    dS_is_zero_ = !given;
    for_heads([&](int64_t h, int, R* dS) {
      clear(dS, state_size_);
      if (!given) return;
      load_tile(state_plane(p_.dlast_state, segment.last_slot, h), int(p_.headdim), int(p_.state),
                dS, pitch_);
    });
    for (int64_t i = piece_count(p_, segment); i-- > 0;) {
      run_piece(segment, piece_at(p_, segment, i));
    }
    if (segment.initial_slot < 0 || !p_.dinitial_state) return;
    for_heads([&](int64_t h, int, R* dS) {
      store_tile(state_plane(p_.dinitial_state, segment.initial_slot, h), int(p_.headdim),
                 int(p_.state), dS, pitch_);
    });
  }

  void run_piece(const Segment& segment, const Piece& piece) {
    const int64_t b = segment.batch;
    if (segment.padding) return run_padding(b, piece);
    load_group(b, piece);
    const bool starts_here = piece.first && !(segment.initial_slot >= 0 && p_.initial_state);
    S_is_zero_ = starts_here;
    for_heads([&](int64_t h, int i, R* dS) { run_head(segment, piece, h, i, dS); });
    dS_is_zero_ = false;
    finish_group(piece.steps());
    store_projection(p_.dB, b, piece, false, dBt_);
    store_projection(p_.dC, b, piece, p_.shift_output, dCt_);
    if (!p_.dchunk_states || !piece.chunk_entry) return;
    for_heads([&](int64_t h, int, R* dS) { add_chunk_gradient(b, piece.chunk, h, dS); });
  }

  void run_padding(int64_t b, const Piece& piece) {
    const int steps = piece.steps();
    clear(out_, steps * pitch_);
    changes_.begin(steps);
    clear(dBt_, p_.state * kPitch);
    for_heads([&](int64_t h, int, R*) {
      for (const View<4>* x : {&p_.dx, &p_.dz}) {
        if (!*x) continue;
        store_tile(scan_plane(p_, *x, b, h, piece), int(p_.headdim), steps, out_, pitch_);
      }
      store_tile(scan_plane(p_, p_.ddt, b, h, piece), 1, steps, changes_.into_state, 1);
    });
    store_projection(p_.dB, b, piece, false, dBt_);
    store_projection(p_.dC, b, piece, false, dBt_);
  }

  // What dB or dC is of this task, at the piece's steps. With `shift`, column t is the gradient of
  // C at step t - 1; that of the last step of a segment is 0.
  void store_projection(const View<5>& x, int64_t b, const Piece& piece, bool shift,
                        const R* tile) {
    const View<4> part{x.data, x.dtype, {x.stride[1], x.stride[2], x.stride[3], x.stride[4]}};
    const int skip = shift && piece.first ? 1 : 0, states = int(p_.state);
    const int64_t offset = heads_.part * x.stride[0];
    const Plane to =
        flipped(scan_plane(p_, part, b, heads_.group, piece, shift ? 1 : 0).shifted(offset));
    store_tile(to.at(skip, 0), piece.steps() - skip, states, tile + skip, kPitch);
    if (!shift || !piece.last) return;
    const R zero = 0;
    for (int n = 0; n < states; ++n) store_tile(to.at(piece.steps(), n), 1, 1, &zero, 1);
  }

  void add_chunk_gradient(int64_t b, int64_t chunk, int64_t h, R* dS) {
    load_tile(state_plane(p_.dchunk_states, b, chunk, h), int(p_.headdim), int(p_.state), S_,
              pitch_);
    for (int64_t i = 0; i < p_.state * pitch_; i += kLanes<R>) {
      store(dS + i, load(dS + i) + load(S_ + i));
    }
  }

  // B, C and G = (C B^T)^T, in blocks of kMaxRows on and right of the diagonal.
  void load_group(int64_t b, const Piece& piece) {
    const int steps = piece.steps(), N = int(p_.state), wide = padded<R>(steps);
    load_projection<R>(p_, p_.B, b, heads_.group, piece, false, B_);
    load_projection<R>(p_, p_.C, b, heads_.group, piece, p_.shift_output, C_);
    transpose_tile(B_, state_pitch_, steps, N, Bt_, kPitch);
    if (!std::is_same_v<R, E>) transpose_tile(C_, state_pitch_, steps, N, Ct_, kPitch);
    clear(dBt_, N * kPitch);
    clear(dCt_, N * kPitch);
    clear(dG_, kTile * kPitch);
    B_operand_ = paired_columns(B_, steps, state_pitch_, state_pitch_, B_columns_);
    C_operand_ = paired_rows(C_, steps, state_pitch_, state_pitch_, C_rows_);
    C_by_state_ = paired_columns(C_, steps, state_pitch_, state_pitch_, C_columns_);
    const E* Ct = transposed<R>(C_by_state_, steps, N, state_pitch_, Ct_operand_, kPitch);
    const int B_pitch = state_pitch_ / kDepthE;
    for_blocks<1>(steps, wide / kLanes<R>, [&](auto M, auto V, int s, int t) {
      if ((t + 1) * kLanes<R> <= s) return;
      Block<R, M(), V()> G;
      multiply(G, B_operand_ + s * B_pitch, B_pitch, 1, Ct + t * kLanes<R>, kPitch,
               (N + kDepthE - 1) / kDepthE);
      G.store_to(G_ + s * kPitch + t * kLanes<R>, kPitch);
    });
  }

  void run_head(const Segment& segment, const Piece& piece, int64_t h, int i, R* dS) {
    const int64_t b = segment.batch;
    const int steps = piece.steps(), P = int(p_.headdim);
    const R A = load_or<R>(p_.A, h, 0);
    load_tile(scan_plane(p_, p_.dt, b, h, piece), 1, steps, decays_.weight, 1);
    decays_.find(p_, A, load_or<R>(p_.dt_bias, h, 0), steps, changes_.slope);
    changes_.begin(steps);
    const bool more = h + 1 < heads_.end;
    expect(b, more ? piece : neighbour(p_, piece, -1), more ? h + 1 : heads_.begin);
    load_head(b, piece, h);
    if (!S_is_zero_) load_state(segment, piece, h);

    score(steps);
    changes_.through_steps(decays_, steps, V_, G_, GL_, dG_);
    if (p_.z) gate_gradient(b, piece, h, D_ + i * pitch_);
    if (!S_is_zero_) output_gradient(steps);
    if (!dS_is_zero_) state_gradient(steps, dS);
    input_gradient(steps, dS, D_ + i * pitch_, dD_ + i * pitch_);
    store_tile(scan_plane(p_, p_.dx, b, h, piece), P, steps, out_, pitch_);
    const R held =
        S_is_zero_ || dS_is_zero_ ? R(0) : decays_.whole * dot(S_, dS, p_.state * pitch_);
    const R* ddt = changes_.finish(p_, decays_, steps, A, held, dA_[i], dbias_[i]);
    store_tile(scan_plane(p_, p_.ddt, b, h, piece), 1, steps, ddt, 1);
    if (!S_is_zero_) previous_state_gradient(steps, dS);
  }

  // What will be read after this head is asked for while this one is computed.
  void expect(int64_t b, const Piece& piece, int64_t h) {
    next_x_ = scan_plane(p_, p_.x, b, h, piece);
    next_dy_ = p_.dy ? scan_plane(p_, p_.dy, b, h, piece) : Plane{};
    next_state_ = piece.first ? Plane{} : saved_state(b, cell_at(p_, piece.begin), h);
  }

  Plane saved_state(int64_t b, int64_t cell, int64_t h) const {
    return Plane{const_cast<void*>(p_.cell_states), p_.cell_dtype(), 1, p_.headdim}.shifted(
        ((b * p_.cells() + cell) * p_.heads + h) * p_.state * p_.headdim);
  }

  // x and dy, the latter before the gate, as (step, headdim) and (headdim, step).
  void load_head(int64_t b, const Piece& piece, int64_t h) {
    const int steps = piece.steps(), P = int(p_.headdim);
    load_tile(scan_plane(p_, p_.x, b, h, piece), P, steps, x_, pitch_);
    if (p_.dy) {
      load_tile(scan_plane(p_, p_.dy, b, h, piece), P, steps, dy_, pitch_);
    } else {
      clear(dy_, steps * pitch_);
    }
    if (p_.z) {  // z becomes dout silu'(z), which times y is its gradient
      load_tile(scan_plane(p_, p_.z, b, h, piece), P, steps, z_, pitch_);
      for (int i = 0; i < steps * pitch_; i += kLanes<R>) {
        const Vec<R> z = load(z_ + i), dout = load(dy_ + i), gate = sigmoid(z);
        store(dy_ + i, dout * z * gate);
        store(z_ + i, dout * silu_slope(z, gate));
      }
    }
    x_operand_ = paired_columns(x_, steps, pitch_, pitch_, x_pairs_);
    const E* dy = paired_columns(dy_, steps, pitch_, pitch_, dy_pairs_);
    transposed<R>(x_operand_, steps, P, pitch_, xt_, kPitch);
    transposed<R>(dy, steps, P, pitch_, dyt_, kPitch);
  }

  void load_state(const Segment& segment, const Piece& piece, int64_t h) {
    Plane from;
    if (piece.first) {
      from = state_plane(p_.initial_state, segment.initial_slot, h);
    } else {
      from = saved_state(segment.batch, piece.cell, h);
    }
    load_tile(from, int(p_.headdim), int(p_.state), S_, pitch_);
  }

  // V
  void score(int steps) {
    const int x_pitch = pitch_ / kDepthE;
    for_blocks<1>(steps, padded<R>(steps) / kLanes<R>, [&](auto M, auto N, int s, int t) {
      if ((t + 1) * kLanes<R> <= s) return;
      Block<R, M(), N()> V;
      multiply(V, x_operand_ + s * x_pitch, x_pitch, 1, dyt_ + t * kLanes<R>, kPitch,
               (int(p_.headdim) + kDepthE - 1) / kDepthE);
      V.store_to(V_ + s * kPitch + t * kLanes<R>, kPitch);
    });
  }

  // y once more, for dz.
  void gate_gradient(int64_t b, const Piece& piece, int64_t h, const R* D) {
    const int steps = piece.steps(), wide = padded<R>(steps), C_pitch = state_pitch_ / kDepthE;
    const E* x = scaled_rows(x_, decays_.weight, steps, pitch_, pitch_, scaled_);
    const E* C = C_by_state_;
    const E* GL = paired_rows(GL_, steps, wide, kPitch, GL_pairs_);
    const E* S =
        S_is_zero_ ? nullptr : paired_rows(S_, int(p_.state), pitch_, pitch_, state_pairs_);
    for_blocks(steps, pitch_ / kLanes<R>, [&](auto M, auto N, int t, int v) {
      const int p = v * kLanes<R>;
      Block<R, M(), N()> y;
      if (!S_is_zero_) {
        multiply(y, C + t * C_pitch, C_pitch, 1, S + p, pitch_,
                 (int(p_.state) + kDepthE - 1) / kDepthE);
        y.scale_rows(decays_.row + t);
      }
      const int before = t + M() < steps ? t + M() : steps;  // GL is 0 beyond the diagonal
      multiply(y, GL + t, 1, kPitch, x + p, pitch_, (before + kDepthE - 1) / kDepthE);
      y.store_to(out_ + t * pitch_ + p, pitch_);
    });
    for (int t = 0; t < steps; ++t) {
      for (int p = 0; p < pitch_; p += kLanes<R>) {
        const int at = t * pitch_ + p;
        const Vec<R> y = load(out_ + at) + load(D + p) * load(x_ + at);
        store(z_ + at, load(z_ + at) * y);
      }
    }
    store_tile(scan_plane(p_, p_.dz, b, h, piece), int(p_.headdim), steps, z_, pitch_);
  }

  // dC through the state before the piece, and <row[t] C[t] S, dy[t]>.
  void output_gradient(int steps) {
    const E* S = paired_columns(S_, int(p_.state), pitch_, pitch_, state_pairs_);
    project<R>(p_, steps, S, dyt_, Ct_, decays_.row, nullptr, dCt_, changes_.from_output);
  }

  // dB through the state after the piece, and column[s] <B[s] dS, x[s]>.
  void state_gradient(int steps, const R* dS) {
    const E* dS_operand = paired_columns(dS, int(p_.state), pitch_, pitch_, state_pairs_);
    project<R>(p_, steps, dS_operand, xt_, Bt_, decays_.column, decays_.weight, dBt_,
               changes_.into_state);
  }

  void input_gradient(int steps, const R* dS, const R* D, R* dD) {
    const int B_pitch = state_pitch_ / kDepthE;
    constexpr int kRow = kPitch / kDepthE;
    const E* GL = paired_columns(GL_, steps, padded<R>(steps), kPitch, GL_pairs_);
    const E* dy = paired_rows(dy_, steps, pitch_, pitch_, dy_pairs_);
    const E* dS_operand =
        dS_is_zero_ ? nullptr : paired_rows(dS, int(p_.state), pitch_, pitch_, state_pairs_);
    for_blocks(steps, pitch_ / kLanes<R>, [&](auto M, auto N, int s, int v) {
      const int p = v * kLanes<R>, left = steps - s < M() ? steps - s : M();
      if (v == 0) {
        prefetch_tile(next_x_.at(0, s), int(p_.headdim), left);
        if (next_dy_.data) prefetch_tile(next_dy_.at(0, s), int(p_.headdim), left);
      }
      Block<R, M(), N()> dx;
      if (!dS_is_zero_) {
        multiply(dx, B_operand_ + s * B_pitch, B_pitch, 1, dS_operand + p, pitch_,
                 (int(p_.state) + kDepthE - 1) / kDepthE);
        dx.scale_rows(decays_.column + s);
      }
      multiply(dx, GL + s * kRow + s / kDepthE, kRow, 1, dy + s / kDepthE * pitch_ + p, pitch_,
               (steps - s + kDepthE - 1) / kDepthE);
      dx.scale_rows(decays_.weight + s);
      dx.store_to(out_ + s * pitch_ + p, pitch_);
    });
    for (int t = 0; t < steps; ++t) {
      for (int p = 0; p < pitch_; p += kLanes<R>) {
        const int at = t * pitch_ + p;
        const Vec<R> g = load(dy_ + at);
        store(out_ + at, load(out_ + at) + load(D + p) * g);
        store(dD + p, load(dD + p) + g * load(x_ + at));
      }
    }
  }

  void previous_state_gradient(int steps, R* dS) {
    const E* scaled = scaled_rows(dy_, decays_.row, steps, pitch_, pitch_, scaled_);
    for_blocks(int(p_.state), pitch_ / kLanes<R>, [&](auto M, auto N, int n, int v) {
      const int p = v * kLanes<R>, left = int(p_.state) - n;
      if (v == 0 && next_state_.data) {
        prefetch_tile(next_state_.at(0, n), int(p_.headdim), left < M() ? left : M());
      }
      Block<R, M(), N()> previous;
      R* at = dS + n * pitch_ + p;
      if (!dS_is_zero_) {
        previous.load_from(at, pitch_);
        previous.scale(decays_.whole);
      }
      multiply(previous, C_operand_ + n, 1, state_pitch_, scaled + p, pitch_,
               (steps + kDepthE - 1) / kDepthE);
      previous.store_to(at, pitch_);
    });
  }

  // dB and dC through G, of which all the heads have their share in dG by now.
  void finish_group(int steps) {
    const int N = int(p_.state), vectors = padded<R>(steps) / kLanes<R>;
    for_blocks<1>(N, vectors, [&](auto M, auto V, int n, int v) {
      const int t = v * kLanes<R>, end = t + kLanes<R> < steps ? t + kLanes<R> : steps;
      Block<R, M(), V()> dC;
      dC.load_from(dCt_ + n * kPitch + t, kPitch);
      multiply(dC, B_ + n, 1, state_pitch_, dG_ + t, kPitch, end);
      dC.store_to(dCt_ + n * kPitch + t, kPitch);
    });
    transpose_tile(dG_, kPitch, steps, steps, transposed_, kPitch);
    for_blocks<1>(N, vectors, [&](auto M, auto V, int n, int v) {
      const int s = v * kLanes<R>;
      Block<R, M(), V()> dB;
      dB.load_from(dBt_ + n * kPitch + s, kPitch);
      multiply(dB, C_ + s * state_pitch_ + n, 1, state_pitch_, transposed_ + s * kPitch + s, kPitch,
               steps - s);
      dB.store_to(dBt_ + n * kPitch + s, kPitch);
    });
  }

  const BwdParams& p_;
  Heads heads_;
  int64_t row_group_;
  int state_pitch_, pitch_;  // of tiles whose columns are states, or headdim
  int64_t state_size_;
  bool S_is_zero_, dS_is_zero_;
  Scratch scratch_;
  Decays<R> decays_;
  DecayGradient<R> changes_;
  R *B_, *C_;                            // (step, state)
  R *Bt_, *Ct_, *dBt_, *dCt_;            // (state, step)
  R *G_, *dG_, *V_, *GL_, *transposed_;  // (step s, step t), but for the last
  R *x_, *dy_, *z_, *out_;               // (step, headdim)
  E* scaled_;                            // likewise
  E* Ct_operand_;                        // (state, step)
  E *xt_, *dyt_;                         // (headdim, step)
  R *D_, *dD_, *dA_, *dbias_;            // (head, headdim), (head)
  R *S_, *dS_;                           // (state, headdim), (head, state, headdim)
  Plane next_x_, next_dy_, next_state_;
  const E *B_operand_, *C_operand_, *C_by_state_, *x_operand_;
  E *B_columns_ = nullptr, *C_columns_ = nullptr, *C_rows_ = nullptr, *GL_pairs_ = nullptr,
    *x_pairs_ = nullptr, *dy_pairs_ = nullptr, *state_pairs_ = nullptr;
};

template <class R, class E>
void run_tasks(const BwdParams& p, const Range& range) {
  Backward<R, E> backward(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) backward.run(task);
}

}  // namespace

void bwd(const BwdParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_tasks<double, double>(p, range);
#if defined(__AVX512BF16__)
  if (p.bfloat16) return run_tasks<float, Pair>(p, range);
#endif
  run_tasks<float, float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::ssd_scan
