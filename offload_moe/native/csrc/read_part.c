#include "read_part.h"
#include "platform.h"

#include <errno.h>

int om_is_cached(const om_file *file, int64_t offset, int64_t num_bytes) {
    return file->pages != NULL && offset + num_bytes <= file->num_bytes && om_are_cached(file->pages, offset, num_bytes);
}

void om_read_part(const om_file *file, uint8_t *record, om_read_at *read_at, om_part *part) {
    part->was_direct = file->direct >= 0 && !om_is_cached(file, part->offset, part->least);
    const int32_t descriptor = part->was_direct ? file->direct : file->cached;
    while (part->num_read < part->least && part->error == 0) {
        const int64_t done = part->num_read;
        const int64_t count = (read_at == NULL ? om_read_file : read_at)(descriptor, record + part->start + done,
                                                                             part->num_bytes - done, part->offset + done);
        if (count == -EINTR) continue;
        if (count < 0) part->error = (int32_t)-count;
        else part->num_read += count;
        /* the end of the file, behind which a direct read would be refused */
        if (count == 0 || (count > 0 && part->was_direct && count % OM_PAGE != 0 && part->num_read < part->least))
            part->error = OM_SHORT_READ;
    }
}
