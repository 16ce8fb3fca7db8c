#include "bindings/mamba2_step.h"

#include "gated_rms_norm/equations.h"

namespace statescan::bindings {

using selective_state_update::Shape;

namespace {

// Sizes that the shapes of the states, of A and of the convolution's filter tell.
struct StepSizes {
  int64_t batch, tokens, slots, heads, headdim, state, groups;
  int64_t conv;  // channels of the convolution
  int64_t mlp;   // columns in front of all others

  int64_t inner() const { return heads * headdim; }
  int64_t projection() const { return groups * state; }
};

void check_states(const StepArguments& in) {
  check_dim("ssm_state", in.ssm_state, "(slots, head, headdim, state)", 4);
  check_dim("conv_state", in.conv_state, "(slots, inner + 2 * group * state, state_len)", 3);
  if (in.ssm_state.size(3) < 1) {
    fail("ssm_state must have at least 1 number for each row, got state = 0");
  }
  check_not_expanded("conv_state", in.conv_state);
  check_not_expanded("ssm_state", in.ssm_state);
}

int64_t groups_of(const StepArguments& in, const StepSizes& n) {
  check_dim("conv_weight", in.conv_weight, "(inner + 2 * group * state, width)", 2);
  const int64_t projections = in.conv_weight.size(0) - n.inner();
  const int64_t groups = projections / (2 * n.state);
  if (groups < 1 || projections % (2 * n.state) != 0 || n.heads % groups != 0) {
    fail("conv_weight must have head * headdim + 2 * group * state rows = " +
         std::to_string(n.inner()) + " + " + std::to_string(2 * n.state) +
         " * group, where group divides head = " + std::to_string(n.heads) + ", got " +
         std::to_string(in.conv_weight.size(0)));
  }
  return groups;
}

int64_t mlp_columns(const StepArguments& in, const StepSizes& n) {
  const int64_t columns = in.zxbcdt.size(in.zxbcdt.dim() - 1);
  const int64_t least = n.inner() + n.conv + n.heads;
  if (columns < least || (columns - least) % 2 != 0) {
    fail("zxbcdt must have 2 * inner + 2 * group * state + head columns = " +
         std::to_string(least) + ", or an even number more, got " + std::to_string(columns));
  }
  return columns - least;
}

StepSizes sizes_of(const StepArguments& in) {
  const int64_t rank = in.zxbcdt.dim();
  if (rank != 2) {
    check_dim("zxbcdt", in.zxbcdt, "(batch, columns) or (batch, tokens, columns)", 3);
  }
  check_states(in);
  StepSizes n{};
  n.batch = in.zxbcdt.size(0), n.tokens = rank == 3 ? in.zxbcdt.size(1) : 1;
  n.slots = in.ssm_state.size(0), n.heads = in.ssm_state.size(1);
  n.headdim = in.ssm_state.size(2), n.state = in.ssm_state.size(3);
  n.groups = groups_of(in, n);
  n.conv = in.conv_weight.size(0);
  n.mlp = mlp_columns(in, n);
  return n;
}

int64_t norm_group_size(const StepArguments& in, const StepSizes& n) {
  return in.norm_group_size ? *in.norm_group_size : n.inner() / n.groups;
}

void check_norm(const StepArguments& in, const StepSizes& n) {
  check_shape("norm_weight", *in.norm_weight, "(inner)", {n.inner()});
  const int64_t size = norm_group_size(in, n);
  if (n.inner() > 0 && (size < 1 || n.inner() % size != 0)) {
    fail("norm_group_size must divide inner = " + std::to_string(n.inner()) + ", got " +
         std::to_string(size));
  }
  if (!(in.norm_eps >= 0)) {
    fail("norm_eps must be at least 0, got " + std::to_string(in.norm_eps));
  }
}

void check_parameters(const StepArguments& in, const StepSizes& n) {
  check_shape("A", in.A, "(head)", {n.heads});
  if (in.dt_bias) check_shape("dt_bias", *in.dt_bias, "(head)", {n.heads});
  if (in.D && in.D->dim() == 2) {
    check_shape("D", *in.D, "(head, headdim)", {n.heads, n.headdim});
  } else if (in.D) {
    check_shape("D", *in.D, "(head)", {n.heads});
  }
  if (in.conv_bias) {
    check_shape("conv_bias", *in.conv_bias, "(inner + 2 * group * state)", {n.conv});
  }
  const int64_t width = in.conv_weight.size(1), state_len = in.conv_state.size(2);
  if (width < 1) fail("conv_weight must have a width of at least 1, got 0");
  check_shape("conv_state", in.conv_state, "(slots, inner + 2 * group * state, state_len)",
              {n.slots, n.conv, state_len});
  if (state_len < width - 1) {
    fail("conv_state must have state_len of at least width - 1 = " + std::to_string(width - 1) +
         ", got " + std::to_string(state_len));
  }
  if (in.norm_weight) check_norm(in, n);
  if (!(in.dt_min <= in.dt_max)) {
    fail("dt_limit must be (least, greatest), got (" + std::to_string(in.dt_min) + ", " +
         std::to_string(in.dt_max) + ")");
  }
}

void check_integers(const StepArguments& in, const StepSizes& n) {
  if (in.cache_seqlens) check_shape("cache_seqlens", *in.cache_seqlens, "(batch)", {n.batch});
  if (in.state_batch_indices) {
    check_shape("state_batch_indices", *in.state_batch_indices, "(batch)", {n.batch});
  } else if (n.slots != n.batch) {
    fail("ssm_state must have a slot for each of batch = " + std::to_string(n.batch) +
         " elements unless state_batch_indices says which, got slots = " + std::to_string(n.slots));
  }
}

// `columns` of zxbcdt from `first` on, as (batch, token, head, headdim) or (batch, token, group,
// state): `inner` of them to each.
View<4> columns_of(const StepArguments& in, int64_t first, int64_t inner) {
  const Tensor& t = in.zxbcdt;
  const int64_t step = t.stride(t.dim() - 1);
  View<4> v;
  v.dtype = float_dtype("zxbcdt", t);
  v.data = static_cast<char*>(t.data_ptr()) + first * step * element_bytes(v.dtype);
  v.stride[0] = t.stride(0), v.stride[1] = t.dim() == 3 ? t.stride(1) : 0;
  v.stride[2] = inner * step, v.stride[3] = step;
  return v;
}

// A parameter of (head), or of (head, headdim).
View<2> per_head(const char* name, const OptionalTensor& t) {
  if (!t) return {};
  if (t->dim() == 2) return view<2>(name, *t);
  const View<1> line = view<1>(name, *t);
  View<2> v{line.data, line.dtype};
  v.stride[0] = line.stride[0];
  return v;
}

Shape step_shape(const StepArguments& in, const StepSizes& n) {
  Shape p{};
  p.batch = n.batch, p.tokens = n.tokens, p.heads = n.heads, p.headdim = n.headdim;
  p.state = n.state, p.groups = n.groups, p.slots = n.slots;
  p.dt_softplus = in.dt_softplus, p.dt_min = in.dt_min, p.dt_max = in.dt_max;
  p.compute_output = true;
  p.compute = compute_dtype({{"ssm_state", &in.ssm_state},
                             {"zxbcdt", &in.zxbcdt},
                             {"A", &in.A},
                             {"D", pointer(in.D)},
                             {"dt_bias", pointer(in.dt_bias)}});
  p.h = view<4>("ssm_state", in.ssm_state);
  if (n.state == 1) p.h.stride[3] = 1;
  p.dt = columns_of(in, n.mlp + n.inner() + n.conv, 1);
  p.dt.stride[3] = 0;
  if (!in.norm_weight) p.z = columns_of(in, n.mlp, n.headdim);
  p.A.data = in.A.data_ptr(), p.A.dtype = float_dtype("A", in.A), p.A.stride[0] = in.A.stride(0);
  p.D = per_head("D", in.D), p.dt_bias = per_head("dt_bias", in.dt_bias);
  return p;
}

gated_rms_norm::Shape norm_shape(const StepArguments& in, const StepSizes& n) {
  using gated_rms_norm::Gate;
  gated_rms_norm::Shape p{};
  p.rows = n.batch * n.tokens, p.dim = n.inner(), p.group_size = norm_group_size(in, n);
  p.gate = in.norm_before_gate ? Gate::kAfter : Gate::kBefore;
  p.eps = in.norm_eps;
  p.compute = compute_dtype({{"zxbcdt", &in.zxbcdt}, {"norm_weight", &*in.norm_weight}});
  p.weight = view<1>("norm_weight", in.norm_weight);
  const View<4> z = columns_of(in, n.mlp, 1);
  p.z.data = z.data, p.x.dtype = p.z.dtype = z.dtype;
  const int64_t sizes[] = {n.batch, n.tokens, n.inner()};
  const int64_t of_x[] = {n.tokens * n.inner(), n.inner(), 1};
  const int64_t of_z[] = {z.stride[0], z.stride[1], z.stride[3]};
  gated_rms_norm::merge_rows(p, 2, sizes, {{&p.x, of_x}, {&p.z, of_z}});
  return p;
}

void fill_conv(const StepArguments& in, const StepSizes& n, StepViews& p) {
  p.conv.batch = n.batch, p.conv.dim = n.conv, p.conv.tokens = n.tokens, p.conv.slots = n.slots;
  p.conv.width = in.conv_weight.size(1), p.conv.state_len = in.conv_state.size(2);
  p.conv.silu = in.silu;
  p.conv.compute = compute_dtype({{"zxbcdt", &in.zxbcdt},
                                  {"conv_state", &in.conv_state},
                                  {"conv_weight", &in.conv_weight},
                                  {"conv_bias", pointer(in.conv_bias)}});
  const View<4> columns = columns_of(in, n.mlp + n.inner(), 1);
  p.xBC.data = columns.data, p.xBC.dtype = columns.dtype;
  p.xBC.stride[0] = columns.stride[0], p.xBC.stride[1] = columns.stride[3];
  p.xBC.stride[2] = columns.stride[1];
  p.conv_state = view<3>("conv_state", in.conv_state);
  p.weight = view<2>("conv_weight", in.conv_weight);
  p.bias = view<1>("conv_bias", in.conv_bias);
}

}  // namespace

StepViews check(const StepArguments& in) {
  const StepSizes n = sizes_of(in);
  check_parameters(in, n);
  check_integers(in, n);
  check_same_device("conv_state", in.conv_state, in.ssm_state);
  StepViews p{};
  p.step = step_shape(in, n);
  fill_conv(in, n, p);
  if (in.norm_weight) p.norm = norm_shape(in, n);
  return p;
}

Tensor new_rows(const StepArguments& in, const StepViews& p) {
  const int64_t inner = p.step.heads * p.step.headdim;
  const bool tokens = in.zxbcdt.dim() == 3;
  const Sizes sizes =
      tokens ? Sizes{p.step.batch, p.step.tokens, inner} : Sizes{p.step.batch, inner};
  return empty(in.zxbcdt, sizes, in.zxbcdt.scalar_type());
}

View<4> view_of_heads(const Tensor& rows, const StepViews& p) {
  const int64_t inner = p.step.heads * p.step.headdim;
  View<4> v{rows.data_ptr(), p.xBC.dtype};
  v.stride[0] = p.step.tokens * inner, v.stride[1] = inner;
  v.stride[2] = p.step.headdim, v.stride[3] = 1;
  return v;
}

View<3> place_convolved(void* data, StepViews& p) {
  Shape& s = p.step;
  const int64_t inner = s.heads * s.headdim, size = element_bytes(p.xBC.dtype);
  auto part = [&](int64_t first, int64_t row) {
    View<4> v{data ? static_cast<char*>(data) + first * size : nullptr, p.xBC.dtype};
    v.stride[0] = p.conv.tokens * p.conv.dim, v.stride[1] = p.conv.dim;
    v.stride[2] = row, v.stride[3] = 1;
    return v;
  };
  s.x = part(0, s.headdim);
  s.B = part(inner, s.state), s.C = part(inner + s.groups * s.state, s.state);
  View<3> all{data, p.xBC.dtype};
  all.stride[0] = p.conv.tokens * p.conv.dim, all.stride[1] = 1, all.stride[2] = p.conv.dim;
  return all;
}

}  // namespace statescan::bindings
