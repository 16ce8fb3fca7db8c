// Routes on the device: index tables from digits, and the steps that visit each token. Tables are small
// beside what is moved along them (4 bytes for a step, for all channels), and are made anew in each
// call rather than kept: nothing waits for the device.
#include "route_gather/cuda.h"

#include "common/divisor.h"
#include "common/launch.h"

namespace statescan::route_gather::cuda {
namespace {

using cross_scan::DigitRoute;

constexpr int kThreads = 256;

// ---- from digits

struct DeviceDigit {
  Divisor n = Divisor(1);
  int64_t stride = 0;
  bool flip = false, snake = false;
};

struct DeviceRoute {
  int begin = 0, end = 0;  // of its digits, the outermost first
  bool rev = false;
  int64_t base = 0;
};

// As many routes as fit the parameters of a launch. A route of less than 2^31 steps has at most 30
// digits of two and more.
struct Group {
  static constexpr int kRoutes = 16, kDigits = 64;
  int64_t first_route = 0;
  int routes = 0, digits = 0;
  DeviceRoute route[kRoutes];
  DeviceDigit digit[kDigits];

  bool has_room(int more) const { return routes < kRoutes && digits + more <= kDigits; }
  void add(const DigitRoute& r) {
    route[routes++] = {digits, digits + int(r.digits.size()), r.rev, r.base};
    for (const cross_scan::Digit& d : r.digits) {
      digit[digits++] = {Divisor(d.n), d.stride, d.flip, d.snake};
    }
  }
};

// The token of step t, see DigitRoute in python/statescan/routes/descriptor.py.
__device__ __forceinline__ int64_t token_at(const Group& group, int k, int64_t t, int64_t steps) {
  const DeviceRoute& route = group.route[k];
  int64_t token = route.base, outside = route.rev ? steps - 1 - t : t;
#pragma unroll 1
  for (int i = route.end - 1; i >= route.begin; --i) {
    const DeviceDigit& digit = group.digit[i];
    int64_t c;
    outside = digit.n.divide(outside, c);
    const bool down = digit.flip != (digit.snake && outside % 2 == 1);
    token += digit.stride * (down ? int64_t(digit.n.divisor) - 1 - c : c);
  }
  return token;
}

// Thread: a step. token[k, t] = token, or first[k, token] = t, whichever is given.
__global__ __launch_bounds__(kThreads) void digits_kernel(const Group group, int64_t steps,
                                                          int64_t length, Divisor by_steps,
                                                          int32_t* token, int32_t* first,
                                                          int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t t;
    const int64_t k = by_steps.divide(task, t);
    const int64_t found = token_at(group, int(k), t, steps);
    if (token) token[(group.first_route + k) * steps + t] = int32_t(found);
    if (first) first[(group.first_route + k) * length + found] = int32_t(t);
  }
}

void launch_digits(const std::vector<DigitRoute>& routes, const Routes& sizes, int32_t* token,
                   int32_t* first, cudaStream_t stream) {
  if (sizes.steps == 0) return;
  Group group;
  const auto flush = [&] {
    const int64_t tasks = group.routes * sizes.steps;
    launch("routes from digits", digits_kernel, blocks_for(tasks, kThreads), kThreads, 0, stream,
           group, sizes.steps, sizes.length, Divisor(sizes.steps), token, first, tasks);
    const int64_t next = group.first_route + group.routes;
    group = Group{};
    group.first_route = next;
  };
  for (const DigitRoute& given : routes) {
    const DigitRoute route = simplified(given);
    if (!group.has_room(int(route.digits.size()))) flush();
    group.add(route);
  }
  if (group.routes > 0) flush();
}

// ---- from tables

__global__ __launch_bounds__(kThreads) void fill_kernel(int32_t* to, int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) to[i] = -1;
}

void fill(int32_t* to, int64_t count, cudaStream_t stream) {
  launch("routes, no visits", fill_kernel, blocks_for(count, kThreads), kThreads, 0, stream, to,
         count);
}

