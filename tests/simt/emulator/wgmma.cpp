// Products of a warpgroup, which run beside its threads. Each warp's 16 of the 64 rows are a product of
// their own, which reads its operands in shared memory when it is waited for, at last; its sums are
// NaN until a wait names them. Not watched by the checker, see tensor_cores.cpp.
#include <algorithm>
#include <limits>

#include "common/half.h"
#include "ptx90_twins.h"
#include "runtime.h"

namespace statescan::ptx {
namespace {

constexpr int kSums = 32, kDepth = 16, kColumns = 64, kRows = 16;

simt::Warp& warp() { return simt::self()->block->warp[simt::self()->warp]; }

// ---- operands in shared memory: 16 bytes of it that hold (row, piece) of the swizzled layout

char* swizzled(uint64_t operand, int row, int byte) {
  char* base = simt::self()->block->shared.front()->data;
  uint64_t offset = (operand & 0x3fff) * 16 + uint64_t(row / 8) * (operand >> 32 & 0x3fff) * 16 +
                    uint64_t(row % 8 * 128 + byte);
  offset ^= (offset >> 7 & 7) << 4;
  return base + offset;
}

// f(the 16 bytes, their row, the first of their 8 columns) for an operand of so many rows and columns.
template <class F>
void each_piece(uint64_t operand, int rows, int columns, F f) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; column += 8) {
      f(swizzled(operand, row, 2 * column), row, column);
    }
  }
}

// Of the left operand a warp reads its own rows only.
uint64_t own_rows(const simt::WarpProduct& x) {
  return x.a + uint64_t(simt::self()->warp % 4) * kRows * 128 / 16;
}
template <class F>
void each_operand_piece(const simt::WarpProduct& x, F f) {
  if (x.a_is_shared) each_piece(own_rows(x), kRows, kDepth, f);
  each_piece(x.b, x.depth_first ? kDepth : kColumns, x.depth_first ? kColumns : kDepth, f);
}

uint64_t read_operands(const simt::WarpProduct& x) {
  static std::vector<const char*> pieces;
  pieces.clear();
  each_operand_piece(x, [](const char* piece, int, int) { pieces.push_back(piece); });
  return simt::checker::read_operands(pieces);
}

float element(const char* piece, int i) {
  uint16_t bits;
  memcpy(&bits, piece + 2 * i, 2);
  return to_float(BFloat16{bits});
}

void multiply(simt::WarpProduct& x) {
  float a[kRows][kDepth], b[kDepth][kColumns];
  if (x.a_is_shared) {
    each_piece(own_rows(x), kRows, kDepth, [&](const char* piece, int row, int column) {
      for (int i = 0; i < 8; ++i) a[row][column + i] = element(piece, i);
    });
  } else {
    memcpy(a, x.a_registers, sizeof(a));
  }
  each_piece(x.b, x.depth_first ? kDepth : kColumns, x.depth_first ? kColumns : kDepth,
             [&](const char* piece, int row, int column) {
               for (int i = 0; i < 8; ++i) {
                 (x.depth_first ? b[row][column + i] : b[column + i][row]) = element(piece, i);
               }
             });
  double sums[kRows][kColumns] = {};
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < kColumns; ++column) {
        sums[row][column] += double(a[row][k]) * b[k][column];
      }
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int r = 0; r < kSums; ++r) {
      float& d = x.sum[size_t(l * kSums + r)];
      d = float((x.add ? d : 0) + sums[l / 4 + r % 4 / 2 * 8][r / 4 * 8 + l % 4 * 2 + r % 2]);
    }
  }
}

// ---- what the lanes of a warp do together

struct Product {
  float* d;
  bool a_is_shared;
  uint64_t a;
  const uint32_t* a_registers;
  uint64_t b;
  bool depth_first, add;
};

// All four warps of a warpgroup begin the same products.
void join_group(const simt::GroupProduct& product) {
  auto& of_group = simt::self()->block->products[simt::self()->warp / 4];
  const size_t i = warp().products_begun++;
  if (i == of_group.size()) of_group.push_back(product);
  if (of_group[i] != product) simt::fail("wgmma: warps of a warpgroup begin different products");
}

void begin(void* const* lanes) {
  const Product& first = *static_cast<Product*>(lanes[0]);
  simt::Warp& own = warp();
  join_group({first.a, first.b, first.a_is_shared, first.depth_first, first.add});
  simt::WarpProduct x{own.product_group,
                      false,
                      first.add,
                      first.depth_first,
                      first.a,
                      first.b,
                      first.a_is_shared,
                      {},
                      0,
                      {},
                      {}};
  for (int l = 0; l < 32; ++l) {
    const Product& p = *static_cast<Product*>(lanes[l]);
    if (p.a != first.a || p.b != first.b || p.add != first.add) {
      simt::fail("wgmma: operands differ between the lanes of a warp");
    }
    x.d[l] = p.d;
    for (int i = 0; !p.a_is_shared && i < 8; ++i) {
      const int row = l / 4 + i / 2 % 2 * 8, k = l % 4 * 2 + i / 4 * 8 + i % 2;
      x.a_registers[row][k] = to_float(BFloat16{uint16_t(p.a_registers[i / 2] >> 16 * (i % 2))});
    }
  }
  const bool goes_on = std::any_of(own.products.begin(), own.products.end(),
                                   [&](const auto& y) { return y.d[0] == x.d[0]; });
  if (!goes_on) {
    x.sum.resize(32 * kSums);
    for (int l = 0; l < 32; ++l) std::copy(x.d[l], x.d[l] + kSums, &x.sum[size_t(l * kSums)]);
  }
  for (float* d : x.d) std::fill(d, d + kSums, std::numeric_limits<float>::quiet_NaN());
  x.version = read_operands(x);
  own.products.push_back(std::move(x));
}

