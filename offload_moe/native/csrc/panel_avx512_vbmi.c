/* The same with byte permutes across the register (Ice Lake, Zen 4 and later): compiled with one more flag. */
#include "panel_avx512.c"
