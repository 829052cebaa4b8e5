/* Rotary position embeddings of one head. */
#include "job.h"

/* The first `dims` of a head turn; cos and signed_sin in the order of halves: [dims], the first half of the sines negative. */
void om_rotate(float *head, const float *cos, const float *signed_sin, int64_t dims, int rotation) {
    const int64_t half = dims / 2;
    if (rotation == OM_HALVES) {
        for (int64_t i = 0; i < half; i++) {
            const float first = head[i], second = head[i + half];
            head[i] = first * cos[i] + second * signed_sin[i];
            head[i + half] = second * cos[i + half] + first * signed_sin[i + half];
        }
        return;
    }
    float turned[OM_MAX_ROTATED];
    const int stays = rotation == OM_PAIRS;
    for (int64_t i = 0; i < half; i++) {
        const float first = head[2 * i], second = head[2 * i + 1];
        turned[stays ? 2 * i : i] = first * cos[i] + second * signed_sin[i];
        turned[stays ? 2 * i + 1 : i + half] = second * cos[i] + first * signed_sin[i + half];
    }
    for (int64_t i = 0; i < dims; i++) head[i] = turned[i];
}