void commit(void* const*) { ++warp().product_group; }

void finish(void* const* lanes) {
  const unsigned groups_left = unsigned(*static_cast<int*>(lanes[0]));
  simt::Warp& own = warp();
  for (size_t i = 0; i < own.products.size(); ++i) {
    simt::WarpProduct& x = own.products[i];
    if (x.complete || x.group + groups_left >= own.product_group) continue;
    if (x.version != read_operands(x)) {
      simt::fail("an operand of wgmma was written before the product was waited for");
    }
    for (size_t j = i; x.sum.empty() && j-- > 0;) {
      if (own.products[j].d[0] == x.d[0]) x.sum = own.products[j].sum;
    }
    multiply(x);
    x.complete = true;
  }
}

struct Returned {
  const void* registers;
  size_t bytes;
};

// The last product of each sum has its value.
void return_sums(void* const* lanes) {
  const auto& first = *static_cast<Returned*>(lanes[0]);
  const simt::Range range{static_cast<const char*>(first.registers),
                          static_cast<const char*>(first.registers) + first.bytes};
  auto& products = warp().products;
  for (const simt::WarpProduct& x : products) {
    if (!range.holds(x.d[0])) continue;
    if (!x.complete) simt::fail("wgmma_wait names sums of a product that is still under way");
    for (int l = 0; l < 32; ++l) {
      std::copy_n(&x.sum[size_t(l * kSums)], kSums, x.d[l]);
    }
  }
  products.erase(std::remove_if(products.begin(), products.end(),
                                [&](const auto& x) { return range.holds(x.d[0]); }),
                 products.end());
}

void nothing(void* const*) {}

bool is_handed_over(const void* registers) {
  const auto& all = simt::self()->handed_over;
  return std::any_of(all.begin(), all.end(), [&](auto& range) { return range.holds(registers); });
}

}  // namespace

void fence_proxy_async() { simt::checker::fence_proxy_async(); }

uint64_t wgmma_operand(const void* p, int pieces) {
  const auto offset =
      uint64_t(static_cast<const char*>(p) - simt::self()->block->shared.front()->data);
  if (offset % 1024 != 0 || offset + uint64_t(16 * pieces) >= 1 << 18) {
    simt::fail("an operand of wgmma is where none can be");
  }
  return uint64_t(1) << 62 | uint64_t(1024 / 16) << 32 | uint64_t(1) << 16 |
         (offset / 16 + uint64_t(pieces));
}

void hand_over(const void* registers, size_t bytes) {
  const char* begin = static_cast<const char*>(registers);
  simt::self()->handed_over.push_back({begin, begin + bytes});
}
void begin_products(simt::Loc loc) {
  simt::warp_collective(&nothing, "wgmma.fence", ~0u, nullptr, loc);
}

void hand_back(const void* registers, size_t bytes, simt::Loc loc) {
  auto& all = simt::self()->handed_over;
  const char* begin = static_cast<const char*>(registers);
  all.erase(std::remove_if(all.begin(), all.end(),
                           [&](auto& x) { return x.begin < begin + bytes && begin < x.end; }),
            all.end());
  Returned returned{registers, bytes};
  simt::warp_collective(&return_sums, "the end of wgmma.wait_group", ~0u, &returned, loc);
}

void wgmma_commit(simt::Loc loc) {
  simt::warp_collective(&commit, "wgmma.commit_group", ~0u, nullptr, loc);
}

void await_products(int groups_left, simt::Loc loc) {
  simt::warp_collective(&finish, "wgmma.wait_group", ~0u, &groups_left, loc);
}

void product(float* d, bool a_is_shared, uint64_t a, const uint32_t* a_registers, uint64_t b,
             bool depth_first, bool add, simt::Loc loc) {
  if (!is_handed_over(d) || (!a_is_shared && !is_handed_over(a_registers))) {
    simt::fail("%s: wgmma with registers that no wgmma_fence has handed over",
               simt::describe(loc).c_str());
  }
  Product p{d, a_is_shared, a, a_registers, b, depth_first, add};
  simt::warp_collective(&begin, "wgmma", ~0u, &p, loc);
}

namespace {

struct MatrixRow {
  const uint32_t* r;
  char* row;
};

void store_transposed(void* const* lanes) {
  for (int l = 0; l < 32; ++l) {
    const auto& address = *static_cast<MatrixRow*>(lanes[l]);
    for (int column = 0; column < 8; ++column) {
      const int row = l % 8;
      const uint32_t pair = static_cast<MatrixRow*>(lanes[4 * column + row / 2])->r[l / 8];
      const uint16_t bits = uint16_t(pair >> row % 2 * 16);
      memcpy(address.row + 2 * column, &bits, 2);
    }
  }
}

}  // namespace

void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], simt::Loc loc) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("stmatrix: a misaligned row");
  simt::check_shared(row);
  simt::check_access(row, 16, true);
  MatrixRow arguments{r, static_cast<char*>(row)};
  simt::warp_collective(&store_transposed, "stmatrix", ~0u, &arguments, loc);
}

}  // namespace statescan::ptx

namespace simt {

const char* done_by_some_warps(const Block& block) {
  for (int w = 0; w < block.warps; ++w) {
    const size_t group = size_t(w) / 4, first = group * 4 * kLanes;
    if (block.warp[w].products_begun != block.products[group].size()) {
      return "wgmma by some warps of a warpgroup only";
    }
    if (block.thread[size_t(w) * kLanes]->registers != block.thread[first]->registers) {
      return "setmaxnreg by some warps of a warpgroup only";
    }
  }
  return nullptr;
}

}  // namespace simt
