/* One part of a record out of one file, around the page cache where that is possible and pays. */
#ifndef OM_READ_PART_H
#define OM_READ_PART_H

#include "om_kernels.h"

typedef struct {
    int64_t start, num_bytes, num_read; /* of the record */
    int64_t offset, least;               /* in the file; bytes to read at least: a window may end behind the file */
    int32_t error;                       /* 0, an errno, OM_SHORT_READ or OM_WRONG_CHECKSUM */
    int32_t was_direct;
} om_part;

/* Read `num_bytes` bytes into `start` of a record; the result is in the other fields. read_at: NULL for the system's. */
void om_read_part(const om_file *file, uint8_t *record, om_read_at *read_at, om_part *part);

/* Whether all pages of the range are in the page cache. */
int om_is_cached(const om_file *file, int64_t offset, int64_t num_bytes);

#endif