// Thread: a step.
__global__ __launch_bounds__(kThreads) void read_kernel(const GivenTable given, Divisor steps,
                                                        Divisor count, int64_t length,
                                                        int32_t* token, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t t, k;
    const int64_t b = count.divide(steps.divide(task, t), k);
    const int64_t at = b * given.stride[0] + k * given.stride[1] + t * given.stride[2];
    const int64_t found = given.wide ? static_cast<const int64_t*>(given.data)[at]
                                     : static_cast<const int32_t*>(given.data)[at];
    token[task] = found >= 0 && found < length ? int32_t(found) : -1;
  }
}

// Thread: a step, put in front of the steps that visit its token: in any order, which sort_kernel
// mends.
__global__ __launch_bounds__(kThreads) void link_kernel(const int32_t* token, Divisor steps,
                                                        int64_t length, int32_t* first,
                                                        int32_t* next, int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t t;
    const int64_t route = steps.divide(task, t);
    const int32_t l = token[task];
    next[task] = l < 0 ? -1 : atomicExch(first + route * length + l, int32_t(t));
  }
}

// Merges runs of `width` steps of a list two by two. Returns how many runs are left.
__device__ __forceinline__ int64_t merge_runs(int32_t& first, int32_t* next, int64_t width) {
  int32_t left = first, last = -1;
  int64_t runs = 0;
  while (left >= 0) {
    ++runs;
    int32_t right = left;
    int64_t of_left = 0, of_right = width;
    for (; of_left < width && right >= 0; ++of_left) right = next[right];
    while (of_left > 0 || (of_right > 0 && right >= 0)) {
      const bool take_left = of_left > 0 && (of_right == 0 || right < 0 || left < right);
      const int32_t taken = take_left ? left : right;
      if (take_left) {
        left = next[left], --of_left;
      } else {
        right = next[right], --of_right;
      }
      if (last < 0) {
        first = taken;
      } else {
        next[last] = taken;
      }
      last = taken;
    }
    left = right;
  }
  if (last >= 0) next[last] = -1;
  return runs;
}

// Thread: the list of a token, in order of time. Most lists have one step and cost one look; a long
// one is sorted by its thread alone, n log n.
__global__ __launch_bounds__(kThreads) void sort_kernel(int32_t* first, int32_t* next,
                                                        Divisor length, int64_t steps,
                                                        int64_t tasks) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < tasks; task += stride) {
    int64_t l;
    const int64_t route = length.divide(task, l);
    int32_t* list = next + route * steps;
    int32_t head = first[task];
    if (head < 0 || list[head] < 0) continue;
    for (int64_t width = 1; merge_runs(head, list, width) > 1; width *= 2) {
    }
    first[task] = head;
  }
}

}  // namespace

void read_table(const GivenTable& given, const Table& table, int64_t batch, cudaStream_t stream) {
  const int64_t tasks = table.tables(batch) * table.count * table.steps;
  if (tasks == 0) return;
  launch("routes from a table", read_kernel, blocks_for(tasks, kThreads), kThreads, 0, stream,
         given, Divisor(table.steps), Divisor(table.count), table.length, table.token, tasks);
}

void expand(const std::vector<DigitRoute>& routes, const Table& table, cudaStream_t stream) {
  launch_digits(routes, table, table.token, nullptr, stream);
}

void invert(const std::vector<DigitRoute>& routes, const Visits& visits, cudaStream_t stream) {
  if (visits.steps != visits.length) fill(visits.first, visits.count * visits.length, stream);
  launch_digits(routes, visits, nullptr, visits.first, stream);
}

void invert(const Table& table, const Visits& visits, int64_t batch, cudaStream_t stream) {
  const int64_t lists = visits.tables(batch) * visits.count;
  const int64_t links = lists * visits.steps, heads = lists * visits.length;
  fill(visits.first, heads, stream);
  if (links == 0 || heads == 0) return;
  launch("routes, links", link_kernel, blocks_for(links, kThreads), kThreads, 0, stream,
         table.token, Divisor(visits.steps), visits.length, visits.first, visits.next, links);
  launch("routes, order of visits", sort_kernel, blocks_for(heads, kThreads), kThreads, 0, stream,
         visits.first, visits.next, Divisor(visits.length), visits.steps, heads);
}

}  // namespace statescan::route_gather::cuda
