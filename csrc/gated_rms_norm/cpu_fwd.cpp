// Forward of the gated norm on the CPU. A row of a group is read once from memory: its second walk, for
// the output, finds it in the first-level cache.
#include "gated_rms_norm/cpu_rows.h"

namespace statescan::gated_rms_norm {
namespace STATESCAN_ISA {
namespace {

// One group of one row. `v` is room for it.
template <class R, class T, Gate kGate>
void normalize(const Norm<R>& norm, const T* x, const T* z, T* y, R* v) {
  constexpr bool kept = kGate == Gate::kBefore;  // v is dear: an exponential for each channel
  auto input = [&](int64_t c, auto count) {
    if constexpr (kept) return load_part<R>(v + c, count);
    return load_part<R>(x + c, count);
  };
  auto first_input = [&](int64_t c, auto count) {
    const Vec<R> in = load_part<R>(x + c, count);
    if constexpr (!kept) return in;
    const Vec<R> gate = load_part<R>(z + c, count);
    const Vec<R> out = gated_input<kGate>(in, gate, sigmoid(gate));
    store(v + c, out);  // whole vectors fit: v is padded
    return out;
  };
  R mean = 0, squares;
  if (norm.subtract_mean) {
    mean = sum_channels<R>(norm.n, first_input) / R(norm.n);
    squares = sum_channels<R>(norm.n, [&](int64_t c, auto count) {
      const Vec<R> d = only_first<R>(input(c, count) - mean, count);
      return d * d;
    });
  } else {
    squares = sum_channels<R>(norm.n, [&](int64_t c, auto count) {
      const Vec<R> in = first_input(c, count);
      return in * in;
    });
  }
  const R rstd = norm.rstd(squares);
  for_channels<R>(norm.n, [&](int64_t c, auto count) {
    Vec<R> out = norm.output((input(c, count) - mean) * rstd, c, count);
    if constexpr (kGate == Gate::kAfter) out *= silu(load_part<R>(z + c, count));
    store_part<R>(y + c, out, count);
  });
}

template <class R>
class Forward {
 public:
  Forward(const FwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    weight_ = load_parameter<R>(p.weight, p.dim, scratch);
    bias_ = load_parameter<R>(p.bias, p.dim, scratch);
    v_ = scratch.take<R>(p.pitch());
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
    for_places(p_, begin, end, end - begin, [&](const Place& place) {
      const Block<T> x = block_of<T>(p_.x, place, 0), z = block_of<T>(p_.z, place, 0),
                     y = block_of<T>(p_.y, place, 0);
      for (int i = 0; i < place.count; ++i) {
        for (int64_t c = 0; c < p_.dim; c += p_.group_size) {
          normalize<R, T, kGate>(norm_at(p_, c, weight_, bias_), x.row(i) + c,
                                 kGate == Gate::kNone ? nullptr : z.row(i) + c, y.row(i) + c, v_);
        }
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
      for (int i = 0; i < place.count; ++i) {
        normalize<R, R, gate()>(norm_at(p_, channel, weight_, bias_), x_.row(i), z_.row(i),
                                y_.row(i), v_);
      }
    });
    store_rows(p_.y, place, channel, n, y_);
  }

  const FwdParams& p_;
  const R *weight_, *bias_;
  R* v_;
  Block<R> x_, z_, y_;
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
