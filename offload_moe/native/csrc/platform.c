#define _GNU_SOURCE
#include "platform.h"

#include <errno.h>
#include <stdlib.h>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <malloc.h>
#include <windows.h>

#define MOST_BYTES (1 << 30) /* of one read: its length has 32 bits */

static int64_t failure(DWORD error) {
    switch (error) {
    case ERROR_HANDLE_EOF: return 0;
    case ERROR_INVALID_PARAMETER: return -EINVAL; /* an unbuffered read that is not of whole sectors */
    case ERROR_INVALID_HANDLE: return -EBADF;
    case ERROR_ACCESS_DENIED:
    case ERROR_LOCK_VIOLATION: return -EACCES;
    case ERROR_NOT_ENOUGH_MEMORY:
    case ERROR_NO_SYSTEM_RESOURCES:
    case ERROR_WORKING_SET_QUOTA: return -ENOMEM;
    default: return -EIO;
    }
}

OM_EXPORT int64_t om_read_file(int32_t file, uint8_t *to, int64_t num_bytes, int64_t offset) {
    const HANDLE handle = (HANDLE)(intptr_t)file;
    OVERLAPPED place = {.Offset = (DWORD)offset, .OffsetHigh = (DWORD)(offset >> 32)};
    DWORD count = 0, error = 0;
    if ((place.hEvent = CreateEventW(NULL, TRUE, FALSE, NULL)) == NULL) return failure(GetLastError());
    if (!ReadFile(handle, to, (DWORD)(num_bytes < MOST_BYTES ? num_bytes : MOST_BYTES), NULL, &place)) error = GetLastError();
    if (error == 0 || error == ERROR_IO_PENDING) error = GetOverlappedResult(handle, &place, &count, TRUE) ? 0 : GetLastError();
    CloseHandle(place.hEvent);
    return error == 0 ? (int64_t)count : failure(error);
}

int om_are_cached(const uint8_t *pages, int64_t offset, int64_t num_bytes) {
    (void)pages, (void)offset, (void)num_bytes;
    return 0;
}

void *om_allocate_pages(size_t num_bytes) { return _aligned_malloc(num_bytes, OM_PAGE); }
void om_free_pages(void *pages) { _aligned_free(pages); }
void om_after_fork(void (*in_child)(void)) { (void)in_child; } /* there is no fork */
void *om_load_library(const char *name) { return (void *)LoadLibraryA(name); }
void *om_library_symbol(void *library, const char *name) { return (void *)GetProcAddress((HMODULE)library, name); }

#else
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

OM_EXPORT int64_t om_read_file(int32_t file, uint8_t *to, int64_t num_bytes, int64_t offset) {
    const ssize_t count = pread(file, to, (size_t)num_bytes, offset);
    return count < 0 ? -errno : count;
}

/* The last page is looked up first, which usually decides. */
int om_are_cached(const uint8_t *pages, int64_t offset, int64_t num_bytes) {
    unsigned char present[1024];
#if defined(__linux__)
    const int64_t last = (offset + num_bytes - 1) / OM_PAGE * OM_PAGE;
    if (mincore((void *)(uintptr_t)(pages + last), OM_PAGE, present) != 0 || !(present[0] & 1)) return 0;
    for (int64_t at = offset; at < last; at += sizeof present * OM_PAGE) {
        const int64_t length = last - at < (int64_t)sizeof present * OM_PAGE ? last - at : (int64_t)sizeof present * OM_PAGE;
        if (mincore((void *)(uintptr_t)(pages + at), (size_t)length, present) != 0) return 0;
        for (int64_t page = 0; page < (length + OM_PAGE - 1) / OM_PAGE; page++)
            if (!(present[page] & 1)) return 0;
    }
    return 1;
#else
    (void)pages, (void)offset, (void)num_bytes, (void)present;
    return 0;
#endif
}

void *om_allocate_pages(size_t num_bytes) { return aligned_alloc(OM_PAGE, num_bytes); }
void om_free_pages(void *pages) { free(pages); }
void om_after_fork(void (*in_child)(void)) { pthread_atfork(NULL, NULL, in_child); }
void *om_load_library(const char *name) { return dlopen(name, RTLD_NOW | RTLD_LOCAL); }
void *om_library_symbol(void *library, const char *name) { return dlsym(library, name); }
#endif
