// What the SSD scan's kernels on tensor cores share: how operands come to shared memory as tiles of
// 64 steps, bfloat16 or several terms of it, and how results leave.
#pragma once

#include "common/lanes.cuh"
#include "common/mma.cuh"
#include "ssd_scan/decays.cuh"

namespace statescan::ssd_scan::cuda {

inline constexpr int kSteps = int(kTile);

// A tile of kSteps or more rows.
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kPitch = kColumns + kTilePad;
  alignas(16) SharedArray<BFloat16, kRows * kPitch> element;

  __device__ __forceinline__ BFloat16* at(int row, int column) {
    return &element[row * kPitch + column];
  }
  // 8 neighbours, moved at once.
  __device__ __forceinline__ uint4& pack(int row, int column) {
    return *reinterpret_cast<uint4*>(at(row, column));
  }
  __device__ __forceinline__ void put(int row, int column, const float (&v)[8]) {
    pack(row, column) = Pack<BFloat16, 8>::of(v).bits;
  }
};

// A tile of numbers that are sums of kTerms of bfloat16 (common/mma.cuh), each term a tile.
template <int kTerms, int kRows, int kColumns>
struct TermTile {
  using Term = Tile<kRows, kColumns>;
  SharedArray<Term, kTerms> term;

  // Operands of 16 x 16: of [row][depth] or [depth][row], and [column][depth] or [depth][column].
  __device__ __forceinline__ Terms<Left, kTerms> left(int row, int depth,
                                                      unsigned lane = unsigned(ptx::lane())) {
    return terms<kTerms>(
        [&](int i) { return left_of(term[i].at(row, depth), Term::kPitch, lane); });
  }
  __device__ __forceinline__ Terms<Left, kTerms> left_of_transpose(
      int depth, int row, unsigned lane = unsigned(ptx::lane())) {
    return terms<kTerms>(
        [&](int i) { return left_of_transposed(term[i].at(depth, row), Term::kPitch, lane); });
  }
  __device__ __forceinline__ Terms<Right, kTerms> right_of_transpose(
      int column, int depth, unsigned lane = unsigned(ptx::lane())) {
    return terms<kTerms>(
        [&](int i) { return right_of_transposed(term[i].at(column, depth), Term::kPitch, lane); });
  }
  __device__ __forceinline__ Terms<Right, kTerms> right(int depth, int column,
                                                        unsigned lane = unsigned(ptx::lane())) {
    return terms<kTerms>(
        [&](int i) { return right_of(term[i].at(depth, column), Term::kPitch, lane); });
  }

  // 8 neighbours.
  __device__ __forceinline__ void put(int row, int column, const float (&v)[8]) {
    Terms<uint32_t, kTerms> pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = split<kTerms>(v[2 * j], v[2 * j + 1]);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      term[i].pack(row, column) =
          uint4{pairs[0].term[i], pairs[1].term[i], pairs[2].term[i], pairs[3].term[i]};
    }
  }
  // Two neighbours.
  __device__ __forceinline__ void pair(int row, int column, float& low, float& high) {
    unite(
        terms<kTerms>([&](int i) { return *reinterpret_cast<uint32_t*>(term[i].at(row, column)); }),
        low, high);
  }
  __device__ __forceinline__ void get(int row, int column, float (&v)[8]) {
    const auto packs = terms<kTerms>([&](int i) { return term[i].pack(row, column); });
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      unite(terms<kTerms>([&](int i) {
              const uint4& x = packs.term[i];
              return j == 0 ? x.x : j == 1 ? x.y : j == 2 ? x.z : x.w;
            }),
            v[2 * j], v[2 * j + 1]);
    }
  }
  // Two neighbours, or 16 x 16.
  __device__ __forceinline__ void put(int row, int column, float low, float high) {
    const auto pairs = split<kTerms>(low, high);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      *reinterpret_cast<uint32_t*>(term[i].at(row, column)) = pairs.term[i];
    }
  }
  __device__ __forceinline__ void put(int row, int column, const Product& x) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        put(row + ptx::lane() / 4 + 8 * i, column + 8 * h + ptx::lane() % 4 * 2, x.d[h][2 * i],
            x.d[h][2 * i + 1]);
      }
    }
  }
};

__device__ __forceinline__ int round_up(int x, int by) { return (x + by - 1) / by * by; }

// Part of a tensor (batch, seqlen, head or group, ...): columns [first, first + columns) of a head
// at the steps of a piece.
struct Slice {
  const char* data;
  DType dtype;
  int64_t step, column;  // strides
  int columns;
  bool packed;  // 8 neighbours are 16 or 32 bytes that may be moved at once

  __device__ __forceinline__ Slice(const View<4>& x, const Piece& piece, int64_t head,
                                   int64_t first, int columns)
      : Slice(static_cast<const char*>(x.data) +
                  element_bytes(x.dtype) * (piece.b * x.stride[0] + piece.begin * x.stride[1] +
                                            head * x.stride[2] + first * x.stride[3]),
              x.dtype, piece.step * x.stride[1], x.stride[3], columns) {}

