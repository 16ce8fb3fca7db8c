// Backward of the gated norm on the CPU. Nothing but the inputs is kept: a first walk over a row of a
// group sums what mean and root need, a second one gives the gradients from the cached row.
#include "gated_rms_norm/cpu_rows.h"

namespace statescan::gated_rms_norm {
namespace STATESCAN_ISA {
namespace {

// Some rows of each operand, from the group's first channel on. Absent: null.
template <class T>
struct Operands {
  Block<const T> x, z, dy;
  Block<T> dx, dz;
};

template <class R, class Count>
STATESCAN_INLINE void add_part(R* sum, Vec<R> v, Count count) {
  store_part<R>(sum, load_part<R>(sum, count) + v, count);
}

// Sums over rows, of a group. No data: not wanted.
template <class R>
struct ParameterSums {
  R *dweight, *dbias;
};

template <class R, class T, Gate kGate>
R mean_input(int64_t n, const T* x, const T* z) {
  return sum_channels<R>(n,
                         [&](int64_t c, auto count) {
                           const Vec<R> in = load_part<R>(x + c, count);
                           if constexpr (kGate != Gate::kBefore) return in;
                           const Vec<R> gate = load_part<R>(z + c, count);
                           return gated_input<kGate>(in, gate, sigmoid(gate));
                         }) /
         R(n);
}

// What mean and root need of a group of one row.
template <class R>
struct Sums {
  R mean, rstd;
  R mean_dxhat, mean_dot;  // see norm_vjp
};

// `s` keeps sigmoid(z).
template <class R, class T, Gate kGate>
STATESCAN_INLINE Sums<R> sums_of(const Norm<R>& norm, const T* x, const T* z, const T* dy, R* s) {
  const R mean = norm.subtract_mean ? mean_input<R, T, kGate>(norm.n, x, z) : 0;
  Vec<R> squares{}, dxhats{}, dots{};  // of (v - mean)^2, dxhat, dxhat (v - mean)
  for_channels<R>(norm.n, [&](int64_t c, auto count) {
    Vec<R> gate{}, sg{};
    if constexpr (kGate != Gate::kNone) {
      gate = load_part<R>(z + c, count), sg = sigmoid(gate);
      store(s + c, sg);  // whole vectors fit: s is padded
    }
    Vec<R> v = gated_input<kGate>(load_part<R>(x + c, count), gate, sg) - mean;
    v = only_first<R>(v, count);
    const Vec<R> dn = norm_output_vjp<kGate>(load_part<R>(dy + c, count), gate, sg);
    const Vec<R> dxhat = norm.scale(dn, c, count);
    squares += v * v;
    dxhats += dxhat;
    dots += dxhat * v;
  });
  return {mean, sum_lanes_of<R>(squares), sum_lanes_of<R>(dxhats), sum_lanes_of<R>(dots)};
}

// From sums to means.
template <class R>
STATESCAN_INLINE void finish(const Norm<R>& norm, Sums<R>& sums) {
  sums.rstd = norm.rstd(sums.rstd);
  sums.mean_dxhat = norm.subtract_mean ? sums.mean_dxhat / R(norm.n) : 0;
  sums.mean_dot *= sums.rstd / R(norm.n);
}

// One group of a batch of rows. `s` is room for sigmoid(z). Rows take turns, so that one does not wait
// for the root of another; the batch after this one is asked for while memory would be idle.
template <class R, class T, Gate kGate>
void backward(const Norm<R>& norm, int rows, const Operands<T>& o, const ParameterSums<R>& total,
              Block<R> s) {
  Sums<R> sums[kBatch];
  const bool ahead = norm.n > 512;  // short rows are found by the hardware, and asking costs 20 %
  for (int i = 0; i < rows; ++i) {
    sums[i] = sums_of<R, T, kGate>(norm, o.x.row(i), o.z.row(i), o.dy.row(i), s.row(i));
  }
  for (int i = 0; i < rows; ++i) finish(norm, sums[i]);
  for (int i = 0; i < rows; ++i) {
    const auto [mean, rstd, mean_dxhat, mean_dot] = sums[i];
    const T *next_x = o.x.row(i + rows), *next_z = o.z.row(i + rows), *next_dy = o.dy.row(i + rows);
    const T *x_row = o.x.row(i), *z_row = o.z.row(i), *dy_row = o.dy.row(i);
    T *dx_row = o.dx.row(i), *dz_row = o.dz.row(i);
    const R* s_row = s.row(i);
    for_channels<R>(norm.n, [&](int64_t c, auto count) {
      Vec<R> z{}, sg{}, dx, dz;
      if constexpr (kGate != Gate::kNone) {
        z = load_part<R>(z_row + c, count), sg = load_part<R>(s_row + c, count);
      }
      const Vec<R> x = load_part<R>(x_row + c, count), dy = load_part<R>(dy_row + c, count);
      const Vec<R> xhat = (gated_input<kGate>(x, z, sg) - mean) * rstd;
      const Vec<R> dn = norm_output_vjp<kGate>(dy, z, sg);
      const Vec<R> dv = norm_vjp(norm.scale(dn, c, count), xhat, rstd, mean_dxhat, mean_dot);
      const Vec<R> n = kGate == Gate::kAfter ? norm.output(xhat, c, count) : xhat;
      gate_vjp<kGate>(x, z, sg, n, dy, dv, dx, dz);
      store_part<R>(dx_row + c, dx, count);
      if constexpr (kGate != Gate::kNone) store_part<R>(dz_row + c, dz, count);
      if (ahead) {
        __builtin_prefetch(next_x + c, 0, 1);
        __builtin_prefetch(next_dy + c, 0, 1);
        if constexpr (kGate != Gate::kNone) __builtin_prefetch(next_z + c, 0, 1);
      }
      if (total.dweight) add_part(total.dweight + c, dn * xhat, count);
      if (total.dbias) add_part(total.dbias + c, dn, count);
    });
  }
}

template <class R>
class Backward {
 public:
  Backward(const BwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    weight_ = load_parameter<R>(p.weight, p.dim, scratch);
    bias_ = load_parameter<R>(p.bias, p.dim, scratch);
    s_ = {scratch.take<R>(p.batch() * p.pitch()), p.pitch()};
    if (p.in_place) return;
    for (Block<R>* tile : {&x_, &z_, &dy_, &dx_, &dz_, &spare_}) *tile = take_tile<R>(p, scratch);
  }

