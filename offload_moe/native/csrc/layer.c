/* A decode step of one decoder layer up to its experts in one call: norm, attention, residual sum, norm, router.
 *
 * One token of one sequence, in fp32; each part computes the same as its own call. */
#include "float_mode.h"
#include "job.h"

OM_APART static void add_residual(const om_layer *layer, const float *x, float *residual) {
    for (int64_t i = 0; i < layer->hidden; i++) residual[i] = x[i] + layer->residual_scale * residual[i];
}

/* x[H] -> residual[H] = x + attention, normed[H]; and logits, weights, ids as in `om_router_step`. The cache and the
 * rotary embedding are as in `om_attention_step` or `om_latent_step`. Returns 0, or -1 when memory is short. */
OM_EXPORT int om_layer_step(const om_layer *layer, const float *x, const float *cos, const float *signed_sin, void *keys,
                            void *values, int64_t capacity, int64_t length, float *residual, float *normed, float *logits,
                            float *weights, int64_t *ids) {
    om_rms_norm(x, layer->norms[0], layer->hidden, layer->epsilons[0], normed);
    const int status = layer->latent != NULL
        ? om_latent_step(layer->latent, normed, cos, signed_sin, keys, values, length, residual)
        : om_attention_step(layer->attention, normed, cos, signed_sin, keys, values, capacity, length, residual);
    if (status != 0) return -1;
    const uint64_t callers_mode = om_enter_float_mode();
    add_residual(layer, x, residual);
    om_restore_float_mode(callers_mode);
    om_rms_norm(residual, layer->norms[1], layer->hidden, layer->epsilons[1], normed);
    return layer->router == NULL ? 0 : om_router_step(layer->router, normed, logits, weights, ids);
}

/* Route another layer's residual[H] with this layer's norm and router. The rest is as in `om_layer_step`. */
int om_layer_guess(const om_layer *layer, const float *residual, float *normed, float *logits, float *weights, int64_t *ids) {
    om_rms_norm(residual, layer->norms[1], layer->hidden, layer->epsilons[1], normed);
    return om_router_step(layer->router, normed, logits, weights, ids);
}