  // Rows of any matrix.
  __device__ __forceinline__ Slice(const char* data, DType dtype, int64_t step, int64_t column,
                                   int columns)
      : data(data), dtype(dtype), step(step), column(column), columns(columns) {
    packed = element_bytes(dtype) <= 4 && column == 1 && step * element_bytes(dtype) % 16 == 0 &&
             reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  __device__ __forceinline__ int64_t offset(int row, int i) const {
    return row * step + i * column;
  }
  __device__ __forceinline__ bool is_pack(int i) const { return packed && i + 8 <= columns; }
  // 16 bytes of numbers of 16 bits; of floats these are half of them.
  __device__ __forceinline__ uint4 pack(int row, int i, int half = 0) const {
    return *(reinterpret_cast<const uint4*>(data + element_bytes(dtype) * offset(row, i)) + half);
  }
  __device__ __forceinline__ float number(int row, int i) const {
    return load_element<float>(data, dtype, offset(row, i));
  }
};

// Sets 16 bits of a pack, which was 0, without an array that would have to be in memory.
__device__ __forceinline__ void set_element(uint4& v, int j, uint16_t bits) {
  const uint32_t pair = uint32_t(bits) << j % 2 * 16;
  v.x |= j / 2 == 0 ? pair : 0, v.y |= j / 2 == 1 ? pair : 0;
  v.z |= j / 2 == 2 ? pair : 0, v.w |= j / 2 == 3 ? pair : 0;
}

// Rows of a bfloat16 tensor into a tile, columns up to a multiple of 32; rows and columns that are
// not there are 0. With `shift`, row i holds step i - 1, which before a sequence is 0.
template <class Tile>
__device__ __forceinline__ void load_tile(const Slice& x, const Piece& piece, int shift, Tile& tile,
                                          int thread, int threads) {
  const unsigned packs = unsigned(round_up(x.columns, 32) / 8);
#pragma unroll 2
  for (unsigned k = unsigned(thread); k < kSteps * packs; k += unsigned(threads)) {
    const int row = int(k / packs), i = int(k % packs) * 8;
    const bool there = row < piece.rows && (row >= shift || !piece.first);
    uint4 v{};
    if (there && x.is_pack(i)) {
      v = x.pack(row - shift, i);
    } else if (there) {
#pragma unroll 1
      for (int j = 0; j < 8 && i + j < x.columns; ++j) {
        const auto* bits = reinterpret_cast<const uint16_t*>(x.data);
        set_element(v, j, bits[x.offset(row - shift, i + j)]);
      }
    }
    tile.pack(row, i) = v;
  }
}

// 8 numbers of a row from column i on, which lie together.
__device__ __forceinline__ void load_pack(const Slice& x, int row, int i, float (&v)[8]) {
  const uint4 pack = x.pack(row, i);
  if (x.dtype == DType::kBFloat16) return Pack<BFloat16, 8>{pack}.unpack(v);
  if (x.dtype == DType::kFloat16) return Pack<Half, 8>{pack}.unpack(v);
  const uint4 next = x.pack(row, i, 1);
  const uint32_t bits[8] = {pack.x, pack.y, pack.z, pack.w, next.x, next.y, next.z, next.w};
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = bits_to_float(bits[j]);
}
// Any 8; 0 where there is none.
__device__ __forceinline__ void load_numbers(const Slice& x, int row, int i, float (&v)[8]) {
  if (x.is_pack(i)) return load_pack(x, row, i, v);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (i + j < x.columns) v[j] = x.number(row, i + j);
  }
}

// Stores those of 8 numbers that are there.
__device__ __forceinline__ void store_numbers(const Slice& x, int row, int i, const float (&v)[8]) {
  char* data = const_cast<char*>(x.data);
  if (x.is_pack(i)) {
    uint4* to = reinterpret_cast<uint4*>(data + element_bytes(x.dtype) * x.offset(row, i));
    if (x.dtype == DType::kBFloat16) return ptx::store(to, Pack<BFloat16, 8>::of(v).bits);
    if (x.dtype == DType::kFloat16) return ptx::store(to, Pack<Half, 8>::of(v).bits);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      ptx::store(to + j, uint4{float_to_bits(v[4 * j]), float_to_bits(v[4 * j + 1]),
                               float_to_bits(v[4 * j + 2]), float_to_bits(v[4 * j + 3])});
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (i + j < x.columns) store_element(data, x.dtype, x.offset(row, i + j), v[j]);
  }
}