  void run(int64_t task) {
    const int64_t tasks = p_.tasks();
    const int64_t begin = p_.first_row(task, tasks), end = p_.first_row(task + 1, tasks);
    dparameters_ = nullptr;
    if (p_.dparameters) {
      dparameters_ = static_cast<R*>(p_.dparameters) + task * 2 * p_.dim;
      std::fill(dparameters_, dparameters_ + 2 * p_.dim, R(0));
    }
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
        const Operands<T> o{block_of<const T>(p_.x, place, c), block_of<const T>(p_.z, place, c),
                            block_of<const T>(p_.dy, place, c), block_of<T>(p_.dx, place, c),
                            block_of<T>(p_.dz, place, c)};
        backward<R, T, kGate>(norm_at(p_, c, weight_, bias_), place.count, o, total_at(c), s_);
      }
    });
  }

  void by_tiles(const Place& place, int64_t channel) {
    const int64_t n = p_.group_size;
    load_rows(p_.x, place, channel, n, x_);
    if (p_.residual) add_rows(p_.residual, place, channel, n, x_, spare_);
    if (p_.z) load_rows(p_.z, place, channel, n, z_);
    if (p_.dy) {
      load_rows(p_.dy, place, channel, n, dy_);
    } else {
      std::fill(dy_.data, dy_.data + place.count * dy_.pitch, R(0));
    }
    with_gate(p_.gate, [&](auto gate) {
      for_batches(p_, place.count, [&](int i, int rows) {
        const Operands<R> o{x_.from(i), z_.from(i), dy_.from(i), dx_.from(i), dz_.from(i)};
        backward<R, R, gate()>(norm_at(p_, channel, weight_, bias_), rows, o, total_at(channel),
                               s_);
      });
    });
    if (p_.dresidual_out) add_rows(p_.dresidual_out, place, channel, n, dx_, spare_);
    store_rows(p_.dx, place, channel, n, dx_);
    if (p_.dresidual) store_rows(p_.dresidual, place, channel, n, dx_);
    if (p_.z) store_rows(p_.dz, place, channel, n, dz_);
  }

  ParameterSums<R> total_at(int64_t channel) const {
    if (dparameters_ == nullptr) return {nullptr, nullptr};
    return {p_.weight ? dparameters_ + channel : nullptr,
            p_.bias ? dparameters_ + p_.dim + channel : nullptr};
  }

  const BwdParams& p_;
  const R *weight_, *bias_;
  R* dparameters_;
  Block<R> s_, x_, z_, dy_, dx_, dz_, spare_;
};

template <class R>
void run_tasks(const BwdParams& p, const Range& range) {
  Backward<R> backward(p, range.scratch);
  for (int64_t task = range.begin; task < range.end; ++task) backward.run(task);
}

}  // namespace

void bwd(const BwdParams& p, const Range& range) {
  if (p.compute == DType::kFloat64) return run_tasks<double>(p, range);
  run_tasks<float>(p, range);
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::gated_rms_norm
