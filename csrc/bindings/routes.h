// Sets of routes as the operators receive them, and moving tokens along them: by lines where the
// routes and the memory allow it, else by an index table.
#pragma once

#include "bindings/tensor.h"
#include "cross_scan/digits.h"

namespace statescan::bindings {

struct RouteSet {
  int64_t count = 0, steps = 0;
  std::vector<cross_scan::DigitRoute> digits;  // of every route, or empty: there is a table
  std::vector<int32_t> index;                  // (count, steps) or (batch, count, steps)
  int64_t index_stride = 0;                    // from one batch element to the next, 0: shared
};

void check_length(int64_t length);
void check_tokens(const char* name, int64_t low, int64_t high, int64_t length);

// The routes of cross_scan: of an H x W map.
RouteSet cross_routes(const std::string& mode, int64_t H, int64_t W);
// From digits, as Routes.flat_digits has them. fail if a token is not one of `length`.
RouteSet digit_routes(const std::vector<int64_t>& digits, int64_t length);
// Sizes from those of an index table (count, steps) or (batch, count, steps), without its contents.
RouteSet table_routes(const OptionalTensor& index, int64_t batch);

Sizes stack_sizes(int64_t batch, int64_t count, int64_t dim, int64_t steps, bool channel_last);
// A contiguous tensor of `stack_sizes` as (batch, count, dim, steps).
View<4> stack_view(const char* name, const Tensor& t, bool channel_last);
// tokens (batch, count or 1, dim, length) with route stride 0 where all routes read the same.
View<4> tokens_view(const Tensor& tokens, const RouteSet& routes);

enum class Reduce { kSum, kNone, kMean };
Reduce reduce_of(const std::string& name);

// What a scatter writes, allocated; zeros if there is nothing in the stack.
struct Merged {
  Tensor tensor;
  View<4> view;  // (batch, route, dim, length), of the first route if summed
  DType compute;
};
Merged merged_tokens(const Tensor& stack, const RouteSet& routes, int64_t length, Reduce reduce,
                     bool channel_last, std::optional<ScalarType> out_dtype);

// ---- on the CPU

// From digits, or else from an index table. fail if a token is not one of `length`.
RouteSet route_set(const OptionalTensor& index, const std::vector<int64_t>& digits, int64_t batch,
                   int64_t length);

// tokens (batch, count or 1, dim, length) -> (batch, count, dim, steps), or (batch, steps, count,
// dim) if channel_last.
Tensor gather(const Tensor& tokens, RouteSet routes, bool channel_last);

// stack (batch, count, dim, steps) -> (batch, dim, length), or (batch, length, dim) if channel_last;
// kNone: (batch, count, dim, length), or (batch, length, count, dim).
Tensor scatter(const Tensor& stack, RouteSet routes, int64_t length, Reduce reduce,
               bool channel_last, std::optional<ScalarType> out_dtype);

}  // namespace statescan::bindings
