// Backward of the gated norm on the CPU. Nothing but the inputs is kept: a first walk over a row of a
// group sums what mean and root need, a second one gives the gradients from the cached row.
#include "gated_rms_norm/cpu_rows.h"

namespace statescan::gated_rms_norm {
namespace STATESCAN_ISA {
namespace {

// One row of each operand, from the group's first channel on. Absent: null.
template <class T>
struct Row {
  const T *x, *z, *dy;
  T *dx, *dz;
};

template <class R>
struct ParameterSums {
  R *dweight, *dbias;  // of the group; or null

  template <class Count>
  STATESCAN_INLINE void add(Vec<R> dn, Vec<R> xhat, int64_t c, Count count) const {
    if (dweight == nullptr) return;
    store_part<R>(dweight + c, load_part<R>(dweight + c, count) + dn * xhat, count);
    store_part<R>(dbias + c, load_part<R>(dbias + c, count) + dn, count);
  }
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

// One group of one row. `s` is room for sigmoid(z).
template <class R, class T, Gate kGate>
void backward(const Norm<R>& norm, const Row<T>& row, const ParameterSums<R>& sums, R* s) {
  constexpr bool gated = kGate != Gate::kNone;
  const R mean = norm.subtract_mean ? mean_input<R, T, kGate>(norm.n, row.x, row.z) : 0;
  // Sums of (v - mean)^2, of dxhat, and of dxhat (v - mean).
  Vec<R> squares{}, dxhats{}, dots{};
  for_channels<R>(norm.n, [&](int64_t c, auto count) {
    Vec<R> z{}, sg{};
    if constexpr (gated) {
      z = load_part<R>(row.z + c, count), sg = sigmoid(z);
      store(s + c, sg);  // whole vectors fit: s is padded
    }
    Vec<R> v = gated_input<kGate>(load_part<R>(row.x + c, count), z, sg) - mean;
    if (count < kLanes<R>) v = only_first<R>(v, count);
    const Vec<R> dn = norm_output_vjp<kGate>(load_part<R>(row.dy + c, count), z, sg);
    const Vec<R> dxhat = norm.scale(dn, c, count);
    squares += v * v;
    dxhats += dxhat;
    dots += dxhat * v;
  });
  const R rstd = norm.rstd(sum_lanes_of<R>(squares));
  const R mean_dxhat = norm.subtract_mean ? sum_lanes_of<R>(dxhats) / R(norm.n) : 0;
  const R mean_dot = sum_lanes_of<R>(dots) * rstd / R(norm.n);
  for_channels<R>(norm.n, [&](int64_t c, auto count) {
    Vec<R> z{}, sg{}, dx, dz;
    if constexpr (gated) z = load_part<R>(row.z + c, count), sg = load_part<R>(s + c, count);
    const Vec<R> x = load_part<R>(row.x + c, count), dy = load_part<R>(row.dy + c, count);
    const Vec<R> xhat = (gated_input<kGate>(x, z, sg) - mean) * rstd;
    const Vec<R> dn = norm_output_vjp<kGate>(dy, z, sg);
    const Vec<R> dv = norm_vjp(norm.scale(dn, c, count), xhat, rstd, mean_dxhat, mean_dot);
    const Vec<R> n = kGate == Gate::kAfter ? norm.output(xhat, c, count) : xhat;
    gate_vjp<kGate>(x, z, sg, n, dy, dv, dx, dz);
    store_part<R>(row.dx + c, dx, count);
    if constexpr (gated) store_part<R>(row.dz + c, dz, count);
    sums.add(dn, xhat, c, count);
  });
}

template <class R>
class Backward {
 public:
  Backward(const BwdParams& p, void* memory) : p_(p) {
    Scratch scratch(memory);
    weight_ = load_parameter<R>(p.weight, p.dim, scratch);
    bias_ = load_parameter<R>(p.bias, p.dim, scratch);
    s_ = scratch.take<R>(p.pitch());
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
    for_places(p_, begin, end, end - begin, [&](const Place& place) {
      const Block<T> x = block_of<T>(p_.x, place, 0), z = block_of<T>(p_.z, place, 0),
                     dy = block_of<T>(p_.dy, place, 0), dx = block_of<T>(p_.dx, place, 0),
                     dz = block_of<T>(p_.dz, place, 0);
      for (int i = 0; i < place.count; ++i) {
        for (int64_t c = 0; c < p_.dim; c += p_.group_size) {
          Row<T> row{x.row(i) + c, nullptr, dy.row(i) + c, dx.row(i) + c, nullptr};
          if constexpr (kGate != Gate::kNone) row.z = z.row(i) + c, row.dz = dz.row(i) + c;
          group<T, kGate>(row, c);
        }
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
      for (int i = 0; i < place.count; ++i) {
        group<R, gate()>(Row<R>{x_.row(i), z_.row(i), dy_.row(i), dx_.row(i), dz_.row(i)}, channel);
      }
    });
    if (p_.dresidual_out) add_rows(p_.dresidual_out, place, channel, n, dx_, spare_);
    store_rows(p_.dx, place, channel, n, dx_);
    if (p_.dresidual) store_rows(p_.dresidual, place, channel, n, dx_);
    if (p_.z) store_rows(p_.dz, place, channel, n, dz_);
  }

  template <class T, Gate kGate>
  STATESCAN_INLINE void group(const Row<T>& row, int64_t channel) {
    ParameterSums<R> sums{nullptr, nullptr};
    if (dparameters_) sums = {dparameters_ + channel, dparameters_ + p_.dim + channel};
    backward<R, T, kGate>(norm_at(p_, channel, weight_, bias_), row, sums, s_);
  }

  const BwdParams& p_;
  const R *weight_, *bias_;
  R *s_, *dparameters_;
  Block<R> x_, z_, dy_, dx_, dz_, spare_;
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