// The same into a tile of terms, from any dtype: a bfloat16 tensor where there is only one term.
template <int kTerms, int kRows, int kColumns>
__device__ __forceinline__ void load_tile(const Slice& x, const Piece& piece, int shift,
                                          TermTile<kTerms, kRows, kColumns>& tile, int thread,
                                          int threads) {
  if constexpr (kTerms == 1) {
    load_tile(x, piece, shift, tile.term[0], thread, threads);
  } else {
    const unsigned packs = unsigned(round_up(x.columns, 32) / 8);
#pragma unroll 2
    for (unsigned k = unsigned(thread); k < kSteps * packs; k += unsigned(threads)) {
      const int row = int(k / packs), i = int(k % packs) * 8;
      float v[8] = {};
      if (row < piece.rows && (row >= shift || !piece.first)) load_numbers(x, row - shift, i, v);
      tile.put(row, i, v);
    }
  }
}

// As load_tile, by copies that run beside the thread where rows allow it.
template <int kTerms, int kRows, int kColumns>
__device__ __forceinline__ void fetch_tile(const Slice& x, const Piece& piece, int shift,
                                           TermTile<kTerms, kRows, kColumns>& tile, int thread,
                                           int threads) {
  if (kTerms > 1 || !x.packed) return load_tile(x, piece, shift, tile, thread, threads);
  constexpr unsigned kPacks = kColumns / 8;
  const int i = int(unsigned(thread) % kPacks) * 8, left = x.columns - i;
  if (i >= round_up(x.columns, 32)) return;
  const int bytes = left <= 0 ? 0 : left < 8 ? 2 * left : 16;
  const int begin = piece.first ? shift : 0, end = piece.rows;  // rows that are there
  const int by = int(unsigned(threads) / kPacks), row = int(unsigned(thread) / kPacks);
  const char* from = x.data + 2 * x.offset(row - shift, i);
  BFloat16* to = tile.term[0].at(row, i);
#pragma unroll 4
  for (int k = row; k < kSteps; k += by) {
    const bool there = k >= begin && k < end && bytes > 0;
    ptx::cp_async_16(to, there ? from : x.data, there ? bytes : 0);
    from += 2 * by * x.step, to += by * Tile<kRows, kColumns>::kPitch;
  }
}

// The gradient of y before the gate into a tile: dy silu(z).
template <class Tile>
__device__ __forceinline__ void load_ungated(const Inputs& p, const Piece& piece, int64_t head,
                                             int64_t first, int columns, Tile& tile, int thread,
                                             int threads) {
  if (p.dy && !p.z && p.dy.dtype == DType::kBFloat16) {
    return load_tile(Slice(p.dy, piece, head, first, columns), piece, 0, tile, thread, threads);
  }
  const unsigned packs = unsigned(round_up(columns, 32) / 8);
#pragma unroll 1
  for (unsigned k = unsigned(thread); k < kSteps * packs; k += unsigned(threads)) {
    const int row = int(k / packs), i = int(k % packs) * 8;
    float v[8] = {};
    if (p.dy && row < piece.rows) {
      load_numbers(Slice(p.dy, piece, head, first, columns), row, i, v);
      if (p.z) {
        float z[8];
        load_numbers(Slice(p.z, piece, head, first, columns), row, i, z);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= silu(z[j]);
      }
    }
    tile.put(row, i, v);
  }
}

// Two neighbouring numbers of a row, of any dtype: at once where they may be.
__device__ __forceinline__ void store_pair(const Slice& x, int row, int i, float a, float b) {
  char* data = const_cast<char*>(x.data);
  if (x.packed && i + 1 < x.columns) {
    char* at = data + element_bytes(x.dtype) * x.offset(row, i);
    if (x.dtype == DType::kFloat32) {
      *reinterpret_cast<float2*>(at) = {a, b};
    } else {
      *reinterpret_cast<uint32_t*>(at) =
          x.dtype == DType::kBFloat16 ? ptx::pack_bf16(a, b) : ptx::pack_f16(a, b);
    }
    return;
  }
  if (i < x.columns) store_element(data, x.dtype, x.offset(row, i), a);
  if (i + 1 < x.columns) store_element(data, x.dtype, x.offset(row, i + 1), b);
}
__device__ __forceinline__ void load_pair(const Slice& x, int row, int i, float& a, float& b) {
  a = b = 0;
  if (x.packed && i + 1 < x.columns) {
    const char* at = x.data + element_bytes(x.dtype) * x.offset(row, i);
    if (x.dtype == DType::kFloat32) {
      const float2 pair = *reinterpret_cast<const float2*>(at);
      a = pair.x, b = pair.y;
      return;
    }
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(at);
    const bool is_bf16 = x.dtype == DType::kBFloat16;
    a = is_bf16 ? bits_to_float(pair << 16) : to_number(Half{uint16_t(pair)});
    b = is_bf16 ? bits_to_float(pair & 0xffff0000u) : to_number(Half{uint16_t(pair >> 16)});
    return;
  }
  if (i < x.columns) a = x.number(row, i);
  if (i + 1 < x.columns) b = x.number(row, i + 1);
}

}  // namespace statescan::ssd_scan::cuda
