// Forward of the gated norm on the CPU. A row of a group is read once from memory: its second walk, for
// the output, finds it in the first-level cache.
#include "gated_rms_norm/cpu_rows.h"

namespace statescan::gated_rms_norm {
namespace STATESCAN_ISA {
namespace {

// What the norm sees of a group of one row. Where the gate comes first an exponential makes it, and v
// keeps it for the second walk.
template <class R, class T, Gate kGate>
struct Input {
  const T *x, *z;
  const T *next_x, *next_z;  // of the next batch
  R* v;

  template <class Count>
  STATESCAN_INLINE Vec<R> first(int64_t c, Count count) const {
    const Vec<R> in = load_part<R>(x + c, count);
    if constexpr (kGate != Gate::kBefore) return in;
    const Vec<R> gate = load_part<R>(z + c, count);
    const Vec<R> out = gated_input<kGate>(in, gate, sigmoid(gate));
    store(v + c, out);  // whole vectors fit: v is padded
    ask_for_next(c);
    return out;
  }
  template <class Count>
  STATESCAN_INLINE Vec<R> again(int64_t c, Count count) const {
    if constexpr (kGate == Gate::kBefore) return load_part<R>(v + c, count);
    if constexpr (kGate == Gate::kAfter) ask_for_next(c);
    return load_part<R>(x + c, count);
  }
  // In the walk that has exponentials to compute meanwhile, so that memory is never idle.
  STATESCAN_INLINE void ask_for_next(int64_t c) const {
    __builtin_prefetch(next_x + c, 0, 1);
    __builtin_prefetch(next_z + c, 0, 1);
  }
  R sum(int64_t n) const {
    return sum_channels<R>(n, [&](int64_t c, auto count) { return first(c, count); });
  }
};

// One group of a batch of rows. `v` is room for it. Rows take turns, so that one does not wait for the
// root of another.
template <class R, class T, Gate kGate>
void normalize(const Norm<R>& norm, int rows, Block<const T> x, Block<const T> z, Block<T> y,
               Block<R> v) {
  R mean[kBatch] = {}, rstd[kBatch];
  const auto input = [&](int i) {
    return Input<R, T, kGate>{x.row(i), z.row(i), x.row(i + rows), z.row(i + rows), v.row(i)};
  };
  for (int i = 0; i < rows; ++i) {
    const auto in = input(i);
    if (norm.subtract_mean) {
      mean[i] = in.sum(norm.n) / R(norm.n);
      rstd[i] = sum_channels<R>(norm.n, [&](int64_t c, auto count) {
        const Vec<R> d = only_first<R>(in.again(c, count) - mean[i], count);
        return d * d;
      });
    } else {
      rstd[i] = sum_channels<R>(norm.n, [&](int64_t c, auto count) {
        const Vec<R> d = in.first(c, count);
        return d * d;
      });
    }
  }
  for (int i = 0; i < rows; ++i) rstd[i] = norm.rstd(rstd[i]);
  for (int i = 0; i < rows; ++i) {
    const auto in = input(i);
    for_channels<R>(norm.n, [&](int64_t c, auto count) {
      Vec<R> out = norm.output((in.again(c, count) - mean[i]) * rstd[i], c, count);
      if constexpr (kGate == Gate::kAfter) out *= silu(load_part<R>(in.z + c, count));
      store_part<R>(y.row(i) + c, out, count);
    });
  }
}

template <class R>
class Forward {
 public:
  Forward(const FwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    weight_ = load_parameter<R>(p.weight, p.dim, scratch);
    bias_ = load_parameter<R>(p.bias, p.dim, scratch);
    v_ = {scratch.take<R>(p.batch() * p.pitch()), p.pitch()};
    if (p.in_place) return;
    for (Block<R>* tile : {&x_, &z_, &y_}) *tile = take_tile<R>(p, scratch);
  }

  void run(int64_t begin, int64_t end) {
    if (p_.in_place) {
      return with_rows_type<R>(p_.x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        with_gate(p_.gate, [&](auto gate) { in_place<T, gate()>(begin, end); });
      });
    }
    for_places(p_, begin, end, p_.tile_rows(), [&](const Place& place) {
      for (int64_t c = 0; c < p_.dim; c += p_.group_size) by_tiles(place, c);
    });
  }

 private:
  template <class T, Gate kGate>
  void in_place(int64_t begin, int64_t end) {
    for_places(p_, begin, end, p_.batch(), [&](const Place& place) {
      for (int64_t c = 0; c < p_.dim; c += p_.group_size) {
        normalize<R, T, kGate>(norm_at(p_, c, weight_, bias_), place.count,
                               block_of<const T>(p_.x, place, c), block_of<const T>(p_.z, place, c),
                               block_of<T>(p_.y, place, c), v_);
      }
    });
  }

  void by_tiles(const Place& place, int64_t channel) {
    const int64_t n = p_.group_size;
    load_rows(p_.x, place, channel, n, x_);
    if (p_.residual) add_rows(p_.residual, place, channel, n, x_, y_);
    if (p_.residual_out) store_rows(p_.residual_out, place, channel, n, x_);
    if (p_.z) load_rows(p_.z, place, channel, n, z_);
    with_gate(p_.gate, [&](auto gate) {
      for_batches(p_, place.count, [&](int i, int rows) {
        normalize<R, R, gate()>(norm_at(p_, channel, weight_, bias_), rows, x_.from(i), z_.from(i),
                                y_.from(i), v_);
      });
    });
    store_rows(p_.y, place, channel, n, y_);
  }

  const FwdParams& p_;
  const R *weight_, *bias_;
  Block<R> v_, x_, z_, y_;
};

template <class R>
void run_tasks(const FwdParams& p, const Range& range) {
  const int64_t rows = p.rows_per_task();
  Forward<R>(p, range.scratch).run(range.begin * rows, std::min(range.end * rows, p.rows));
}

}  // namespace

void fwd(const FwdParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_tasks<double>(p, range);
  run_tasks<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::gated_rms_norm
