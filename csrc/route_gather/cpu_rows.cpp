// Channel-last to channel-last: whole rows, the channels of a token, move from one place to another.
// Results are put together in cache, a stretch of consecutive rows at a time, and copied as a whole.

#include <algorithm>

#include "common/scratch.h"
#include "common/stream.h"
#include "common/tile.h"
#include "route_gather/kernels.h"

namespace statescan::route_gather {
namespace STATESCAN_ISA {
namespace {

constexpr int64_t kAhead = 4;  // steps that a row is asked for ahead of its use

STATESCAN_INLINE const char* row_of(const View<4>& x, int64_t b, int64_t k, int64_t row) {
  const int64_t at = b * x.stride[0] + k * x.stride[1] + row * x.stride[3];
  return static_cast<const char*>(x.data) + at * element_bytes(x.dtype);
}

STATESCAN_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// A row of a few dozen bytes and more: cheaper than a call of memcpy.
STATESCAN_INLINE void copy_row(char* to, const char* from, int64_t bytes) {
  constexpr int64_t n = STATESCAN_VECTOR_BYTES;
  if (bytes < n) {
    memcpy(to, from, bytes);
    return;
  }
  for (int64_t at = 0; at + n <= bytes; at += n) {
    store(to + at, load_as<Vec<char>>(from + at));
  }
  store(to + bytes - n, load_as<Vec<char>>(from + bytes - n));
}

STATESCAN_INLINE void copy_stretch(void* to, const void* from, int64_t bytes, bool stream) {
  stream ? stream_copy(to, from, bytes) : (void)memcpy(to, from, bytes);
}

// Steps [begin, end) of all routes: rows t * count + k of the result.
void gather_stretch(const GatherRowsParams& p, int64_t b, int64_t begin, int64_t end,
                    char* buffer) {
  const int64_t bytes = p.dim * element_bytes(p.tokens.dtype);
  const int32_t* index = p.index + b * p.index_stride;
  char* to = buffer;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t k = 0; k < p.count; ++k, to += bytes) {
      const int32_t later = index[k * p.steps + std::min(t + kAhead, p.steps - 1)];
      if (later >= 0) prefetch_row(row_of(p.tokens, b, k, later), bytes);
      const int32_t token = index[k * p.steps + t];
      token >= 0 ? copy_row(to, row_of(p.tokens, b, k, token), bytes) : (void)memset(to, 0, bytes);
    }
  }
  char* out = const_cast<char*>(row_of(p.stack, b, 0, begin));
  copy_stretch(out, buffer, to - buffer, p.stream);
}

// sum[d] = scale * (the rows' d-th elements, in their order)
template <class R, class T, class U>
void add_rows(const T* const* rows, int64_t count, int64_t dim, R scale, U* out) {
  constexpr int lanes = kLanes<R>;
  int64_t d = 0;
  for (; d + lanes <= dim; d += lanes) {
    Vec<R> sum{};
    for (int64_t i = 0; i < count; ++i) sum += load_convert<R>(rows[i] + d);
    store_convert<R>(out + d, sum * scale);
  }
  for (; d < dim; ++d) {
    R sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += load_one<R>(rows[i] + d);
    store_one<R>(out + d, sum * scale);
  }
}

constexpr int64_t kVisits = 16;  // that are added at a time

template <class R, class T, class U>
void scatter_row(const ScatterRowsParams& p, int64_t b, const int32_t* visits, int64_t count,
                 R scale, R* sums, U* out) {
  const T* rows[kVisits + 1];
  int64_t done = 0;
  do {  // more visits than fit go on from the sum so far
    const int64_t some = std::min(count - done, kVisits);
    for (int64_t i = 0; i < some; ++i) {
      const int32_t visit = visits[done + i];
      rows[i] = reinterpret_cast<const T*>(row_of(p.stack, b, visit / p.steps, visit % p.steps));
    }
    const bool last = done + some == count;
    if (done == 0 && last) {
      add_rows<R, T, U>(rows, some, p.dim, scale, out);
    } else {
      if (done == 0) std::fill_n(sums, p.dim, R(0));
      for (int64_t i = 0; i < some; ++i) {
        for (int64_t d = 0; d < p.dim; ++d) sums[d] += load_one<R>(rows[i] + d);
      }
      for (int64_t d = 0; last && d < p.dim; ++d) store_one<R>(out + d, sums[d] * scale);
    }
    done += some;
  } while (done < count);
}

// Rows [begin, end) of the result.
template <class R, class T, class U>
void scatter_stretch(const ScatterRowsParams& p, int64_t b, int64_t begin, int64_t end, R* sums,
                     U* buffer) {
  const int64_t rows = p.rows();
  const int32_t* first = p.first + (p.index_stride == 0 ? 0 : b * (rows + 1));
  const int32_t* visits = p.visits + b * p.index_stride;
  const int64_t bytes = p.dim * int64_t(sizeof(T));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t later = std::min(row + kAhead, rows - 1);
    for (int32_t i = first[later]; i < first[later + 1]; ++i) {
      prefetch_row(row_of(p.stack, b, visits[i] / p.steps, visits[i] % p.steps), bytes);
    }
    const R scale = p.scale == nullptr ? R(1) : R(p.scale[b * p.scale_stride + row]);
    scatter_row<R, T, U>(p, b, visits + first[row], first[row + 1] - first[row], scale, sums,
                         buffer + (row - begin) * p.dim);
  }
  U* out = static_cast<U*>(p.tokens.data) + (b * rows + begin) * p.dim;
  copy_stretch(out, buffer, (end - begin) * p.dim * int64_t(sizeof(U)), p.stream);
}

template <class R>
void scatter_task(const ScatterRowsParams& p, int64_t b, int64_t begin, int64_t end,
                  Scratch scratch) {
  R* sums = scratch.take<R>(p.dim);
  char* buffer = scratch.take<char>(p.stretch() * p.dim * element_bytes(p.tokens.dtype));
  with_type(p.stack.dtype, [&](auto* from) {
    with_type(p.tokens.dtype, [&](auto* to) {
      using T = std::remove_pointer_t<decltype(from)>;
      using U = std::remove_pointer_t<decltype(to)>;
      for (int64_t row = begin; row < end; row += p.stretch()) {
        scatter_stretch<R, T, U>(p, b, row, std::min(row + p.stretch(), end), sums,
                                 reinterpret_cast<U*>(buffer));
      }
    });
  });
}

}  // namespace

void gather_rows(const GatherRowsParams& p, const Range& range) {
  char* buffer = Scratch(range.scratch).take<char>(0);
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t b = task / p.blocks(), begin = task % p.blocks() * p.block();
    const int64_t end = std::min(begin + p.block(), p.steps);
    for (int64_t t = begin; t < end; t += p.stretch()) {
      gather_stretch(p, b, t, std::min(t + p.stretch(), end), buffer);
    }
  }
  if (p.stream) end_stream();
}

void scatter_rows(const ScatterRowsParams& p, const Range& range) {
  for (int64_t task = range.begin; task < range.end; ++task) {
    const int64_t b = task / p.blocks(), begin = task % p.blocks() * p.block();
    const int64_t end = std::min(begin + p.block(), p.rows());
    p.compute == DType::kFloat64 ? scatter_task<double>(p, b, begin, end, Scratch(range.scratch))
                                 : scatter_task<float>(p, b, begin, end, Scratch(range.scratch));
  }
  if (p.stream) end_stream();
}

}  // namespace STATESCAN_ISA
}  // namespace statescan::route_gather
