/* For LD_PRELOAD: a disk that is slow, reads or writes less than it was given, fails at times, or lies.
 *
 * UNRELIABLE_UNDER   files whose path contains this text; all others are left alone
 * UNRELIABLE_COUNTS  a file of five int64 that counts: reads and writes; those delayed, shortened, failed, corrupted
 * UNRELIABLE_DELAY   microseconds before each read or write
 * UNRELIABLE_SHORTEN, UNRELIABLE_FAIL, UNRELIABLE_CORRUPT    every n-th read is; 0: none
 * UNRELIABLE_SHORTEN_WRITE, UNRELIABLE_FAIL_WRITE, UNRELIABLE_CORRUPT_WRITE    the same of writes; a sync may fail, too
 * UNRELIABLE_ERRNO   of what fails: EIO unless given
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096
enum { CALLS, DELAYED, SHORTENED, FAILED, CORRUPTED, NUM_COUNTS };

static int64_t own_counts[NUM_COUNTS], *counts = own_counts;
static const char *under;
static long delay, number = EIO;
static long shorten[2], fail[2], corrupt[2]; /* of reads, of writes */
static int64_t num_calls[2];

static long setting(const char *name) {
    const char *text = getenv(name);
    return text == NULL ? 0 : atol(text);
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("UNRELIABLE_COUNTS");
    const int file = path == NULL ? -1 : open(path, O_RDWR);
    void *shared = file < 0 ? MAP_FAILED : mmap(NULL, sizeof own_counts, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) counts = shared;
    if (file >= 0) close(file);
    delay = setting("UNRELIABLE_DELAY");
    if (setting("UNRELIABLE_ERRNO")) number = setting("UNRELIABLE_ERRNO");
    shorten[0] = setting("UNRELIABLE_SHORTEN"), shorten[1] = setting("UNRELIABLE_SHORTEN_WRITE");
    fail[0] = setting("UNRELIABLE_FAIL"), fail[1] = setting("UNRELIABLE_FAIL_WRITE");
    corrupt[0] = setting("UNRELIABLE_CORRUPT"), corrupt[1] = setting("UNRELIABLE_CORRUPT_WRITE");
    under = getenv("UNRELIABLE_UNDER");
}

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }
static void count(int what) { __atomic_add_fetch(counts + what, 1, __ATOMIC_RELAXED); }
static int is_due(long every, int64_t call) { return every > 0 && call % every == 0; }

static int is_ours(int descriptor) {
    char link[64], path[PATH_MAX];
    struct stat status;
    if (under == NULL || fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, under) != NULL;
}

/* How much of a call is done. Direct ones end at a page. */
static size_t less(int descriptor, size_t size) {
    const size_t unit = fcntl(descriptor, F_GETFL) & O_DIRECT ? PAGE : 1;
    const size_t half = size / 2 / unit * unit;
    return half > 0 ? half : size;
}

/* Begin a call on one of our files: which one it is, or -1 where it fails. */
static int64_t begin_call(int is_write) {
    const int64_t call = __atomic_add_fetch(num_calls + is_write, 1, __ATOMIC_RELAXED);
    count(CALLS);
    if (delay > 0) {
        usleep((useconds_t)delay);
        count(DELAYED);
    }
    if (!is_due(fail[is_write], call)) return call;
    count(FAILED);
    errno = (int)number;
    return -1;
}

static size_t size_of_call(int descriptor, int is_write, int64_t call, size_t size) {
    if (!is_due(shorten[is_write], call)) return size;
    const size_t done = less(descriptor, size);
    if (done < size) count(SHORTENED);
    return done;
}

static void spoil(uint8_t *bytes, ssize_t size, int64_t call) {
    if (size <= 0 || !is_due(corrupt[0], call)) return;
    bytes[size / 2] ^= 0x10;
    count(CORRUPTED);
}

static ssize_t read_at(int descriptor, void *to, size_t size, off_t offset) {
    ssize_t (*real)(int, void *, size_t, off_t) = next("pread64");
    if (!is_ours(descriptor)) return real(descriptor, to, size, offset);
    const int64_t call = begin_call(0);
    if (call < 0) return -1;
    const ssize_t done = real(descriptor, to, size_of_call(descriptor, 0, call, size), offset);
    spoil(to, done, call);
    return done;
}

/* The first buffer alone, as a system may; ours passes one. */
static ssize_t read_first(int descriptor, const struct iovec *parts, int num_parts, off_t offset) {
    return num_parts < 1 ? 0 : read_at(descriptor, parts->iov_base, parts->iov_len, offset);
}

ssize_t pread(int descriptor, void *to, size_t size, off_t offset) { return read_at(descriptor, to, size, offset); }
ssize_t pread64(int descriptor, void *to, size_t size, off_t offset) { return read_at(descriptor, to, size, offset); }
ssize_t preadv(int descriptor, const struct iovec *parts, int n, off_t offset) { return read_first(descriptor, parts, n, offset); }
ssize_t preadv64(int descriptor, const struct iovec *parts, int n, off_t offset) { return read_first(descriptor, parts, n, offset); }
ssize_t preadv2(int descriptor, const struct iovec *parts, int n, off_t offset, int flags) {
    (void)flags;
    return read_first(descriptor, parts, n, offset);
}
ssize_t preadv64v2(int descriptor, const struct iovec *parts, int n, off_t offset, int flags) {
    (void)flags;
    return read_first(descriptor, parts, n, offset);
}

ssize_t read(int descriptor, void *to, size_t size) {
    ssize_t (*real)(int, void *, size_t) = next("read");
    if (!is_ours(descriptor)) return real(descriptor, to, size);
    const int64_t call = begin_call(0);
    if (call < 0) return -1;
    const ssize_t done = real(descriptor, to, size_of_call(descriptor, 0, call, size));
    spoil(to, done, call);
    return done;
}

/* The bytes that are written: a copy with one of them changed, which the caller frees, where the disk lies. */
static uint8_t *spoiled_copy(const void *from, size_t size, int64_t call) {
    uint8_t *copy = size > 0 && is_due(corrupt[1], call) ? malloc(size) : NULL;
    if (copy == NULL) return NULL;
    memcpy(copy, from, size);
    copy[size / 2] ^= 0x10;
    count(CORRUPTED);
    return copy;
}

static ssize_t write_at(int descriptor, const void *from, size_t size, off_t offset) {
    ssize_t (*real_at)(int, const void *, size_t, off_t) = next("pwrite64");
    ssize_t (*real)(int, const void *, size_t) = next("write");
    if (!is_ours(descriptor)) return offset < 0 ? real(descriptor, from, size) : real_at(descriptor, from, size, offset);
    const int64_t call = begin_call(1);
    if (call < 0) return -1;
    size = size_of_call(descriptor, 1, call, size);
    uint8_t *copy = spoiled_copy(from, size, call);
    if (copy != NULL) from = copy;
    const ssize_t done = offset < 0 ? real(descriptor, from, size) : real_at(descriptor, from, size, offset);
    free(copy);
    return done;
}

ssize_t write(int descriptor, const void *from, size_t size) { return write_at(descriptor, from, size, -1); }
ssize_t pwrite(int descriptor, const void *from, size_t size, off_t offset) { return write_at(descriptor, from, size, offset); }
ssize_t pwrite64(int descriptor, const void *from, size_t size, off_t offset) { return write_at(descriptor, from, size, offset); }

int fsync(int descriptor) {
    int (*real)(int) = next("fsync");
    return is_ours(descriptor) && begin_call(1) < 0 ? -1 : real(descriptor);
}
