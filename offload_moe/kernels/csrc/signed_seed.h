/* Weights are signed here: nothing to correct. */
typedef int dot_seed;
OM_INLINE dot_seed seed_one(const int32_t *correction) { return (void)correction, 0; }
OM_INLINE dot_seed seed_halves(const int32_t *first, const int32_t *second) { return (void)first, (void)second, 0; }
