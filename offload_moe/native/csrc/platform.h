/* What systems have under different names. Threads, locks and clocks are POSIX's on all of them: on Windows those of mingw's
 * winpthreads, which is linked into the library. */
#ifndef OM_PLATFORM_H
#define OM_PLATFORM_H

#include "om_kernels.h"

#define OM_PAGE 4096

/* `om_read_file` is the system's `om_read_at`. Its file is a descriptor; on Windows a handle, of which 32 bits count. Several
 * threads may read at once: a handle that is opened for overlapped reads has several in flight. */

/* Whether all pages of a range of a mapped file are in the page cache; 0 where the system does not report it. */
int om_are_cached(const uint8_t *pages, int64_t offset, int64_t num_bytes);

/* Whole pages, of a multiple of OM_PAGE bytes. NULL where memory is short. */
void *om_allocate_pages(size_t num_bytes);
void om_free_pages(void *pages);

/* Call this in the children of every later fork. */
void om_after_fork(void (*in_child)(void));

void *om_load_library(const char *name);
void *om_library_symbol(void *library, const char *name);

#endif
