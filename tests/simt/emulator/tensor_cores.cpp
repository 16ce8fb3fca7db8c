// Tensor cores: the lanes' fragments are put together, multiplied, and taken apart again. Not watched
// by the checker, so that it may look into the registers of all lanes.
#include "ptx_twins.h"

namespace statescan::ptx {
namespace {

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

template <int kDepth>
struct Matrices {
  float a[16][kDepth], b[kDepth][8];

  void add_to(void* const* lanes) const {
    for (int l = 0; l < 32; ++l) {
      float* d = static_cast<Fragments*>(lanes[l])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        double sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += double(a[row][k]) * b[k][column];
        d[i] = float(d[i] + sum);
      }
    }
  }
};

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{uint16_t(pair >> 16 * which)});
}

template <class T>
void multiply_16_bit(void* const* lanes) {
  Matrices<16> m;
  for (int l = 0; l < 32; ++l) {
    const auto& f = *static_cast<Fragments*>(lanes[l]);
    const int group = l / 4, member = l % 4;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i) {
        m.a[group + i % 2 * 8][2 * member + i / 2 * 8 + h] = half_of<T>(f.a[i], h);
      }
      for (int i = 0; i < 2; ++i) m.b[2 * member + i * 8 + h][group] = half_of<T>(f.b[i], h);
    }
  }
  m.add_to(lanes);
}

// The hardware does not look at the low 13 bits.
float tf32(uint32_t bits) { return bits_to_float(bits & 0xffffe000u); }

void multiply_tf32(void* const* lanes) {
  Matrices<8> m;
  for (int l = 0; l < 32; ++l) {
    const auto& f = *static_cast<Fragments*>(lanes[l]);
    const int group = l / 4, member = l % 4;
    for (int i = 0; i < 4; ++i) m.a[group + i % 2 * 8][member + i / 2 * 4] = tf32(f.a[i]);
    for (int i = 0; i < 2; ++i) m.b[member + i * 4][group] = tf32(f.b[i]);
  }
  m.add_to(lanes);
}

struct MatrixRow {
  uint32_t* r;
  const char* row;
};

template <bool kTransposed>
void distribute(void* const* lanes) {
  for (int i = 0; i < 4; ++i) {
    auto element = [&](int row, int column) {
      uint16_t bits;
      memcpy(&bits, static_cast<MatrixRow*>(lanes[i * 8 + row])->row + 2 * column, 2);
      return uint32_t(bits);
    };
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4, column = l % 4 * 2;
      static_cast<MatrixRow*>(lanes[l])->r[i] =
          kTransposed ? element(column, row) | element(column + 1, row) << 16
                      : element(row, column) | element(row, column + 1) << 16;
    }
  }
}

void load_matrices(simt::WarpFunction f, uint32_t (&r)[4], const void* row, simt::Loc loc) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("ldmatrix: a misaligned row");
  simt::check_shared(row);
  simt::check_access(row, 16, false);
  MatrixRow arguments{r, static_cast<const char*>(row)};
  simt::warp_collective(f, "ldmatrix", ~0u, &arguments, loc);
}
}  // namespace

void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      simt::Loc loc) {
  Fragments f{d, a, b};
  simt::warp_collective(&multiply_16_bit<BFloat16>, "mma bf16", ~0u, &f, loc);
}
void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      const float (&c)[4], simt::Loc loc) {
  std::copy(c, c + 4, d);
  mma_16x8x16_bf16(d, a, b, loc);
}
void mma_16x8x16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Loc loc) {
  Fragments f{d, a, b};
  simt::warp_collective(&multiply_16_bit<Half>, "mma f16", ~0u, &f, loc);
}
void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Loc loc) {
  Fragments f{d, a, b};
  simt::warp_collective(&multiply_tf32, "mma tf32", ~0u, &f, loc);
}
uint32_t to_tf32(float x) {
  const uint32_t bits = float_to_bits(x);
  return x != x ? bits : (bits + 0x1000) & 0xffffe000u;
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Loc loc) {
  load_matrices(&distribute<false>, r, row, loc);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, simt::Loc loc) {
  load_matrices(&distribute<true>, r, row, loc);
}

}  // namespace statescan::ptx
