/* What a row sees of a cache, and where a token's keys and values lie. */
#ifndef OM_VIEW_CUH
#define OM_VIEW_CUH

#include "common.cuh"
#include "params_attention.h"

/* The place of a row's own token in its room. */
OM_DEVICE int own_token(const om_card_view &view, int row) { return view.positions[row] - view.rooms[row].base; }

/* Tokens `first` to first + count of its room. */
struct seen_tokens {
    int first, count;
};

OM_DEVICE seen_tokens tokens_seen(const om_card_view &view, int row) {
    const int end = own_token(view, row) + 1;
    const int in_window = view.window > 0 && end > view.window ? end - view.window : 0;
    const int first = view.chunk > 0 ? end - 1 - view.positions[row] % view.chunk : in_window;
    return {first, end - first};
}

OM_DEVICE int sections_of(const seen_tokens &seen) { return OM_CARD_UP(seen.count, OM_CARD_SECTION); }

/* A token's key or value of `dims` numbers; head_at: head * stride of the room. */
OM_DEVICE u16 *row_of_token(void *const *pages, long long head_at, int token, int dims) {
    return (u16 *)pages[token / OM_CARD_PAGE] + head_at + token % OM_CARD_PAGE * dims;
}

/* Round to nearest even; a NaN stays a NaN. */
OM_DEVICE u16 to_bf16(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)(bits >> 16 | 0x40u);
    return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Two neighbours of bf16. */
OM_DEVICE float low_half(u32 bits) { return __uint_as_float(bits << 16); }
OM_DEVICE float high_half(u32 bits) { return __uint_as_float(bits & 0xffff0000u); }

#endif
