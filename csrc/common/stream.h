// Stores past the caches, for results too large to be found there by whoever reads them next: a
// cache line is written without being read first, which saves a third of the traffic of a copy.
#pragma once

#include "common/simd.h"

namespace statescan {
inline namespace STATESCAN_ISA {

STATESCAN_INLINE void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256((__m256i*)(to + i), _mm256_loadu_si256((const __m256i*)(from + i)));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 64; i += 16) {
    _mm_stream_si128((__m128i*)(to + i), _mm_loadu_si128((const __m128i*)(from + i)));
  }
#else
  memcpy(to, from, 64);
#endif
}

// A copy of any alignment; what it shares of a cache line with others is stored as usual.
STATESCAN_INLINE void stream_copy(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t before = -reinterpret_cast<intptr_t>(out) & 63;
  const int64_t head = before < bytes ? before : bytes;
  memcpy(out, in, head);
  int64_t at = head;
  for (; at + 64 <= bytes; at += 64) stream_line(out + at, in + at);
  memcpy(out + at, in + at, bytes - at);
}

// Once, after the last of them: makes them visible to other threads in order.
STATESCAN_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace STATESCAN_ISA
}  // namespace statescan
