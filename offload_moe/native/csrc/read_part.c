#define _GNU_SOURCE
#include "read_part.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

/* The last page is looked up first, which usually decides. */
int om_is_cached(const om_file *file, int64_t offset, int64_t num_bytes) {
    unsigned char present[1024];
    if (file->pages == NULL || offset + num_bytes > file->num_bytes) return 0;
#if defined(__linux__)
    const int64_t last = (offset + num_bytes - 1) / PAGE * PAGE;
    if (mincore((void *)(uintptr_t)(file->pages + last), PAGE, present) != 0 || !(present[0] & 1)) return 0;
    for (int64_t at = offset; at < last; at += sizeof present * PAGE) {
        const int64_t length = last - at < (int64_t)sizeof present * PAGE ? last - at : (int64_t)sizeof present * PAGE;
        if (mincore((void *)(uintptr_t)(file->pages + at), (size_t)length, present) != 0) return 0;
        for (int64_t page = 0; page < (length + PAGE - 1) / PAGE; page++)
            if (!(present[page] & 1)) return 0;
    }
    return 1;
#else
    (void)present;
    return 0;
#endif
}

static int64_t read_from_system(int32_t descriptor, uint8_t *to, int64_t num_bytes, int64_t offset) {
    const ssize_t count = pread(descriptor, to, (size_t)num_bytes, offset);
    return count < 0 ? -errno : count;
}

void om_read_part(const om_file *file, uint8_t *record, om_read_at *read_at, om_part *part) {
    part->was_direct = file->direct >= 0 && !om_is_cached(file, part->offset, part->least);
    const int32_t descriptor = part->was_direct ? file->direct : file->cached;
    while (part->num_read < part->least && part->error == 0) {
        const int64_t done = part->num_read;
        const int64_t count = (read_at == NULL ? read_from_system : read_at)(descriptor, record + part->start + done,
                                                                             part->num_bytes - done, part->offset + done);
        if (count == -EINTR) continue;
        if (count < 0) part->error = (int32_t)-count;
        else part->num_read += count;
        /* the end of the file, behind which a direct read would be refused */
        if (count == 0 || (count > 0 && part->was_direct && count % PAGE != 0 && part->num_read < part->least))
            part->error = OM_SHORT_READ;
    }
}
