/* What a traced build reports of each access of a kernel; `trace.cpp` keeps it. Nothing in other builds. */
#pragma once
#include <cstdint>

namespace shim {

inline bool is_inside; /* a kernel's thread runs, not the scheduler */

#ifdef OM_SHIM_TRACE
void trace_launch(const void *stacks, uint64_t num_bytes);
void trace_block();
void trace_barrier();
void trace_warp_barrier();
void trace_fence();
void trace_atomic(const void *at, uint64_t num_bytes);
#else
inline void trace_launch(const void *, uint64_t) {}
inline void trace_block() {}
inline void trace_barrier() {}
inline void trace_warp_barrier() {}
inline void trace_fence() {}
inline void trace_atomic(const void *, uint64_t) {}
#endif

} // namespace shim
