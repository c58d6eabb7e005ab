// What a loop asks of the compiler.
#pragma once

// Its iterations depend on nothing that another writes.
#ifdef __clang__
#define ADAMW_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ADAMW_VECTORIZE _Pragma("GCC ivdep")
#endif

// The same, of sixteen iterations: gcc unrolls so short a loop into single elements before it thinks of vectors.
#ifdef __clang__
#define ADAMW_VECTORIZE_GROUP ADAMW_VECTORIZE
#else
#define ADAMW_VECTORIZE_GROUP ADAMW_VECTORIZE _Pragma("GCC unroll 1")
#endif
