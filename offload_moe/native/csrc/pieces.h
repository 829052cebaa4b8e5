/* The runs of bytes that a record of a file of another program lies in, and the parts that they are read in. */
#ifndef OM_PIECES_H
#define OM_PIECES_H

#include "fetches.h"
#include "job.h"

#include <string.h>

/* Bring the pieces of a record together, which were read into windows. */
OM_INLINE void om_join_pieces(const om_place *place, uint8_t *record) {
    for (int32_t i = 0; i < place->num_pieces; i++) {
        const om_piece *piece = &place->pieces[i];
        memmove(record + piece->target, record + piece->start + piece->skew, (size_t)piece->length);
    }
}

/* The run of bytes of a record that `next_byte` is in, as if each record had pieces. */
OM_INLINE om_piece om_piece_at(const om_place *place, int64_t next_byte) {
    const om_piece whole = {.offset = place->offset, .num_bytes = place->num_bytes, .length = place->num_bytes, .file = place->file};
    for (int32_t i = place->num_pieces - 1; i >= 0; i--)
        if (place->pieces[i].start <= next_byte) return place->pieces[i];
    return whole;
}

/* The next part of a fetch, at most `most` bytes; `fetch->next_byte` becomes the first byte behind it. */
OM_INLINE om_part om_take_part(om_fetch *fetch, const om_place *place, const om_piece *piece, int64_t most) {
    const int64_t at = fetch->next_byte - piece->start, num_bytes = om_min(most, piece->num_bytes - at);
    const om_part part = {.start = fetch->next_byte, .num_bytes = num_bytes, .offset = piece->offset + at,
                          .least = om_min(num_bytes, piece->skew + piece->length - at)};
    fetch->next_byte += num_bytes;
    for (int32_t i = 1; i < place->num_pieces; i++) /* windows need not be neighbours */
        if (place->pieces[i - 1].start + place->pieces[i - 1].num_bytes == fetch->next_byte)
            fetch->next_byte = place->pieces[i].start;
    return part;
}

#endif
