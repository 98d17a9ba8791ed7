// A packed matrix as kernels/cpu/library.py hands it over.

#pragma once

#include <cstddef>
#include <cstdint>

// The order of fields is that of the ctypes structures in kernels/cpu/library.py.
struct Segment {
    const uint32_t *words;  // [row blocks][tiles][width][64]
    const uint32_t *signs;  // [row blocks][tiles][64], signs beside codes of 4 bits; or null
    const float *table;     // [32], repeated where the codes are narrower
    const void *scales;     // [row blocks][groups][64], or null for 1
    const int8_t *offsets;  // like scales, or null for 0
    int32_t width, tiles, group_tiles, half_scales;
};

struct Sparse {
    const uint16_t *entries;  // column | code << column_bits; eight more may be read, and are not used
    const int32_t *pointers;  // [slabs][rows + 1]
    const float *table;  // [32] or [2^code bits], null where the code is the value
    const float *scales, *zeros, *base;  // zeros [rows] and base [rows][base_groups] may be null
    int32_t slabs, slab, column_bits, base_group, base_groups, rows;
};

struct Matrix {
    int32_t rows, columns, padded, segments;
    const int32_t *order;    // [padded], `columns` for no input; null: as they are
    const Segment *segment;  // codes; null for planes
    const Sparse *sparse;    // or null
    const uint32_t *planes;  // [row blocks][words][plane_count][64]
    const void *constants;   // [row blocks][groups][2 or 7][64]
    const int32_t *salient;  // [groups] salient columns, which come first; null with one plane
    int32_t words, group_words, plane_count, half_constants;
};

static constexpr int ROWS = 64;     // rows of a block
static constexpr int COLUMNS = 32;  // columns of a tile, and of a word of planes
